"""SAGAN self-attention as functions: the attention product, and the whole layer around it."""

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from sagan_kernels import reference
from sagan_kernels.ops import attention_tiles, configs
from sagan_kernels.ops.attention_autograd import attention_and_lse, attention_over_queries
from sagan_kernels.ops.direct import differentiated, transformed
from sagan_kernels.ops.dispatch import Impl, choose
from sagan_kernels.ops.sagan_layer import mix, project_pool, sagan_forward

Positions = Literal["keys", "queries"]


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, normalize: Positions = "keys", impl: Impl | None = None
) -> Tensor:
    """softmax(query keyᵀ) value, unscaled, without storing the attention map.

    Args:
        query: (B, L, E), any strides: NCHW and NHWC feature maps are read in place.
        key: (B, S, E).
        value: (B, S, Ev); Ev may differ from E.
        normalize: the positions over which the weights sum to 1. "keys" is SAGAN's; with "queries" the softmax runs
            over L, as in torchgan: softmax(key queryᵀ)ᵀ value.
        impl: "triton", "torch", "reference", or None to choose by device.

    Returns:
        (B, L, Ev), in the dtype of the inputs, or autocast's. Sums are kept in float32, or float64 for float64.

    Raises:
        TypeError: a tensor is not floating-point, or is a DTensor.
        ValueError: shapes, dtypes or devices do not fit together, or `normalize` is no such word.
        NotImplementedError: `impl` cannot run here, or E is over 256 with "triton"; on the third derivative.

    Gradients: first and second order, so gradient penalties (R1, WGAN-GP) work, in O(L + S) memory but for maps of
    4 MiB or less on a CPU, which are stored. Forward mode works, and over or under one reverse pass, except in reverse
    over forward with normalize="queries", and forward over forward, which raise as third order does. Within
    `torch.compile`, `torch.func` and forward mode take the formula, in O(L S) memory, or raise where `impl` is given.
    impl="reference" has every order.

    Source: SAGAN, arXiv:1805.08318, equations 1 and 2; torchgan's normalization from its released code.
    """
    _check(query, key, value)
    if normalize not in ("keys", "queries"):
        raise ValueError(f"attention: normalize must be 'keys' or 'queries', got {normalize!r}")
    if _autocasts(query.device.type):
        query, key, value = _autocast(query), _autocast(key), _autocast(value)
    if not query.dtype == key.dtype == value.dtype:
        dtypes = {query.dtype, key.dtype, value.dtype}
        raise ValueError(f"attention: tensors must have one dtype, got {_listed(dtypes)}")
    out, saved = _attention(query, key, value, normalize, _choose(impl, query, query.shape[2]))
    # backward reads out: what the caller may modify in place must be another tensor
    return out.clone() if saved else out


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
    normalize: Positions = "keys",
    impl: Impl | None = None,
) -> Tensor:
    """The whole SAGAN layer: x + gamma · out(attention(query(x), pool(key(x)), pool(value(x)))).

    Args:
        x: (B, C, H, W), NCHW or NHWC; H and W at least 2 with `pool`.
        query_weight: (E, C, 1, 1); this and the other weights may also be (E, C) or (E, C, 1).
        key_weight: (E, C, 1, 1).
        value_weight: (Ev, C, 1, 1).
        out_weight: (C, Ev, 1, 1), or None for no out projection, as in the paper's text; then Ev = C.
        gamma: one element; at 0 the layer is the identity.
        query_bias: (E,) or None.
        key_bias: (E,) or None.
        value_bias: (Ev,) or None.
        out_bias: (C,) or None.
        pool: halve the key and value positions by a 2×2 max-pool, as the released code does; odd H, W are floored.
        normalize: "keys" or "queries", as in `attention`.
        impl: "triton", "torch", "reference", or None to choose by device.

    Returns:
        (B, C, H, W), a fresh tensor: an in-place ReLU may follow.

    Raises:
        TypeError: a tensor is not floating-point, or is a DTensor.
        ValueError: a shape, dtype or device does not fit x.
        NotImplementedError: `impl` cannot run here; on the third derivative.

    Gradients: first and second order, for x, the weights, the biases and gamma.

    Source: the authors' released code, as in BigGAN; formula in `reference.sagan_attention`.
    """
    _check_layer(x, pool, normalize)
    C = x.shape[1]
    for name, weight in (("query_weight", query_weight), ("value_weight", value_weight)):
        if weight.ndim < 2:
            raise ValueError(f"sagan_attention: {name} must be (E, C, 1, 1), got {tuple(weight.shape)}")
    E, Ev = query_weight.shape[0], value_weight.shape[0]
    dtype, device = x.dtype, x.device
    for name, tensor, shape in (
        ("query_weight", query_weight, (E, C, 1, 1)),
        ("key_weight", key_weight, (E, C, 1, 1)),
        ("value_weight", value_weight, (Ev, C, 1, 1)),
        ("out_weight", out_weight, (C, Ev, 1, 1)),
        ("query_bias", query_bias, (E,)),
        ("key_bias", key_bias, (E,)),
        ("value_bias", value_bias, (Ev,)),
        ("out_bias", out_bias, (C,)),
        ("gamma", gamma, gamma.shape),
    ):
        # checks take a good part of a small layer's time on a CPU, and nearly all pass at the first look
        if tensor is not None and not (
            type(tensor) in (Tensor, Parameter)
            and tensor.dtype == dtype
            and tensor.device == device
            and tensor.shape == shape
        ):
            _check_weight(x, name, tensor, shape)
    if out_weight is None and Ev != C:
        raise ValueError(f"sagan_attention: without out_weight value_weight must be (C, C), got {(Ev, C)}")
    if out_weight is None and out_bias is not None:
        raise ValueError(
            "sagan_attention: out_bias needs an out_weight, got None; leave both out or give both"
        )
    if gamma.numel() != 1:
        raise ValueError(f"sagan_attention: gamma must have one element, got {tuple(gamma.shape)}")
    gamma = gamma.reshape(()) if gamma.ndim else gamma
    query_weight, key_weight, value_weight = (
        w if w.ndim == 4 else w.reshape(*w.shape[:2], 1, 1) for w in (query_weight, key_weight, value_weight)
    )
    if out_weight is not None and out_weight.ndim < 4:
        out_weight = out_weight.reshape(C, Ev, 1, 1)
    chosen = _choose(impl, x, E)
    if chosen == "reference":
        return reference.sagan_attention(
            x, query_weight, key_weight, value_weight, out_weight, gamma,
            query_bias=query_bias, key_bias=key_bias, value_bias=value_bias, out_bias=out_bias,
            pool=pool, normalize=normalize,
        )  # fmt: skip
    # at batch 1, unpooled, or over few channels the convolutions are as fast or faster
    if (
        chosen == "torch"
        and x.device.type == "cpu"
        and pool
        and x.shape[0] > 1
        and C >= 32
        and not _is_wide_and_small(x)
        and dtype != torch.float16  # whose products with a small gamma vanish
        and not torch.is_autocast_enabled("cpu")
    ):
        return _layer_by_matrices(
            x, query_weight, key_weight, value_weight, out_weight, gamma,
            query_bias, key_bias, value_bias, out_bias, normalize,
        )  # fmt: skip
    if chosen == "triton":
        return _layer_by_kernels(
            x, query_weight, key_weight, value_weight, out_weight, gamma,
            query_bias, key_bias, value_bias, out_bias, pool, normalize,
        )  # fmt: skip
    key, value = F.conv2d(x, key_weight, key_bias), F.conv2d(x, value_weight, value_bias)
    if pool:
        key, value = F.max_pool2d(key, 2), F.max_pool2d(value, 2)
    query, key, value = F.conv2d(x, query_weight, query_bias).flatten(2), key.flatten(2), value.flatten(2)
    L, S = query.shape[2], key.shape[2]
    if chosen == "torch" and normalize == "keys" and _at_once(x.shape[0], L, S, query, key, value):
        o = attention_tiles.whole_maps(query, key, value)
    else:
        o = _attention(query.mT, key.mT, value.mT, normalize, chosen, lies_as_value=True)[0].mT
    o = o.reshape(x.shape[0], Ev, *x.shape[2:])
    return torch.addcmul(x, gamma, o if out_weight is None else F.conv2d(o, out_weight, out_bias))


