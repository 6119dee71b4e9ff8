"""How other projects name and lay out a SAGAN's tensors: data only, a table a project.

A name on the left is ours, on the right theirs. In a template, {n} is the number of a block and {end} the number that
the block after the last one would have. A new project is a new entry of `DIALECTS`.

Sources, read for names, shapes and formulas: ajbrock/BigGAN-PyTorch, POSTECH-CVLab/PyTorch-StudioGAN,
kwotsin/mimicry, open-mmlab/mmgeneration, voletiv/self-attention-GAN-pytorch, heykeetae/Self-Attention-GAN,
brain-research/self-attention-gan.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class LayerNames:
    """A convolution, linear layer or embedding, and the state of its spectral normalization."""

    weight: str = "weight"
    bias: str = "bias"
    normed_weight: str = "weight_orig"  # the weight's name where it is spectral-normed
    u: str = "weight_u"  # its presence is what says that a layer is spectral-normed
    v: str | None = "weight_v"  # None: eval mode takes one iteration from u, (1, M), and keeps no v
    sigma: str | None = None  # the last σ, (1,), stored and not read


@dataclass(frozen=True)
class NormNames:
    """A batch normalization."""

    mean: str = "running_mean"
    var: str = "running_var"
    count: str | None = "num_batches_tracked"
    stat_shape: tuple[int, ...] = (-1,)
    gain: str = "weight"
    bias: str | None = "bias"  # None: `gain` holds [gain | bias], (K, 2C)
    one_plus: bool = False  # the gain is stored less one
    as_layers: bool = False  # gain and bias are layers of their own, named as embeddings are
    may_be_normed: bool = False  # ... and may be spectral-normed
    transposed: bool = False  # (C, K): a linear layer on a one-hot label


@dataclass(frozen=True)
class Part:
    """One network: a generator or a discriminator."""

    mark: str  # a key starts so in this network of this dialect, and in no other
    layers: Mapping[str, str]
    block: str
    inside: Mapping[str, str]  # the parts of a block
    attention: str
    first: int = 0  # the number of the first numbered block
    first_block: str | None = None  # the first block's name where it has no number
    attention_counts: bool = False  # attention takes a number of its own in the count of blocks
    attention_at: Mapping[int, tuple[int, ...]] | None = None  # resolution: sides, where no name tells
    settings: Mapping[str, Any] = field(default_factory=dict)  # of our network, as its code implies
    free: tuple[str, ...] = ()  # settings that its code leaves open
    unused: str | None = None  # a regular expression: tensors that its forward does not read
    differs: str | None = None  # why our networks cannot hold it


@dataclass(frozen=True)
class Dialect:
    """One project's names."""

    generator: Part
    discriminator: Part
    projections: Mapping[str, str]  # of the attention
    gamma: str
    gamma_shape: tuple[int, ...]
    norm: NormNames  # the generator's last
    class_norm: NormNames
    layer: LayerNames = LayerNames()
    special_layers: Mapping[str, LayerNames] = field(default_factory=dict)  # by kind: seed, linear, embedding
    joint: str = "."
    channels_last: bool = False
    prefixes: Mapping[str, str] = field(default_factory=dict)  # tell several networks in one file apart
    prefixes_named: bool = False  # ... and are part of the names in the tables
    ignored: str | None = None  # a regular expression: tensors of the optimizer and the like


PROJECTIONS = {"query": "theta", "key": "phi", "value": "g", "out": "o"}

BIGGAN_PYTORCH = Dialect(
    generator=Part(
        mark="output_layer.0.gain",
        layers={"linear": "linear", "norm": "output_layer.0", "to_image": "output_layer.2"},
        block="blocks.{n}.0",
        inside={"norm1": "bn1", "conv1": "conv1", "norm2": "bn2", "conv2": "conv2", "shortcut": "conv_sc"},
        attention="blocks.{n}.1",
        free=("norm_eps",),
    ),
    discriminator=Part(
        mark="embed.",
        layers={"linear": "linear", "embedding": "embed"},
        block="blocks.{n}.0",
        inside={"conv1": "conv1", "conv2": "conv2", "shortcut": "conv_sc"},
        attention="blocks.{n}.1",
        free=("narrow_blocks",),
    ),
    projections=PROJECTIONS,
    gamma="gamma",
    gamma_shape=(),
    norm=NormNames(mean="stored_mean", var="stored_var", count=None, gain="gain"),
    class_norm=NormNames(
        mean="stored_mean", var="stored_var", count=None, gain="gain", one_plus=True, as_layers=True
    ),
    layer=LayerNames(normed_weight="weight", u="u0", v=None, sigma="sv0"),
)

