"""Attention on the CPU, in tiles of query rows whose scores fit the cache: memory O(L + S) in every order.

A tile's softmax is computed anew in each pass, from the scores, so nothing but inputs is kept between them. No
gradients here: these are the bodies of operators. 16-bit inputs are computed in float32.

Maths: with P = softmax(query keyᵀ) and the row-wise softmax gradient J(P, Y) = P ∘ (Y - Σ P ∘ Y),
    dS = J(P, grad valueᵀ)    grad_query = dS key    grad_key = dSᵀ query    grad_value = Pᵀ grad
and for the cotangents a, b, c of these three, with T = a keyᵀ + query bᵀ - Σ P ∘ (a keyᵀ + query bᵀ),
    X = J(P, grad cᵀ + T ∘ (grad valueᵀ - Σ P ∘ grad valueᵀ))
    query2 = X key + dS b    key2 = Xᵀ query + dSᵀ a    value2 = (P ∘ T)ᵀ grad    grad2 = (P ∘ T) value + P c
grad2 is also the derivative of the output in the direction (a, b, c).
"""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor

TILE = 2**18  # scores in a tile, 1 MiB of float32: with its copies about the second-level cache of one core


def stores_map(B: int, L: int, S: int, differentiated: bool) -> bool:
    """Whether the plain formula, which stores the (B, L, S) map, is at least as fast on a CPU, and the map small.

    Without tiles there are fewer calls, and the map need not be computed anew for a gradient: 8 MiB at most.
    """
    return (2**21 if differentiated else 2**18) >= B * L * S