def _layer_by_kernels(
    x: Tensor, query_weight: Tensor, key_weight: Tensor, value_weight: Tensor, out_weight: Tensor | None,
    gamma: Tensor, query_bias: Tensor | None, key_bias: Tensor | None, value_bias: Tensor | None,
    out_bias: Tensor | None, pool: bool, normalize: Positions,
) -> Tensor:  # fmt: skip
    """The layer on a GPU: its second half in one kernel where no derivative is asked for and the widths allow it."""
    C, E, Ev = x.shape[1], query_weight.shape[0], value_weight.shape[0]
    maps = _autocast(x)
    fused = (
        out_weight is not None
        and normalize == "keys"
        and maps.dtype == x.dtype  # under autocast x itself may be wider, and so may the sum with it
        and x.numel()
        and x.stride(2) == x.shape[3] * x.stride(3)
        and configs.layer_tiling(C, E, Ev, configs.arithmetic(x), configs.architecture(x.device)) is not None
        and not differentiated(
            x, query_weight, key_weight, value_weight, out_weight, gamma,
            query_bias, key_bias, value_bias, out_bias,
        )
    )  # fmt: skip
    projections, widths = [(key_weight, key_bias), (value_weight, value_bias)], [E, Ev]
    if not (pool or fused):
        projections, widths = [(query_weight, query_bias), *projections], [E, *widths]
    weight, bias = _stacked(*projections)
    rows = (
        project_pool(maps, _autocast(weight.flatten(1)), None if bias is None else _autocast(bias))
        if pool
        else _projected(maps, weight, bias)
    )
    *queries, key, value = _columns(rows, widths)
    if fused:
        assert out_weight is not None
        query_weight, out_weight = _autocast(query_weight.flatten(1)), _autocast(out_weight.flatten(1))
        query_bias, out_bias = (b if b is None else _autocast(b) for b in (query_bias, out_bias))
        return sagan_forward(x, query_weight, query_bias, key, value, out_weight, out_bias, gamma)
    query = queries[0] if queries else _projected(maps, query_weight, query_bias)
    o, _ = _attention(query, key, value, normalize, "triton", lies_as_value=True)
    return _residual(x, o.mT, out_weight, out_bias, gamma)


