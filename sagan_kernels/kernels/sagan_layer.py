"""The SAGAN layer around the attention product: key/value projection with its max-pool, and all the rest at once.

Shapes   x, y (B, C, H, W)   pooled, argmax (B, S, K), S = ⌊H/2⌋·⌊W/2⌋   full (B, K, L)   k (B, S, E)   v (B, S, Ev)
         weight (K, C)   query_weight (E, C)   out_weight (C, Ev)   biases (K), (E), (C)   gamma one element
Traffic  projection: reads x ⌈K / BLOCK_K⌉ times, from the second on out of cache; the unpooled projection, four
         times the size of what is written, stays on chip. Layer: reads x twice (once cached) and writes y once.
Maths    sagan_kernels.reference.sagan_attention
"""

import triton
import triton.language as tl

from sagan_kernels.kernels.attention_forward import online_softmax
from sagan_kernels.kernels.tiles import indices, load_tile


@triton.jit
def project_pool_kernel(
    x_ptr, weight_ptr, bias_ptr, pooled_ptr, argmax_ptr,
    S, pooled_width, C, K,
    x_image, x_channel, x_height, x_width, weight_row, weight_col,
    pooled_image, pooled_row, pooled_col,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Computes BLOCK_S positions and BLOCK_K channels of max_pool2d(weight x + bias, 2) for one image.

    argmax is 0, 1, 2, 3 for the window's elements in scan order; the first of equals wins, and NaN wins over numbers,
    as in torch. Grid: (B · ⌈S / BLOCK_S⌉ · ⌈K / BLOCK_K⌉,), channels innermost so that x is read from cache.
    """
    parts, tiles = tl.cdiv(K, BLOCK_K), tl.cdiv(S, BLOCK_S)
    image = (tl.program_id(0) // (parts * tiles)).to(tl.int64)
    rows = indices(tl.program_id(0) // parts % tiles * BLOCK_S, BLOCK_S, WIDE)
    outs = indices(tl.program_id(0) % parts * BLOCK_K, BLOCK_K, WIDE)
    window = rows // pooled_width * 2 * x_height + rows % pooled_width * 2 * x_width  # its first element
    x_ptr += image * x_image

    first, second = tl.zeros((BLOCK_S, BLOCK_K), ACC), tl.zeros((BLOCK_S, BLOCK_K), ACC)
    third, fourth = tl.zeros((BLOCK_S, BLOCK_K), ACC), tl.zeros((BLOCK_S, BLOCK_K), ACC)
    for start in range(0, C, BLOCK_C):
        c = indices(start, BLOCK_C, WIDE)
        weight_at = c[:, None] * weight_col + outs[None, :] * weight_row
        w = tl.load(weight_ptr + weight_at, mask=(c[:, None] < C) & (outs[None, :] < K), other=0.0)
        at = x_ptr + window[:, None] + c[None, :] * x_channel
        inside = (rows[:, None] < S) & (c[None, :] < C)
        x = tl.load(at, mask=inside, other=0.0)
        first = tl.dot(x, w, first, input_precision=PRECISION, out_dtype=ACC)
        x = tl.load(at + x_width, mask=inside, other=0.0)
        second = tl.dot(x, w, second, input_precision=PRECISION, out_dtype=ACC)
        x = tl.load(at + x_height, mask=inside, other=0.0)
        third = tl.dot(x, w, third, input_precision=PRECISION, out_dtype=ACC)
        x = tl.load(at + x_height + x_width, mask=inside, other=0.0)
        fourth = tl.dot(x, w, fourth, input_precision=PRECISION, out_dtype=ACC)

    best, which = first, tl.zeros((BLOCK_S, BLOCK_K), tl.int32)
    best, which = _larger(best, which, second, 1)
    best, which = _larger(best, which, third, 2)
    best, which = _larger(best, which, fourth, 3)
    if HAS_BIAS:
        best += tl.load(bias_ptr + outs, mask=outs < K, other=0.0).to(ACC)[None, :]
    pooled_at = image * pooled_image + rows[:, None] * pooled_row + outs[None, :] * pooled_col
    inside = (rows[:, None] < S) & (outs[None, :] < K)
    tl.store(pooled_ptr + pooled_at, best.to(pooled_ptr.dtype.element_ty), mask=inside)
    tl.store(argmax_ptr + pooled_at, which.to(tl.uint8), mask=inside)


@triton.jit
def unpool_kernel(
    pooled_ptr, argmax_ptr, full_ptr,
    L, width, S, pooled_width, K,
    pooled_image, pooled_row, pooled_col, argmax_image, argmax_row, argmax_col, full_image, full_col, full_row,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Computes BLOCK_L positions and BLOCK_K channels of the map whose maxima were pooled: each where it was, else 0.

    Positions beyond the last whole window, in odd heights and widths, are 0.
    Grid: (B · ⌈L / BLOCK_L⌉ · ⌈K / BLOCK_K⌉,).
    """
    parts, tiles = tl.cdiv(K, BLOCK_K), tl.cdiv(L, BLOCK_L)
    image = (tl.program_id(0) // (parts * tiles)).to(tl.int64)
    rows = indices(tl.program_id(0) // parts % tiles * BLOCK_L, BLOCK_L, WIDE)
    cols = indices(tl.program_id(0) % parts * BLOCK_K, BLOCK_K, WIDE)
    y, x = rows // width, rows % width
    window = y // 2 * pooled_width + x // 2
    whole = (window < S) & (x // 2 < pooled_width)
    inside = (rows[:, None] < L) & (cols[None, :] < K)
    read = inside & whole[:, None]
    pooled_at = image * pooled_image + window[:, None] * pooled_row + cols[None, :] * pooled_col
    argmax_at = image * argmax_image + window[:, None] * argmax_row + cols[None, :] * argmax_col
    pooled = tl.load(pooled_ptr + pooled_at, mask=read, other=0.0)
    argmax = tl.load(argmax_ptr + argmax_at, mask=read, other=0)
    full = tl.where(argmax == (y % 2 * 2 + x % 2)[:, None], pooled, 0.0)
    full_at = image * full_image + rows[:, None] * full_row + cols[None, :] * full_col
    tl.store(full_ptr + full_at, full.to(full_ptr.dtype.element_ty), mask=inside)


@triton.jit
def take_kernel(
    full_ptr, argmax_ptr, pooled_ptr,
    S, width, pooled_width, K,
    full_image, full_col, full_row, argmax_image, argmax_row, argmax_col, pooled_image, pooled_row, pooled_col,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Computes BLOCK_S positions and BLOCK_K channels of what `unpool_kernel` would read: the entries at argmax.

    Grid: (B · ⌈S / BLOCK_S⌉ · ⌈K / BLOCK_K⌉,).
    """
    parts, tiles = tl.cdiv(K, BLOCK_K), tl.cdiv(S, BLOCK_S)
    image = (tl.program_id(0) // (parts * tiles)).to(tl.int64)
    rows = indices(tl.program_id(0) // parts % tiles * BLOCK_S, BLOCK_S, WIDE)
    cols = indices(tl.program_id(0) % parts * BLOCK_K, BLOCK_K, WIDE)
    inside = (rows[:, None] < S) & (cols[None, :] < K)
    argmax_at = image * argmax_image + rows[:, None] * argmax_row + cols[None, :] * argmax_col
    argmax = tl.load(argmax_ptr + argmax_at, mask=inside, other=0).to(tl.int32)
    window = rows // pooled_width * 2 * width + rows % pooled_width * 2  # its first position
    at = window[:, None] + argmax // 2 * width + argmax % 2
    full = tl.load(
        full_ptr + image * full_image + at * full_row + cols[None, :] * full_col, mask=inside, other=0.0
    )
    pooled_at = image * pooled_image + rows[:, None] * pooled_row + cols[None, :] * pooled_col
    tl.store(pooled_ptr + pooled_at, full, mask=inside)


@triton.jit
def _larger(best, which, candidate, index: tl.constexpr):
    wins = (candidate > best) | (candidate != candidate)
    return tl.where(wins, candidate, best), tl.where(wins, index, which)


@triton.jit
def sagan_forward_kernel(
    x_ptr, query_weight_ptr, query_bias_ptr, k_ptr, v_ptr, out_weight_ptr, out_bias_ptr, gamma_ptr, y_ptr,
    L, S,
    x_image, x_row, x_col, query_weight_row, query_weight_col, k_image, k_row, k_col, v_image, v_row, v_col,
    out_weight_row, out_weight_col, y_image, y_row, y_col,
    C: tl.constexpr, E: tl.constexpr, EV: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    EVEN_L: tl.constexpr, EVEN_S: tl.constexpr, HAS_QUERY_BIAS: tl.constexpr, HAS_OUT_BIAS: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Computes BLOCK_L positions of y = x + gamma · (out_weight softmax(query_weight x kᵀ) v) for one image.

    Queries and the attention output are rounded to x's dtype, as if they had been stored. Grid: (B · ⌈L / BLOCK_L⌉,).
    """
    tiles = tl.cdiv(L, BLOCK_L)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    rows = indices(tl.program_id(0) % tiles * BLOCK_L, BLOCK_L, WIDE)
    e = indices(0, BLOCK_E, WIDE)
    ev = indices(0, BLOCK_EV, WIDE)
    x_ptr += image * x_image
    y_ptr += image * y_image

    q = tl.zeros((BLOCK_L, BLOCK_E), ACC)
    for start in range(0, C, BLOCK_C):
        c = indices(start, BLOCK_C, WIDE)
        x = tl.load(
            x_ptr + rows[:, None] * x_row + c[None, :] * x_col,
            mask=(rows[:, None] < L) & (c[None, :] < C),
            other=0.0,
        )
        weight_at = c[:, None] * query_weight_col + e[None, :] * query_weight_row
        w = tl.load(query_weight_ptr + weight_at, mask=(c[:, None] < C) & (e[None, :] < E), other=0.0)
        q = tl.dot(x, w, q, input_precision=PRECISION, out_dtype=ACC)
    if HAS_QUERY_BIAS:
        q += tl.load(query_bias_ptr + e, mask=e < E, other=0.0).to(ACC)[None, :]
    q = q.to(x_ptr.dtype.element_ty)

    peak, total = tl.full((BLOCK_L,), -float("inf"), ACC), tl.zeros((BLOCK_L,), ACC)
    acc = tl.zeros((BLOCK_L, BLOCK_EV), ACC)
    for start in range(0, S, BLOCK_S):
        cols = indices(start, BLOCK_S, WIDE)
        k = load_tile(k_ptr + image * k_image, cols, e, k_row, k_col, S, E, EVEN_S, BLOCK_E)
        v = load_tile(v_ptr + image * v_image, cols, ev, v_row, v_col, S, EV, EVEN_S, BLOCK_EV)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        if not EVEN_S:
            score = tl.where(cols[None, :] < S, score, -float("inf"))
        peak, total, p, rescale = online_softmax(score, peak, total)
        acc = acc * rescale[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION, out_dtype=ACC)
    out = (acc * (1.0 / total)[:, None]).to(x_ptr.dtype.element_ty)

    gamma = tl.load(gamma_ptr).to(ACC)
    for start in range(0, C, BLOCK_C):
        c = indices(start, BLOCK_C, WIDE)
        weight_at = ev[:, None] * out_weight_col + c[None, :] * out_weight_row
        w = tl.load(out_weight_ptr + weight_at, mask=(ev[:, None] < EV) & (c[None, :] < C), other=0.0)
        moved = tl.dot(out, w, input_precision=PRECISION, out_dtype=ACC)
        if HAS_OUT_BIAS:
            moved += tl.load(out_bias_ptr + c, mask=c < C, other=0.0).to(ACC)[None, :]
        inside = (rows[:, None] < L) & (c[None, :] < C)
        x = tl.load(x_ptr + rows[:, None] * x_row + c[None, :] * x_col, mask=inside, other=0.0)
        y = x.to(ACC) + gamma * moved
        tl.store(
            y_ptr + rows[:, None] * y_row + c[None, :] * y_col, y.to(y_ptr.dtype.element_ty), mask=inside
        )