def tile_shape(B: int, L: int, S: int, tile: int = TILE) -> tuple[int, int]:
    """How many images and how many query rows of each a tile of at most `tile` scores holds, at least one of each."""
    if tile >= L * S:
        return max(1, min(B, tile // (L * S))), L
    return 1, max(1, tile // S)


def _in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compute 16-bit tensors in float32, and return results in their dtype."""

    @wraps(function)
    def run(*tensors: Tensor, tile: int = TILE) -> Any:
        dtype = tensors[0].dtype
        if dtype not in (torch.float16, torch.bfloat16):
            return function(*tensors, tile=tile)
        results = function(*(t.float() for t in tensors), tile=tile)
        return results.to(dtype) if isinstance(results, Tensor) else tuple(r.to(dtype) for r in results)

    return run


@_in_float32
def forward(query: Tensor, key: Tensor, value: Tensor, *, tile: int = TILE) -> Tensor:
    """softmax(query keyᵀ) value: (B, L, E), (B, S, E), (B, S, Ev) -> (B, L, Ev)."""
    out = query.new_empty(*query.shape[:2], value.shape[2])
    for images, rows, (p,) in _tiles(query, key, 1, tile):
        torch.bmm(query[images, rows], key[images].mT, out=p)
        torch.softmax(p, -1, out=p)
        torch.bmm(p, value[images], out=out[images, rows])
    return out


@_in_float32
def over_queries(query: Tensor, key: Tensor, value: Tensor, *, tile: int = TILE) -> Tensor:
    """softmax(key queryᵀ)ᵀ value, normalized over queries, in tiles of key rows; (B, L, Ev)."""
    out = query.new_zeros(*query.shape[:2], value.shape[2])
    for images, rows, (p,) in _tiles(key, query, 1, tile):
        torch.bmm(key[images, rows], query[images].mT, out=p)
        torch.softmax(p, -1, out=p)
        out[images].baddbmm_(p.mT, value[images, rows])
    return out


@_in_float32
def backward(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, *, tile: int = TILE
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of <out, grad> for query, key and value."""
    grad_query = query.new_empty(query.shape)
    grad_key, grad_value = key.new_zeros(key.shape), value.new_zeros(value.shape)
    for images, rows, (p, ds) in _tiles(query, key, 2, tile):
        q, k, v, g = query[images, rows], key[images], value[images], grad[images, rows]
        torch.bmm(q, k.mT, out=p)
        torch.softmax(p, -1, out=p)
        grad_value[images].baddbmm_(p.mT, g)
        torch.bmm(g, v.mT, out=ds)
        _softmax_gradient_(ds, p)
        torch.bmm(ds, k, out=grad_query[images, rows])
        grad_key[images].baddbmm_(ds.mT, q)
    return grad_query, grad_key, grad_value


@_in_float32
def double_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    tile: int = TILE,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of <grad_query, a> + <grad_key, b> + <grad_value, c> for query, key, value and grad."""
    query2, grad2 = query.new_empty(query.shape), grad.new_empty(grad.shape)
    key2, value2 = key.new_zeros(key.shape), value.new_zeros(value.shape)
    aq, kb = torch.cat([a, query], 2), torch.cat([key, b], 2)  # T in one product
    for images, rows, (p, t, d, x) in _tiles(query, key, 4, tile):
        q, k, v, g = query[images, rows], key[images], value[images], grad[images, rows]
        torch.bmm(q, k.mT, out=p)
        torch.softmax(p, -1, out=p)
        torch.bmm(aq[images, rows], kb[images].mT, out=t)
        t -= _row_sums(p, t)
        torch.bmm(g, v.mT, out=d)
        d -= _row_sums(p, d)
        torch.bmm(g, c[images].mT, out=x)
        x.addcmul_(t, d)
        _softmax_gradient_(x, p)
        d *= p
        t *= p
        torch.baddbmm(torch.bmm(x, k), d, b[images], out=query2[images, rows])
        key2[images].baddbmm_(x.mT, q).baddbmm_(d.mT, a[images, rows])
        value2[images].baddbmm_(t.mT, g)
        torch.baddbmm(torch.bmm(t, v), p, c[images], out=grad2[images, rows])
    return query2, key2, value2, grad2


@_in_float32
def tangent(
    query: Tensor, key: Tensor, value: Tensor, a: Tensor, b: Tensor, c: Tensor, *, tile: int = TILE
) -> Tensor:
    """The derivative of out along a, b, c, the directions of query, key and value; (B, L, Ev)."""
    result = query.new_empty(*query.shape[:2], value.shape[2])
    aq, kb = torch.cat([a, query], 2), torch.cat([key, b], 2)
    for images, rows, (p, t) in _tiles(query, key, 2, tile):
        torch.bmm(query[images, rows], key[images].mT, out=p)
        torch.softmax(p, -1, out=p)
        torch.bmm(aq[images, rows], kb[images].mT, out=t)
        _softmax_gradient_(t, p)
        torch.baddbmm(torch.bmm(t, value[images]), p, c[images], out=result[images, rows])
    return result


def _tiles(
    query: Tensor, key: Tensor, buffers: int, tile: int
) -> Iterator[tuple[slice, slice, tuple[Tensor, ...]]]:
    """Slices of images and of query rows, with buffers of that many rows by S, which are used again and again."""
    (B, L, _), S = query.shape, key.shape[1]
    n, m = tile_shape(B, L, S, tile)
    memory = query.new_empty(buffers, n * m * S)
    for i in range(0, B, n):
        for j in range(0, L, m):
            shape = (min(n, B - i), min(m, L - j), S)
            views = memory[:, : shape[0] * shape[1] * S].view(buffers, *shape)
            yield slice(i, i + n), slice(j, j + m), tuple(views)


def _softmax_gradient_(y: Tensor, p: Tensor) -> None:
    """Y becomes J(p, y) = p ∘ (y - Σ p ∘ y), in one pass over the tile."""
    torch.ops.aten._softmax_backward_data.out(y, p, -1, y.dtype, grad_input=y)


def _row_sums(p: Tensor, y: Tensor) -> Tensor:
    """Σ p ∘ y over each row, (..., 1), without the product as a tensor."""
    return torch.linalg.vecdot(p, y).unsqueeze(-1)
