"""Attention on the CPU in tiles of query rows: out = softmax(query keyᵀ) value, and its derivatives.

Shapes   query (B, L, E)   key (B, S, E)   value (B, S, Ev)   out (B, L, Ev)
Memory   O(L + S) besides the tiles: of the (L, S) map one tile exists at a time, in buffers allocated once.
Maths    sagan_kernels.reference.attention
Method   a tile holds whole rows of the map, so its softmax needs no running maximum; nothing is saved for the
         backward pass, which computes the tiles again.

Plain functions on tensors, without autograd: an operator calls them in its forward and its backward, with gradients
off. Tensors come in any strides and leave fresh and contiguous. float16 and bfloat16 are computed in float32, and
each result has the dtype of the tensor it belongs to. NaN and infinity propagate as in `torch.softmax`.

Products with a narrow result, (L, E) or (S, E), are written (E, L) and (E, S): at E = 8 BLAS takes up to ten times
as long over 8 columns as over 8 rows (MKL 2024.2, float32).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

TILE_SCORES = 1 << 18  # elements of one tile of the map: 1 MiB in float32, a second-level cache
STORED_SCORES = 1 << 20  # elements of a map that is better stored: 4 MiB in float32

_softmax_backward = torch.ops.aten._softmax_backward_data.out  # the public ops need three passes for its one


def forward(
    query: Tensor, key: Tensor, value: Tensor, *, budget: int = TILE_SCORES, lies_as_value: bool = False
) -> Tensor:
    """softmax(query keyᵀ) value.

    Args:
        query: (B, L, E).
        key: (B, S, E).
        value: (B, S, Ev).
        budget: elements of a tile of the map; a tile has at least one row.
        lies_as_value: let the result have its positions inside where they are so in `value`: a feature map in NCHW
            stays one, so that what follows need not read it across its rows.

    Returns:
        (B, L, Ev) in the dtype of `value`.
    """
    q, k, v = _computed(query, key, value)
    (B, L, _), (_, S, Ev) = q.shape, v.shape
    (p_buffer,) = _buffers(q, S, budget, 1)
    if lies_as_value and value.mT.is_contiguous():
        out = q.new_empty(B, Ev, L)
        for images, rows in _tiles(B, L, S, budget):
            p = _softmax_tile(q[images, rows], k[images], p_buffer)
            torch.bmm(v[images].mT, p.mT, out=out[images, :, rows])
        return out.mT.to(value.dtype)
    out = q.new_empty(B, L, Ev)
    for images, rows in _tiles(B, L, S, budget):
        p = _softmax_tile(q[images, rows], k[images], p_buffer)
        torch.bmm(p, v[images], out=out[images, rows])
    return out.to(value.dtype)


def whole(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`forward` with the whole map at once, which autograd may see; computed in the dtype of the tensors.

    Args:
        query: (B, L, E).
        key: (B, S, E).
        value: (B, S, Ev).

    Returns:
        (B, L, Ev).
    """
    return torch.bmm(_weights(query, key.mT), value)


