"""SAGAN self-attention as functions: the attention product, and the whole layer around it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sagan_kernels import reference
from sagan_kernels.ops.dispatch import Impl, choose


def attention(query: Tensor, key: Tensor, value: Tensor, *, impl: Impl | None = None) -> Tensor:
    """softmax(query keyᵀ) value, unscaled, normalized over key positions.

    Args:
        query: (B, L, E), any strides.
        key: (B, S, E).
        value: (B, S, Ev); Ev may differ from E.
        impl: "torch", "reference", or None to choose.

    Returns:
        (B, L, Ev) in the dtype of `value`.

    Raises:
        ValueError: the shapes do not fit together.

    Gradients: of every order, so gradient penalties (R1, WGAN-GP) work. Where a gradient is wanted the (B, L, S)
    map is stored; without one (`torch.no_grad`) it is not.

    Source: SAGAN, arXiv:1805.08318, equations 1 and 2.
    """
    _check(query, key, value)
    if choose(impl, query) == "reference" or _wants_grad(query, key, value):
        return reference.attention(query, key, value)
    # SDPA has a fused CPU and GPU path for equal widths only, and 1/√E must be switched off
    E, Ev = query.shape[2], value.shape[2]
    width = max(E, Ev)
    query, key, value = (
        F.pad(t.contiguous(), (0, width - t.shape[2])).unsqueeze(1) for t in (query, key, value)
    )
    return F.scaled_dot_product_attention(query, key, value, scale=1.0).squeeze(1)[..., :Ev]


def sagan_attention(
    x: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    out_weight: Tensor,
    gamma: Tensor,
    *,
    impl: Impl | None = None,
) -> Tensor:
    """The whole SAGAN layer: x + gamma · out(attention(query(x), pool(key(x)), pool(value(x)))).

    Args:
        x: (B, C, H, W), H and W at least 2.
        query_weight: (E, C, 1, 1).
        key_weight: (E, C, 1, 1).
        value_weight: (Ev, C, 1, 1).
        out_weight: (C, Ev, 1, 1).
        gamma: one element; at 0 the layer is the identity.
        impl: "torch", "reference", or None to choose.

    Returns:
        (B, C, H, W), a fresh tensor: an in-place ReLU may follow.

    Raises:
        ValueError: x is not 4-D.

    Gradients: of every order, for x, the weights and gamma.

    Source: the authors' released code, as in BigGAN; formula in `reference.sagan_attention`.
    """
    if x.ndim != 4 or min(x.shape[2:]) < 2:
        raise ValueError(
            f"sagan_attention: x must be (B, C, H, W) with H and W at least 2, got {tuple(x.shape)}"
        )
    if choose(impl, x) == "reference":
        return reference.sagan_attention(x, query_weight, key_weight, value_weight, out_weight, gamma)
    query = reference.positions(F.conv2d(x, query_weight))  # (B, L, E)
    key = reference.positions(F.max_pool2d(F.conv2d(x, key_weight), 2))  # (B, S, E)
    value = reference.positions(F.max_pool2d(F.conv2d(x, value_weight), 2))  # (B, S, Ev)
    o = attention(query, key, value, impl=impl)  # (B, L, Ev)
    return torch.addcmul(x, gamma, F.conv2d(o.mT.unflatten(2, x.shape[2:]), out_weight))


def _wants_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.ndim == key.ndim == value.ndim == 3:
        raise ValueError(f"attention: query, key and value must be 3-D, got {shapes}")
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError(f"attention: batch sizes must be equal, got {shapes}")
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"attention: query and key must have the same width E, got {shapes}")
    if key.shape[1] != value.shape[1]:
        raise ValueError(f"attention: key and value must have the same length S, got {shapes}")
