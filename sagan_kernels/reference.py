"""The mathematics in plain PyTorch: the specification every fast path is tested against.

Written to be read and to be right in float64, not to be fast: the attention map is stored, nothing is fused,
and every formula is differentiable to any order by autograd.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(query: Tensor, key: Tensor, value: Tensor, *, normalize: str = "keys") -> Tensor:
    """softmax(query keyᵀ) value, unscaled.

    Args:
        query: (B, L, E).
        key: (B, S, E).
        value: (B, S, Ev).
        normalize: "keys", the softmax runs over S, or "queries", over L.

    Returns:
        (B, L, Ev).

    Source: SAGAN, arXiv:1805.08318, equations 1 and 2 (no 1/√E, unlike arXiv:1706.03762); "queries" is what
    torchgan's released layer computes.
    """
    return torch.softmax(query @ key.mT, dim=-1 if normalize == "keys" else -2) @ value


def sagan_attention(
    x: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    out_weight: Tensor | None,
    gamma: Tensor,
    *,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    out_bias: Tensor | None = None,
    pool: bool = True,
    normalize: str = "keys",
) -> Tensor:
    """X + gamma · out(attention(query(x), pool(key(x)), pool(value(x)))), all projections 1×1 convolutions.

    Args:
        x: (B, C, H, W).
        query_weight: (E, C, 1, 1).
        key_weight: (E, C, 1, 1).
        value_weight: (Ev, C, 1, 1).
        out_weight: (C, Ev, 1, 1), or None for no out projection.
        gamma: one element.
        query_bias: (E,) or None.
        key_bias: (E,) or None.
        value_bias: (Ev,) or None.
        out_bias: (C,) or None.
        pool: 2×2 max-pool of keys and values.
        normalize: "keys" or "queries".

    Returns:
        (B, C, H, W).

    Source: the authors' released code (2×2 max-pooled keys and values, an out projection), as in BigGAN;
    the paper's first version has neither. H and W are halved by flooring, as `max_pool2d` does.
    """
    query = F.conv2d(x, query_weight, query_bias)
    key = F.conv2d(x, key_weight, key_bias)
    value = F.conv2d(x, value_weight, value_bias)
    if pool:
        key, value = F.max_pool2d(key, 2), F.max_pool2d(value, 2)
    o = attention(positions(query), positions(key), positions(value), normalize=normalize)
    o = o.mT.unflatten(2, x.shape[2:])
    return x + gamma * (o if out_weight is None else F.conv2d(o, out_weight, out_bias))


def positions(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H·W, C), a view."""
    return x.flatten(2).mT


def upsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 3×3 convolution, zero-padded, of x enlarged twice by nearest neighbor.

    Args:
        x: (B, C, H, W).
        weight: (K, C, 3, 3).
        bias: (K,) or None.

    Returns:
        (B, K, 2H, 2W).
    """
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)


def conv2d_avg_pool(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The 2×2 average pool of a 3×3 convolution, zero-padded.

    Args:
        x: (B, C, H, W).
        weight: (K, C, 3, 3).
        bias: (K,) or None.

    Returns:
        (B, K, ⌊H/2⌋, ⌊W/2⌋).
    """
    return F.avg_pool2d(F.conv2d(x, weight, bias, padding=1), 2)
