"""How other code bases write the attention layer: names and roles. Data only; no host is imported.

Roles are the mathematics', not the host's words. The query has a row of weights for every output position; the key
gives the positions that are looked at. What some hosts call `query` plays the key, and the other way round.
"""

from dataclasses import dataclass, replace

from sagan_kernels.ops.attention import Positions


@dataclass(frozen=True)
class Variant:
    """One way of writing y = x + gamma · out(softmax(query keyᵀ) value).

    A projection is named by its path in the layer, as `torch.nn.Module.get_submodule` takes it. Where a path has
    several parts, the outer ones only hold the projection and do nothing of their own.
    """

    name: str
    classes: tuple[str, ...]
    """Names of the host's classes; empty for a form found by structure."""
    query: str
    key: str
    value: str
    out: str | None = None
    gamma: str | None = "gamma"
    """A parameter of one element; None where the residual is plain."""
    pool: bool = False
    """Whether the layer max-pools the projected keys and values, 2×2."""
    normalize: Positions = "keys"
    scale: float | str = 1.0
    """Factor of the scores; a string is the attribute that holds it."""
    after: str | None = None
    """A module between the out projection and the sum."""
    ignores_rest: bool = False
    """Whether `forward` takes more arguments than x and uses none of them."""
    returns_map: bool = False
    """Whether the layer returns (y, map) with the map (B, L, S)."""
    map_flag: str | None = None
    """An attribute that, when true, makes the host return its map: its own code then runs."""


_BIGGAN = Variant("BigGAN-PyTorch", ("Attention",), "theta", "phi", "g", "o", pool=True, ignores_rest=True)
_BY_CONV = Variant(
    "query_conv", ("SelfAttention", "PAM_Module", "Self_Attn"), "query_conv", "key_conv", "value_conv"
)

VARIANTS = (
    _BIGGAN,
    replace(_BIGGAN, name="mimicry", classes=("SelfAttention",), ignores_rest=False),
    replace(_BIGGAN, name="fastai, pooled", classes=("PooledSelfAttention2d",), ignores_rest=False),
    replace(_BIGGAN, name="BigGAN-PyTorch, TFHub", classes=("SelfAttention",), out="o_conv", ignores_rest=False),
    Variant(
        "mmgeneration", ("SelfAttentionBlock",), "theta.conv", "phi.conv", "g.conv", "o.conv", pool=True,
        ignores_rest=True,
    ),
    Variant(
        "StudioGAN", ("SelfAttention", "Self_Attn"), "conv1x1_theta", "conv1x1_phi", "conv1x1_g", "conv1x1_attn",
        gamma="sigma", pool=True, ignores_rest=True,
    ),
    Variant(
        "voletiv", ("Self_Attn",), "snconv1x1_theta", "snconv1x1_phi", "snconv1x1_g", "snconv1x1_attn",
        gamma="sigma", pool=True,
    ),
    Variant(
        "pretrained-BigGAN", ("SelfAttn",), "snconv1x1_theta", "snconv1x1_phi", "snconv1x1_g", "snconv1x1_o_conv",
        pool=True,
    ),
    replace(_BY_CONV, name="heykeetae", classes=("Self_Attn",), returns_map=True),
    _BY_CONV,
    # the words cross over: what these hosts call key has a row of weights for every output position
    Variant("rosinality and fastai", ("SelfAttention",), query="key", key="query", value="value"),
    Variant(
        "torchgan", ("SelfAttention2d",), "query", "key", "value", normalize="queries", map_flag="return_attn"
    ),
    Variant("timm", ("NonLocalAttn",), "t", "p", "g", "z", gamma=None, scale="scale", after="norm"),
)  # fmt: skip


@dataclass(frozen=True)
class NotOurs:
    """A module that is called attention and computes something else, with the reason to give."""

    classes: tuple[str, ...]
    attributes: tuple[str, ...]
    reason: str


NOT_OURS = (
    NotOurs(
        ("LinearAttention",), ("to_q", "to_kv", "to_out"),
        "linear attention (lucidrains): softmax over channels and over positions apart; there is no map to save",
    ),
    NotOurs(("CAM_Module",), ("gamma",), "channel attention (DANet): its map is (C, C), not over positions"),
    NotOurs(
        ("SelfAttentionPost",), ("h", "i", "gamma"),
        "half a layer (christiancosgrove): takes a map that another module stores and that several may share",
    ),
    NotOurs(
        ("SelfAttention",), ("f", "g", "attention_size"),
        "half a layer (christiancosgrove): returns the map itself, for other modules",
    ),
    NotOurs(("BilinearAttnTransform", "BatNonLocalAttn"), (), "bilinear attention (timm): no softmax over positions"),
    NotOurs(("MultiheadAttention",), ("in_proj_weight",), "multi-head attention, with kernels of PyTorch's own"),
)  # fmt: skip

WEIGHT_METHODS = ("W_", "sn_weights", "sn_weight")
"""Methods by which a host's own convolution computes the weight it uses: BigGAN-PyTorch, mimicry, mmgeneration."""
