"""The mathematics in plain PyTorch: the specification every fast path is tested against.

Written to be read and to be right in float64, not to be fast: the attention map is stored, nothing is fused,
and every formula is differentiable to any order by autograd.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query keyᵀ) value, unscaled, normalized over key positions.

    Args:
        query: (B, L, E).
        key: (B, S, E).
        value: (B, S, Ev).

    Returns:
        (B, L, Ev).

    Source: SAGAN, arXiv:1805.08318, equations 1 and 2 (no 1/√E, unlike arXiv:1706.03762).
    """
    return torch.softmax(query @ key.mT, dim=-1) @ value


def sagan_attention(
    x: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    out_weight: Tensor,
    gamma: Tensor,
) -> Tensor:
    """X + gamma · out(attention(query(x), pool(key(x)), pool(value(x)))), all projections 1×1 convolutions.

    Args:
        x: (B, C, H, W).
        query_weight: (E, C, 1, 1).
        key_weight: (E, C, 1, 1).
        value_weight: (Ev, C, 1, 1).
        out_weight: (C, Ev, 1, 1).
        gamma: one element.

    Returns:
        (B, C, H, W).

    Source: the authors' released code (2×2 max-pooled keys and values, an out projection), as in BigGAN;
    the paper's text has neither. H and W are halved by flooring, as `max_pool2d` does.
    """
    query = positions(F.conv2d(x, query_weight))
    key = positions(F.max_pool2d(F.conv2d(x, key_weight), 2))
    value = positions(F.max_pool2d(F.conv2d(x, value_weight), 2))
    o = attention(query, key, value)
    return x + gamma * F.conv2d(o.mT.unflatten(2, x.shape[2:]), out_weight)


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