STUDIOGAN = Dialect(
    generator=Part(
        mark="blocks.0.0.bn1.gain.",
        layers={"linear": "linear0", "norm": "bn4", "to_image": "conv2d5"},
        block="blocks.{n}.0",
        inside={"norm1": "bn1", "conv1": "conv2d1", "norm2": "bn2", "conv2": "conv2d2", "shortcut": "conv2d0"},
        attention="blocks.{n}.0",
        attention_counts=True,
        settings={"norm_eps": 1e-4},
    ),
    discriminator=Part(
        mark="linear1.",
        layers={"linear": "linear1", "embedding": "embedding"},
        block="blocks.{n}.0",
        inside={"conv1": "conv2d1", "conv2": "conv2d2", "shortcut": "conv2d0"},
        attention="blocks.{n}.0",
        attention_counts=True,
        settings={"shortcut_relu": True},
    ),
    projections={"query": "conv1x1_theta", "key": "conv1x1_phi", "value": "conv1x1_g", "out": "conv1x1_attn"},
    gamma="sigma",
    gamma_shape=(1,),
    norm=NormNames(),
    class_norm=NormNames(
        mean="bn.running_mean", var="bn.running_var", count="bn.num_batches_tracked",
        gain="gain", one_plus=True, as_layers=True, may_be_normed=True, transposed=True,
    ),
)  # fmt: skip

STUDIOGAN_2020 = replace(  # before 2021-07-26: class gains and biases are embeddings
    STUDIOGAN,
    generator=replace(STUDIOGAN.generator, mark="blocks.0.0.bn1.embed0."),
    class_norm=replace(STUDIOGAN.class_norm, gain="embed0", bias="embed1", transposed=False),
)

MIMICRY = Dialect(
    generator=Part(
        mark="block2.b1.",
        layers={"linear": "l1", "norm": "b{end}", "to_image": "c{end}"},
        block="block{n}",
        first=2,
        inside={"norm1": "b1", "conv1": "c1", "norm2": "b2", "conv2": "c2", "shortcut": "c_sc"},
        attention="attn_block",
        attention_at={32: (16,), 128: (32,)},
        settings={"upsample": "bilinear"},
    ),
    discriminator=Part(
        mark="l_y.",
        layers={"linear": "l{end}", "embedding": "l_y"},
        block="block{n}",
        first=1,
        inside={"conv1": "c1", "conv2": "c2", "shortcut": "c_sc"},
        attention="attn_block",
        attention_at={32: (8,), 128: (32,)},
        settings={"shortcut_relu": True, "narrow_blocks": True},
    ),
    projections=PROJECTIONS,
    gamma="gamma",
    gamma_shape=(),
    norm=NormNames(),
    class_norm=NormNames(
        mean="bn.running_mean", var="bn.running_var", count="bn.num_batches_tracked",
        gain="embed", bias=None, as_layers=True,
    ),
)  # fmt: skip

MMGENERATION = Dialect(
    generator=Part(
        mark="conv_blocks.0.norm_1.weight_embedding.weight_orig",
        layers={"linear": "noise2feat", "norm": "to_rgb.bn", "to_image": "to_rgb.conv"},
        block="conv_blocks.{n}",
        inside={
            "norm1": "norm_1",
            "conv1": "conv_1.conv",
            "norm2": "norm_2",
            "conv2": "conv_2.conv",
            "shortcut": "shortcut.conv",
        },
        attention="conv_blocks.{n}",
        attention_counts=True,
        settings={"norm_eps": 1e-4},
        free=("norm_eps",),
    ),
    discriminator=Part(
        mark="from_rgb.",
        layers={"linear": "decision", "embedding": "proj_y"},
        block="conv_blocks.{n}",
        first_block="from_rgb",
        inside={"conv1": "conv_1.conv", "conv2": "conv_2.conv", "shortcut": "shortcut.conv"},
        attention="conv_blocks.{n}",
        attention_counts=True,
        free=("shortcut_relu",),
    ),
    projections={ours: f"{theirs}.conv" for ours, theirs in PROJECTIONS.items()},
    gamma="gamma",
    gamma_shape=(),
    norm=NormNames(),
    class_norm=NormNames(
        mean="norm.running_mean", var="norm.running_var", count="norm.num_batches_tracked",
        gain="weight_embedding", bias="bias_embedding", one_plus=True, as_layers=True, may_be_normed=True,
    ),
    prefixes={
        "generator": "generator.",
        "generator_ema": "generator_ema.",
        "discriminator": "discriminator.",
    },
    ignored=r"(generator_ema\.steps|data_preprocessor\..*|loss.*)",
)  # fmt: skip