def _projected(maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1×1 convolution, positions first: (B, C, H, W) -> (B, L, K)."""
    rows = mix(_autocast(weight.flatten(1)), maps.flatten(2)).mT
    return rows if bias is None else rows + _autocast(bias)


def _residual(
    x: Tensor, o: Tensor, out_weight: Tensor | None, out_bias: Tensor | None, gamma: Tensor
) -> Tensor:
    """X + gamma · (out_weight o + out_bias) for o (B, Ev, L)."""
    if out_weight is None:
        return torch.addcmul(x, gamma, o.unflatten(2, x.shape[2:]))
    weight = out_weight.flatten(1)
    # under autocast x may be wider than the products, and so may the sum with it; in float16 gamma · weight vanishes
    # for a small gamma
    if x.dtype == torch.float16 or _autocasts(x.device.type):
        y = mix(_autocast(weight), o)
        y = y if out_bias is None else y + _autocast(out_bias)[:, None]
        return torch.addcmul(x, gamma, y.unflatten(2, x.shape[2:]))
    # the product adds x itself
    maps, weight = x.flatten(2), (gamma * weight).expand(x.shape[0], -1, -1)
    if maps.stride(1) == 1 and maps.stride(2) != 1:
        y = torch.baddbmm(maps.mT, o.mT, weight.mT).mT
    else:
        y = torch.baddbmm(maps, weight, o)
    y = y.unflatten(2, x.shape[2:])
    return y if out_bias is None else y + (gamma * out_bias)[:, None, None]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    normalize: Positions,
    impl: Impl,
    *,
    lies_as_value: bool = False,
) -> tuple[Tensor, bool]:
    """Attention by the implementation chosen, and whether the backward pass reads it again.

    A result that is read again must not be modified in place. `lies_as_value` allows strides as in `value`.
    """
    (B, L, _), S = query.shape, key.shape[1]
    if impl == "reference" or 0 in (B, L, S, *value.shape):
        return reference.attention(query, key, value, normalize=normalize), False
    if impl == "torch" and normalize == "keys" and _at_once(B, L, S, query, key, value):
        return attention_tiles.whole(query, key, value), False
    if impl == "torch" and not torch.compiler.is_compiling() and not differentiated(query, key, value):
        # without the operators around them: at batch 1 those take a tenth of the time
        if normalize == "keys":
            return attention_tiles.forward(query, key, value, lies_as_value=lies_as_value), False
        return attention_tiles.over_queries(query, key, value), False
    if impl == "torch" and normalize == "queries" and _stores_map(B, L, S) and not transformed():
        return reference.attention(query, key, value, normalize=normalize), False
    if normalize == "queries":
        return attention_over_queries(query, key, value, impl), False
    out = attention_and_lse(query, key, value, impl)[0]
    return out, out.requires_grad


def _at_once(B: int, L: int, S: int, *tensors: Tensor) -> bool:
    """Whether computing the map as a whole is the fastest way on a CPU; not for tensors without elements."""
    if not torch.compiler.is_compiling() and not differentiated(*tensors):
        at_once = attention_tiles.is_one_tile(B, L, S, *(tensor.dtype for tensor in tensors))
    else:
        at_once = _stores_map(B, L, S) and not transformed()
    return at_once and all(tensor.numel() for tensor in tensors)


def _is_wide_and_small(x: Tensor) -> bool:
    """Whether convolutions are faster on a CPU than products: oneDNN's are from 16 images on, measured with AVX-512."""
    if torch.compiler.is_compiling():  # where sizes may be free
        return False
    B, C, H, W = x.shape
    return B >= 16 and C >= 192 and H * W <= 256


def _layer_by_matrices(
    x: Tensor, query_weight: Tensor, key_weight: Tensor, value_weight: Tensor, out_weight: Tensor | None,
    gamma: Tensor, query_bias: Tensor | None, key_bias: Tensor | None, value_bias: Tensor | None,
    out_bias: Tensor | None, normalize: Positions,
) -> Tensor:  # fmt: skip
    """The pooled layer on a CPU: one product for all projections, positions first, where the max-pool is vectorized."""
    (B, _, H, W), E, Ev = x.shape, query_weight.shape[0], value_weight.shape[0]
    rows = reference.positions(x)  # (B, L, C)
    weight = torch.cat([w.flatten(1) for w in (query_weight, key_weight, value_weight)])
    projected = torch.bmm(rows, weight.mT.expand(B, -1, -1))  # (B, L, 2E + Ev)
    if any(b is not None for b in (query_bias, key_bias, value_bias)):
        biases = zip((query_bias, key_bias, value_bias), (E, E, Ev), strict=True)
        projected = projected + torch.cat([x.new_zeros(n) if b is None else b for b, n in biases])
    query, key_value = projected.split([E, E + Ev], -1)
    key_value = reference.positions(F.max_pool2d(key_value.mT.unflatten(2, (H, W)), 2))
    key, value = key_value.split([E, Ev], -1)
    o, _ = _attention(query, key, value, normalize, "torch")  # (B, L, Ev)
    if out_weight is None:
        return torch.addcmul(x, gamma, o.mT.unflatten(2, (H, W)))
    mixing = (gamma * out_weight.flatten(1)).expand(B, -1, -1)  # (B, C, Ev)
    if x.is_contiguous():
        y = torch.baddbmm(x.flatten(2), mixing, o.mT).view(x.shape)
    else:
        y = torch.baddbmm(rows, o, mixing.mT).mT.unflatten(2, (H, W))
    return y if out_bias is None else y + (gamma * out_bias)[:, None, None]


def _stores_map(B: int, L: int, S: int) -> bool:
    """`attention_tiles.stores_map`, where a free size of an exported program is taken for a large one."""
    stored = attention_tiles.stores_map(B, L, S)
    if not torch.compiler.is_compiling():
        return stored
    from torch.fx.experimental.symbolic_shapes import (
        statically_known_true,
    )  # sympy takes half a second to load

    return statically_known_true(stored)


def _choose(impl: Impl | None, tensor: Tensor, E: int) -> Impl:
    """The implementation for keys of width E and the dtype that autocast gives `tensor`."""
    chosen = choose(impl, _autocast(tensor[:0]) if _autocasts(tensor.device.type) else tensor)
    reason = None
    if chosen == "triton" and E > 256:
        reason, instead = f"the kernels hold keys of width 256 at most, got E {E}", "torch"
    elif chosen != "reference" and torch.compiler.is_compiling() and transformed():
        # an operator in a traced program carries no tangent, and says nothing
        reason, instead = "within torch.compile, torch.func and forward mode have no kernels", "reference"
    if reason is None:
        return chosen
    if impl is not None:
        raise NotImplementedError(f"impl={impl!r}: {reason}; leave impl=None to use {instead!r}")
    return cast(Impl, instead)


def _stacked(*projections: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """One weight, and one bias where any has one, for several projections."""
    weight = torch.cat([w for w, _ in projections])
    if all(b is None for _, b in projections):
        return weight, None
    return weight, torch.cat([w.new_zeros(w.shape[0]) if b is None else b for w, b in projections])


def _columns(rows: Tensor, widths: list[int]) -> list[Tensor]:
    """Parts (B, S, width) of (B, S, K), whose gradients are joined in the layout that `rows` has."""
    if rows.stride(1) == 1 and rows.stride(2) != 1:
        return [part.mT for part in rows.mT.split(widths, 1)]
    return list(rows.split(widths, -1))


def _autocasts(device: str) -> bool:
    """Whether autocast is on for a kind of device; PyTorch refuses the question for tensors without data."""
    return device != "meta" and torch.is_autocast_enabled(device)


def _autocast(tensor: Tensor) -> Tensor:
    """The tensor in autocast's dtype where it is on, as a convolution would take it."""
    device = tensor.device.type
    if not _autocasts(device) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    # nearly all pass at the first look, and a small product takes no longer than the others
    kinds = (Tensor, Parameter)
    if type(query) in kinds and type(key) in kinds and type(value) in kinds and query.ndim == key.ndim == 3:
        (B, _, E), (_, S, _) = query.shape, key.shape
        if (
            query.is_floating_point()
            and query.dtype == key.dtype == value.dtype
            and query.device == key.device == value.device
            and key.shape == (B, S, E)
            and value.ndim == 3
            and value.shape[:2] == (B, S)
        ):
            return
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_kind("attention", name, tensor)

    def got() -> str:
        return ", ".join(
            f"{name} {tuple(t.shape)}" for name, t in (("query", query), ("key", key), ("value", value))
        )

    if not query.ndim == key.ndim == value.ndim == 3:
        raise ValueError(f"attention: query, key and value must be 3-D, got {got()}")
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError(f"attention: batch sizes must be equal, got {got()}")
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"attention: query and key must have the same width E, got {got()}")
    if key.shape[1] != value.shape[1]:
        raise ValueError(f"attention: key and value must have the same length S, got {got()}")
    if not query.device == key.device == value.device:
        devices = {query.device, key.device, value.device}
        raise ValueError(f"attention: tensors must be on one device, got {_listed(devices)}")


def _check_layer(x: Tensor, pool: bool, normalize: Positions) -> None:
    _check_kind("sagan_attention", "x", x)
    least = 2 if pool else 1
    if x.ndim != 4 or min(x.shape[2:]) < least:
        raise ValueError(
            f"sagan_attention: x must be (B, C, H, W) with H and W at least {least}, got {tuple(x.shape)}"
        )
    if normalize not in ("keys", "queries"):
        raise ValueError(f"sagan_attention: normalize must be 'keys' or 'queries', got {normalize!r}")


def _check_weight(x: Tensor, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    _check_kind("sagan_attention", name, tensor)
    rest = shape[tensor.ndim :] if len(shape) == 4 and tensor.ndim > 1 else ()
    if tensor.shape + rest != torch.Size(
        shape
    ):  # not as tuples: a free size of a traced program compares as itself
        raise ValueError(
            f"sagan_attention: {name} must be {shape} for x {tuple(x.shape)}, got {tuple(tensor.shape)}"
        )
    if tensor.device != x.device:
        raise ValueError(f"sagan_attention: {name} must be on {x.device} as x is, got {tensor.device}")
    if tensor.dtype != x.dtype and not _autocasts(x.device.type):
        raise ValueError(f"sagan_attention: {name} must be {x.dtype} as x is, got {tensor.dtype}")


def _check_kind(where: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{where}: {name} must be floating-point, got {tensor.dtype}")
    if type(tensor).__name__ == "DTensor":
        raise TypeError(
            f"{where}: {name} must be a plain tensor, got a DTensor; gather it first with full_tensor()"
        )


def _listed(things: set[torch.device] | set[torch.dtype]) -> str:
    return " and ".join(sorted(str(thing) for thing in things))
