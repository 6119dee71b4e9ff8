"""Launches of the attention kernels: outputs, strides, tile sizes and grids. No checks, no gradients.

Values wider than a kernel holds are cut into parts. Attention is linear in them, so the parts of out are independent
and the gradients of query and key are sums over the parts.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sagan_kernels.ops import configs
from sagan_kernels.ops.launching import Arguments, launch


def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Out (B, L, Ev) and lse (B, 2, L), whose sum over 2 is the base-2 log-sum-exp of the scores."""
    from sagan_kernels.kernels.attention_forward import attention_forward_kernel

    out = empty_like_rows(query, value)
    lse = query.new_empty(query.shape[0], 2, query.shape[1], dtype=_sum_dtype(query))
    for part in _value_parts(("forward",), query, value):
        tensors = (query, key, _cut(value, part), _cut(out, part))
        pointers = (*tensors, lse)
        _launch(attention_forward_kernel, "forward", pointers, tensors, "rows")
    return out, lse


def over_queries(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Out (B, L, Ev) = Pᵀ value, where P (B, S, L) = softmax(key queryᵀ)."""
    from sagan_kernels.kernels.attention_forward import attention_lse_kernel, attention_over_queries_kernel

    lse = key.new_empty(key.shape[0], 2, key.shape[1], dtype=_sum_dtype(key))
    _launch(attention_lse_kernel, "lse", (key, query, lse), (key, query), "rows")
    out = empty_like_rows(query, value)
    for part in _value_parts(("over_queries",), query, value):
        tensors = (query, key, _cut(value, part), _cut(out, part))
        _launch(
            attention_over_queries_kernel, "over_queries", (*tensors[:3], lse, tensors[3]), tensors, "rows"
        )
    return out


def backward(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of <out, grad> for query, key and value."""
    from sagan_kernels.kernels.attention_backward import (
        attention_backward_column_kernel,
        attention_backward_row_kernel,
    )

    delta = lse.new_empty(query.shape[:2])
    lse = lse.contiguous()  # under vmap it may be expanded
    grad_value = torch.empty_like(value)
    sums_query: list[Tensor] = []
    sums_key: list[Tensor] = []
    for part in _value_parts(("row", "column"), query, value):
        q, k, v, o, g = query, key, _cut(value, part), _cut(out, part), _cut(grad, part)
        dq, dk, dv = _empty_term(q, part), _empty_term(k, part), _cut(grad_value, part)
        splits = _splits("column", q, v)
        _launch(
            attention_backward_row_kernel, "row", (q, k, v, o, lse, g, dq, delta), (q, k, v, o, g, dq), "rows"
        )
        parts = _split(dk, splits), _split(dv, splits)
        _launch(
            attention_backward_column_kernel, "column", (q, k, v, lse, delta, g, *parts), (q, k, v, g, *parts),
            "cols", splits,
        )  # fmt: skip
        _join(parts, (dk, dv), splits)
        sums_query.append(dq)
        sums_key.append(dk)
    return _sum(sums_query, query), _sum(sums_key, key), grad_value


def double_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    grad_query: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of <grad_query, a> + <grad_key, b> + <grad_value, c> for query, key, value and grad."""
    from sagan_kernels.kernels.attention_double_backward import (
        attention_double_backward_column_kernel,
        attention_double_backward_row_kernel,
    )

    delta, r, x_sum = (lse.new_empty(query.shape[:2]) for _ in range(3))
    lse = lse.contiguous()
    value2, grad2 = torch.empty_like(value), empty_like_rows(query, value)
    sums_query: list[Tensor] = []
    sums_key: list[Tensor] = []
    for part in _value_parts(("double_row", "double_column"), query, value):
        q, k, (v, o, g, c_part) = query, key, (_cut(t, part) for t in (value, out, grad, c))
        q2, k2 = _empty_term(q, part), _empty_term(k, part)
        v2, g2 = _cut(value2, part), _cut(grad2, part)
        # r · grad_query is counted once: grad_query is the sum over the parts
        dq = torch.zeros_like(grad_query) if sums_query else grad_query
        _launch(
            attention_double_backward_row_kernel,
            "double_row",
            (q, k, v, o, lse, g, dq, a, b, c_part, q2, g2, delta, r, x_sum),
            (q, k, v, o, g, dq, a, b, c_part, q2, g2),
            "rows",
        )
        splits = _splits("double_column", q, v)
        parts = _split(k2, splits), _split(v2, splits)
        _launch(
            attention_double_backward_column_kernel,
            "double_column",
            (q, k, v, lse, delta, r, x_sum, g, a, b, c_part, *parts),
            (q, k, v, g, a, b, c_part, *parts),
            "cols",
            splits,
        )
        _join(parts, (k2, v2), splits)
        sums_query.append(q2)
        sums_key.append(k2)
    return _sum(sums_query, query), _sum(sums_key, key), value2, grad2


def tangent(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, a: Tensor, b: Tensor, c: Tensor
) -> Tensor:
    """The derivative of out along a, b, c, the directions of query, key and value."""
    from sagan_kernels.kernels.attention_double_backward import attention_tangent_kernel

    lse = lse.contiguous()
    result = empty_like_rows(query, value)
    for part in _value_parts(("tangent",), query, value):
        v, o, c_part, moved = (_cut(t, part) for t in (value, out, c, result))
        tensors = (query, key, v, o, a, b, c_part, moved)
        _launch(attention_tangent_kernel, "tangent", (*tensors[:4], lse, *tensors[4:]), tensors, "rows")
    return result


def empty_like_rows(query: Tensor, value: Tensor) -> Tensor:
    """An uninitialized (B, L, Ev) that lies as `query` does: positions last for NCHW maps, channels last otherwise."""
    (B, L, _), Ev = query.shape, value.shape[2]
    positions_last = query.stride(1) == 1 and query.stride(2) != 1
    return value.new_empty_strided((B, L, Ev), (L * Ev, 1, L) if positions_last else (L * Ev, Ev, 1))


def _launch(
    kernel: Any,
    name: configs.Kernel,
    pointers: tuple[Tensor, ...],
    strided: tuple[Tensor, ...],
    programs: str,
    splits: int = 1,
) -> None:
    """Run `kernel`; `strided` are the tensors whose three strides it takes, in its order, query and key first."""
    arithmetic = configs.arithmetic(strided[0])
    kind = (arithmetic, splits, *[(tensor.shape, tensor.stride()) for tensor in strided])
    launch(kernel, pointers, kind, lambda: _arguments(name, strided, programs, splits, arithmetic))


def _arguments(
    name: configs.Kernel,
    strided: tuple[Tensor, ...],
    programs: str,
    splits: int,
    arithmetic: configs.Arithmetic,
) -> Arguments:
    query, key = strided[:2]
    value = strided[2] if len(strided) > 2 else key
    (B, L, E), (_, S, Ev) = query.shape, value.shape
    tile = configs.tiling(name, E, Ev, arithmetic, configs.architecture(query.device))
    rows, block = (L, tile.block_l) if programs == "rows" else (S, tile.block_s)
    widths: dict[str, Any] = {"E": E, "BLOCK_E": configs.width_block(E)}
    if len(strided) > 2:
        widths |= {"EV": Ev, "BLOCK_EV": configs.width_block(Ev)}
    sizes = (L, S) if programs == "rows" else (L, S, splits, -(-L // (splits * tile.block_l)) * tile.block_l)
    strides = [stride for tensor in strided for stride in tensor.stride()]
    named = widths | {
        "BLOCK_L": tile.block_l,
        "BLOCK_S": tile.block_s,
        "EVEN_L": L % tile.block_l == 0,
        "EVEN_S": S % tile.block_s == 0,
        "WIDE": any(reach(tensor) >= 2**31 for tensor in strided),
        "PRECISION": input_precision(arithmetic),
        "ACC": triton_dtype(query),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    return B * splits * -(-rows // block), (*sizes, *strides), named


def _value_parts(kernels: tuple[configs.Kernel, ...], query: Tensor, value: Tensor) -> Iterator[slice | None]:
    """Slices of the value columns, each as wide as one launch of each of `kernels` takes; None for all of them."""
    E, Ev = query.shape[2], value.shape[2]
    arithmetic, arch = configs.arithmetic(query), configs.architecture(query.device)
    width = min(configs.value_part(kernel, E, Ev, arithmetic, arch) for kernel in kernels)
    if width == Ev:
        return iter((None,))
    return (slice(start, min(start + width, Ev)) for start in range(0, Ev, width))


def _cut(tensor: Tensor, part: slice | None) -> Tensor:
    return tensor if part is None else tensor[..., part]


def _empty_term(tensor: Tensor, part: slice | None) -> Tensor:
    """Like `tensor`, in the dtype of sums where more than one part of the values contributes."""
    return torch.empty_like(tensor, dtype=None if part is None else _sum_dtype(tensor))


def _splits(name: configs.Kernel, query: Tensor, value: Tensor) -> int:
    (B, L, E), (_, S, Ev) = query.shape, value.shape
    arithmetic, arch = configs.arithmetic(query), configs.architecture(query.device)
    return configs.column_splits(name, B, L, S, E, Ev, arithmetic, arch)


def _split(tensor: Tensor, splits: int) -> Tensor:
    """What a column pass writes: `tensor` itself, or one like it for each part, (B · splits, S, width)."""
    if splits == 1:
        return tensor
    B, S, width = tensor.shape
    return tensor.new_empty(B * splits, S, width, dtype=_sum_dtype(tensor))


def _join(parts: tuple[Tensor, ...], into: tuple[Tensor, ...], splits: int) -> None:
    if splits > 1:
        for tensor, sums in zip(into, parts, strict=True):
            tensor.copy_(sums.unflatten(0, (-1, splits)).sum(1))


def _sum(terms: list[Tensor], like: Tensor) -> Tensor:
    return terms[0] if len(terms) == 1 else torch.empty_like(like).copy_(torch.stack(terms).sum(0))


def reach(tensor: Tensor) -> int:
    """The largest offset within one image, with the rows a last tile may point beyond."""
    return (tensor.shape[1] + 256) * tensor.stride(1) + (tensor.shape[2] + 256) * tensor.stride(2)


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def input_precision(arithmetic: configs.Arithmetic) -> str:
    """The word `tl.dot` has for it; it ignores the word on 16-bit inputs."""
    return "ieee" if arithmetic == "half" else arithmetic


def triton_dtype(tensor: Tensor) -> Any:
    """The dtype sums over `tensor` are kept in, as Triton names it."""
    import triton.language as tl

    return tl.float64 if tensor.dtype == torch.float64 else tl.float32