def whole_maps(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`whole` on feature maps as convolutions leave them: each transposition takes as long as a small product.

    Args:
        query: (B, E, L).
        key: (B, E, S).
        value: (B, Ev, S).

    Returns:
        (B, Ev, L), its positions inside where they are so in `value`.
    """
    if value.stride(1) == 1 and value.stride(2) != 1:
        return torch.bmm(_weights(query.mT, key), value.mT).mT
    if torch.is_grad_enabled():  # forward alone the softmax of columns is the slower one
        return torch.bmm(value, torch.softmax(torch.bmm(key.mT, query), 1))
    return torch.bmm(value, _weights(query.mT, key).mT)


def _weights(rows: Tensor, columns: Tensor) -> Tensor:
    scores = torch.bmm(rows, columns)
    seen = scores.requires_grad or torch.compiler.is_compiling()
    return torch.softmax(scores, -1) if seen else torch.softmax(scores, -1, out=scores)


def backward(
    query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, *, budget: int = TILE_SCORES
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `forward`.

    Args:
        query: (B, L, E).
        key: (B, S, E).
        value: (B, S, Ev).
        grad_out: (B, L, Ev), the gradient of the result of `forward`.
        budget: elements of a tile of the map; a tile has at least one row.

    Returns:
        The gradients of query, key and value, each in the shape and dtype of its tensor.
    """
    q, k, v, g = _computed(query, key, value, grad_out)
    B, L, S = q.shape[0], q.shape[1], k.shape[1]
    grad_q, grad_k, grad_v = _transposed_zeros(q, k, v)
    p_buffer, ds_buffer = _buffers(q, S, budget, 2)
    for images, rows in _tiles(B, L, S, budget):
        q_tile, g_tile = q[images, rows], g[images, rows]
        p = _softmax_tile(q_tile, k[images], p_buffer)
        ds = _product(g_tile, v[images], ds_buffer)
        grad_v[images].baddbmm_(g_tile.mT, p)
        _softmax_backward(ds, p, -1, ds.dtype, grad_input=ds)
        grad_k[images].baddbmm_(q_tile.mT, ds)
        grad_q[images, :, rows].baddbmm_(k[images].mT, ds.mT)
    return _delivered(grad_q, query), _delivered(grad_k, key), _delivered(grad_v, value)


def double_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    budget: int = TILE_SCORES,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `backward`: the vector-Jacobian product of its three results.

    Args:
        query: (B, L, E).
        key: (B, S, E).
        value: (B, S, Ev).
        grad_out: (B, L, Ev).
        a: (B, L, E), the gradient of the gradient of query.
        b: (B, S, E), the gradient of the gradient of key.
        c: (B, S, Ev), the gradient of the gradient of value.
        budget: elements of a tile of the map; a tile has at least one row.

    Returns:
        The gradients of query, key, value and grad_out, each in the shape and dtype of its tensor.
    """
    q, k, v, g, a, b, c = _computed(query, key, value, grad_out, a, b, c)
    B, L, S = q.shape[0], q.shape[1], k.shape[1]
    grad_q, grad_k, grad_v, grad_g = _transposed_zeros(q, k, v, g)
    aq, kb = torch.cat([a, q], -1), torch.cat([k, b], -1)
    buffers = _buffers(q, S, budget, 4)
    for images, rows in _tiles(B, L, S, budget):
        q_tile, g_tile, a_tile = q[images, rows], g[images, rows], a[images, rows]
        p = _softmax_tile(q_tile, k[images], buffers[0])
        t = _product(aq[images, rows], kb[images], buffers[1])  # the change of the scores along (a, b)
        x = _view(buffers[3], p)
        t -= torch.mul(p, t, out=x).sum(-1, keepdim=True)
        ds = _product(g_tile, v[images], buffers[2])
        ds -= torch.mul(p, ds, out=x).sum(-1, keepdim=True)
        torch.bmm(g_tile, c[images].mT, out=x).addcmul_(t, ds)
        _softmax_backward(x, p, -1, x.dtype, grad_input=x)
        ds *= p
        t *= p
        grad_q[images, :, rows].baddbmm_(k[images].mT, x.mT).baddbmm_(b[images].mT, ds.mT)
        grad_k[images].baddbmm_(q_tile.mT, x).baddbmm_(a_tile.mT, ds)
        grad_v[images].baddbmm_(g_tile.mT, t)
        grad_g[images, :, rows].baddbmm_(v[images].mT, t.mT).baddbmm_(c[images].mT, p.mT)
    return (
        _delivered(grad_q, query),
        _delivered(grad_k, key),
        _delivered(grad_v, value),
        _delivered(grad_g, grad_out),
    )


def tangent(
    query: Tensor, key: Tensor, value: Tensor, a: Tensor, b: Tensor, c: Tensor, *, budget: int = TILE_SCORES
) -> Tensor:
    """The derivative of `forward` in the direction (a, b, c): its Jacobian-vector product.

    Args:
        query: (B, L, E).
        key: (B, S, E).
        value: (B, S, Ev).
        a: (B, L, E), the direction of query.
        b: (B, S, E), the direction of key.
        c: (B, S, Ev), the direction of value.
        budget: elements of a tile of the map; a tile has at least one row.

    Returns:
        (B, L, Ev) in the dtype of `value`.
    """
    q, k, v, a, b, c = _computed(query, key, value, a, b, c)
    (B, L, _), (_, S, Ev) = q.shape, v.shape
    out = q.new_empty(B, L, Ev)
    aq, kb = torch.cat([a, q], -1), torch.cat([k, b], -1)
    p_buffer, t_buffer = _buffers(q, S, budget, 2)
    for images, rows in _tiles(B, L, S, budget):
        p = _softmax_tile(q[images, rows], k[images], p_buffer)
        t = _product(aq[images, rows], kb[images], t_buffer)
        _softmax_backward(t, p, -1, t.dtype, grad_input=t)  # the Jacobian of softmax is symmetric
        torch.bmm(t, v[images], out=out[images, rows])
        out[images, rows].baddbmm_(p, c[images])
    return out.to(value.dtype)


def over_queries(query: Tensor, key: Tensor, value: Tensor, *, budget: int = TILE_SCORES) -> Tensor:
    """Attention normalized over query positions: out = Pᵀ value, P = softmax(key queryᵀ), in tiles of key rows.

    Args:
        query: (B, L, E).
        key: (B, S, E).
        value: (B, S, Ev).
        budget: elements of a tile of the map; a tile has at least one row.

    Returns:
        (B, L, Ev) in the dtype of `value`.
    """
    q, k, v = _computed(query, key, value)
    B, L, S = q.shape[0], q.shape[1], k.shape[1]
    out = q.new_zeros(B, v.shape[2], L)
    (p_buffer,) = _buffers(k, L, budget, 1)
    for images, rows in _tiles(B, S, L, budget):
        p = _softmax_tile(k[images, rows], q[images], p_buffer)
        out[images].baddbmm_(v[images, rows].mT, p)
    return _delivered(out, value)


def tile_shape(B: int, L: int, S: int, budget: int = TILE_SCORES) -> tuple[int, int]:
    """The (images, rows) of a tile of the map, (images, rows, S).

    Whole images while they fit in `budget` elements, else rows of one image in equal parts. From S = 1024 on the
    rows stay at budget / 1024 and the tile grows with S: products over fewer rows are slow, and a tile that fits
    the cache does not make up for it.

    Args:
        B: images.
        L: rows of the map.
        S: columns of the map.
        budget: elements of a tile; a tile has at least one row.
    """
    images = max(1, min(B, budget // max(1, L * S)))
    most_rows = max(1, min(L, budget // max(1, min(S, 1024))))
    parts = max(1, -(-L // most_rows))
    return images, max(1, -(-L // parts))


def is_one_tile(B: int, L: int, S: int, *dtypes: torch.dtype) -> bool:
    """Whether a forward pass is one tile in 32 or 64 bits: `whole` takes as little as a quarter of the loop's time."""
    if B * L * S > TILE_SCORES and tile_shape(B, L, S) != (B, L):
        return False
    return len(set(dtypes)) == 1 and dtypes[0].itemsize >= 4


def stores_map(B: int, L: int, S: int) -> bool:
    """Whether the plain formula, which stores the (B, L, S) map, is faster than tiles: the map is 4 MiB or less.

    A small map stays in the cache until the backward pass, which need not compute it again. Beyond the limit tiles are
    as fast or faster; at it they lose forward + backward, and win in an R1 step where values are narrow. A map of
    32 MiB costs more in fresh pages than in softmax.
    """
    return B * L * S <= STORED_SCORES


def _tiles(B: int, L: int, S: int, budget: int) -> Iterator[tuple[slice, slice]]:
    images, rows = tile_shape(B, L, S, budget)
    for image in range(0, B, images):
        for row in range(0, L, rows):
            yield slice(image, image + images), slice(row, row + rows)


def _buffers(rows_of: Tensor, S: int, budget: int, count: int) -> tuple[Tensor, ...]:
    images, rows = tile_shape(rows_of.shape[0], rows_of.shape[1], S, budget)
    return rows_of.new_empty(count, images * rows * S).unbind()


def _product(left: Tensor, right: Tensor, buffer: Tensor) -> Tensor:
    """Left rightᵀ, (n, r, S), at the beginning of `buffer`."""
    n, r, S = left.shape[0], left.shape[1], right.shape[1]
    return torch.bmm(left, right.mT, out=buffer[: n * r * S].view(n, r, S))


def _softmax_tile(query: Tensor, key: Tensor, buffer: Tensor) -> Tensor:
    scores = _product(query, key, buffer)
    return torch.softmax(scores, -1, out=scores)


def _view(buffer: Tensor, like: Tensor) -> Tensor:
    return buffer[: like.numel()].view(like.shape)


def _computed(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype of the computation, in strides that BLAS reads without a copy for every tile."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    tensors = tuple(t if t.dtype == dtype else t.to(dtype) for t in tensors)
    return [t if t.is_contiguous() or t.mT.is_contiguous() else t.contiguous() for t in tensors]


def _transposed_zeros(*tensors: Tensor) -> list[Tensor]:
    return [t.new_zeros(t.mT.shape) for t in tensors]


def _delivered(transposed: Tensor, like: Tensor) -> Tensor:
    return transposed.mT.to(like.dtype, memory_format=torch.contiguous_format, copy=True)