MMGENERATION_BIGGAN = replace(  # its BigGAN schedule: plain class embeddings, and BigGAN's eps
    MMGENERATION,
    generator=replace(
        MMGENERATION.generator, mark="conv_blocks.0.norm_1.weight_embedding.weight", settings={}
    ),
)

VOLETIV = Dialect(
    generator=Part(
        mark="snlinear0.",
        layers={"linear": "snlinear0", "norm": "bn", "to_image": "snconv2d1"},
        block="block{n}",
        first=1,
        inside={
            "norm1": "cond_bn1",
            "conv1": "snconv2d1",
            "norm2": "cond_bn2",
            "conv2": "snconv2d2",
            "shortcut": "snconv2d0",
        },
        attention="self_attn",
        attention_at={128: (32,)},
        settings={"attention_bias": True},
    ),
    discriminator=Part(
        mark="snlinear1.",
        layers={"linear": "snlinear1", "embedding": "sn_embedding1"},
        block="block{n}",
        first=1,
        first_block="opt_block1",
        inside={"conv1": "snconv2d1", "conv2": "snconv2d2", "shortcut": "snconv2d0"},
        attention="self_attn",
        attention_at={128: (32,)},
        settings={"attention_bias": True, "shortcut_relu": True},
        unused=r"block5\.snconv2d0\..*",
    ),
    projections={
        "query": "snconv1x1_theta",
        "key": "snconv1x1_phi",
        "value": "snconv1x1_g",
        "out": "snconv1x1_attn",
    },
    gamma="sigma",
    gamma_shape=(1,),
    norm=NormNames(),
    class_norm=MIMICRY.class_norm,
)

HEYKEETAE = replace(
    VOLETIV,
    generator=replace(
        VOLETIV.generator,
        mark="l1.1.running_mean",
        differs="attn1 attends without pooling, with values as wide as the map, and last.0 is a transposed "
        "convolution; ours pools, takes half the width, and ends in a 3×3 convolution",
    ),
    discriminator=replace(
        VOLETIV.discriminator,
        mark="l1.0.module.",
        differs="l1.0 is a strided 4×4 convolution followed by a leaky ReLU of slope 0.1 (ours: 0.2), and attn1 "
        "attends without pooling",
    ),
)

OFFICIAL = Dialect(
    generator=Part(
        mark="model/g_snh0/",
        layers={"linear": "model/g_snh0", "norm": "model/g_bn", "to_image": "model/g_snconv_last"},
        block="model/g_block{n}",
        first=1,
        inside={
            "norm1": "cbn_0",
            "conv1": "snconv1",
            "norm2": "cbn_1",
            "conv2": "snconv2",
            "shortcut": "snconv3",
        },
        attention="model/g_non_local",
        attention_at={128: (32, 64)},
    ),
    discriminator=Part(
        mark="model/d_optimized_block1/",
        layers={"linear": "model/d_sn_linear", "embedding": "model/d_embedding"},
        block="model/d_block{n}",
        first=2,
        first_block="model/d_optimized_block1",
        inside={"conv1": "sn_conv1", "conv2": "sn_conv2", "shortcut": "sn_conv3"},
        attention="model/d_non_local",
        attention_at={128: (32, 64)},
    ),
    projections={"query": "sn_conv_theta", "key": "sn_conv_phi", "value": "sn_conv_g", "out": "sn_conv_attn"},
    gamma="sigma_ratio",
    gamma_shape=(),
    norm=NormNames(mean="moving_mean", var="moving_variance", count=None, gain="gamma", bias="beta"),
    class_norm=NormNames(
        mean="mean", var="var", count=None, stat_shape=(1, 1, 1, -1), gain="gamma", bias="beta"
    ),
    layer=LayerNames("w", "biases", "w", "u", None),
    special_layers={
        "seed": LayerNames("Matrix", "bias", "Matrix", "u", None),
        "linear": LayerNames("Matrix", "bias", "Matrix", "u", None),
        "embedding": LayerNames("embedding_map", "bias", "embedding_map", "u", None),
    },
    joint="/",
    channels_last=True,
    prefixes={"generator": "model/g_", "discriminator": "model/d_"},
    prefixes_named=True,
    ignored=r".*(/Adam(_1)?|beta[12]_power(_1)?|global_step|ExponentialMovingAverage)",
)

DIALECTS: dict[str, Dialect] = {
    "biggan_pytorch": BIGGAN_PYTORCH,
    "studiogan": STUDIOGAN,
    "studiogan_2020": STUDIOGAN_2020,
    "mimicry": MIMICRY,
    "mmgeneration": MMGENERATION,
    "mmgeneration_biggan": MMGENERATION_BIGGAN,
    "voletiv": VOLETIV,
    "heykeetae": HEYKEETAE,
    "official": OFFICIAL,
}
