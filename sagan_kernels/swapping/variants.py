"""How other code bases write the attention layer: names and roles. Data only; no host is imported.

Roles are the mathematics', not the host's words. The query has a row of weights for every output position; the key
gives the positions that are looked at. What some hosts call `query` plays the key, and the other way round.
"""

from dataclasses import dataclass

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


_SHORT = {"query": "theta", "key": "phi", "value": "g", "out": "o", "pool": True}
_CONVS = {"query": "query_conv", "key": "key_conv", "value": "value_conv"}
_CROSSED = {"query": "key", "key": "query", "value": "value"}  # the host's words mean the other role

VARIANTS = (
    Variant("BigGAN-PyTorch", ("Attention",), **_SHORT, ignores_rest=True),
    Variant("mimicry", ("SelfAttention",), **_SHORT),
    Variant("fastai, pooled", ("PooledSelfAttention2d",), **_SHORT),
    Variant(
        "BigGAN-PyTorch, TFHub", ("SelfAttention",),
        query="theta", key="phi", value="g", out="o_conv", pool=True,
    ),
    Variant(
        "mmgeneration", ("SelfAttentionBlock",),
        query="theta.conv", key="phi.conv", value="g.conv", out="o.conv", pool=True, ignores_rest=True,
    ),
    Variant(
        "StudioGAN", ("SelfAttention", "Self_Attn"),
        query="conv1x1_theta", key="conv1x1_phi", value="conv1x1_g", out="conv1x1_attn", gamma="sigma", pool=True,
        ignores_rest=True,
    ),
    Variant(
        "voletiv", ("Self_Attn",),
        query="snconv1x1_theta", key="snconv1x1_phi", value="snconv1x1_g", out="snconv1x1_attn", gamma="sigma",
        pool=True,
    ),
    Variant(
        "pretrained-BigGAN", ("SelfAttn",),
        query="snconv1x1_theta", key="snconv1x1_phi", value="snconv1x1_g", out="snconv1x1_o_conv", pool=True,
    ),
    Variant("heykeetae", ("Self_Attn",), **_CONVS, returns_map=True),
    Variant("query_conv", ("SelfAttention", "PAM_Module", "Self_Attn"), **_CONVS),
    Variant("rosinality and fastai", ("SelfAttention",), **_CROSSED),
    Variant(
        "torchgan", ("SelfAttention2d",),
        query="query", key="key", value="value", normalize="queries", map_flag="return_attn",
    ),
    Variant(
        "timm", ("NonLocalAttn",),
        query="t", key="p", value="g", out="z", gamma=None, scale="scale", after="norm",
    ),
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
    NotOurs(("MultiheadAttention",), ("in_proj_weight", "out_proj"), "multi-head attention, with kernels of PyTorch's own"),
)  # fmt: skip

WEIGHT_METHODS = ("W_", "sn_weights", "sn_weight")
"""Methods by which a host's own convolution computes the weight it uses: BigGAN-PyTorch, mimicry, mmgeneration."""
