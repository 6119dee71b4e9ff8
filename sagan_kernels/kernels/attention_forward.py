"""Attention forward: out = softmax(q kᵀ) v, and what its softmax was divided by.

Shapes   q (B, L, E)   k (B, S, E)   v (B, S, Ev)   out (B, L, Ev)   lse (B, 2, L)
         L query positions (H·W), S key positions (L/4 after SAGAN's max-pool); E = C/8 and Ev = C/2 in SAGAN.
Traffic  reads q once and k, v ⌈L / BLOCK_L⌉ times; writes out and lse once. The (L, S) map stays on chip.
Maths    sagan_kernels.reference.attention; lse = log2 Σ exp(q kᵀ), as a sum of two
Method   online softmax, arXiv:1805.02867; tiling, arXiv:2205.14135.
"""

import triton
import triton.language as tl

from sagan_kernels.kernels.tiles import (
    LOG2E,
    finite_or_zero,
    indices,
    load_lse,
    load_tile,
    store_lse,
    store_tile,
)


@triton.jit
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    L, S,
    q_image, q_row, q_col, k_image, k_row, k_col, v_image, v_row, v_col, out_image, out_row, out_col,
    E: tl.constexpr, EV: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, EVEN_L: tl.constexpr, EVEN_S: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Computes BLOCK_L rows of out for one image. Grid: (B · ⌈L / BLOCK_L⌉,), 1-D since the others end at 65535."""
    tiles = tl.cdiv(L, BLOCK_L)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    rows = indices(tl.program_id(0) % tiles * BLOCK_L, BLOCK_L, WIDE)
    e = indices(0, BLOCK_E, WIDE)
    ev = indices(0, BLOCK_EV, WIDE)
    q = load_tile(q_ptr + image * q_image, rows, e, q_row, q_col, L, E, EVEN_L, BLOCK_E)

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

    out = acc * (1.0 / total)[:, None]
    store_tile(out_ptr + image * out_image, out, rows, ev, out_row, out_col, L, EV, EVEN_L, BLOCK_EV)
    store_lse(lse_ptr + image * 2 * L, rows, L, peak, total)


@triton.jit
def online_softmax(score, peak, total):
    """Takes a tile of scores into the running row maximum and denominator.

    The maximum is kept in base 2 and rounded: multiplied anew each time, the fused multiply-add of a GPU would make
    the factor of an unchanged maximum differ from 1, and that would add up over tiles.

    Returns the two, the tile's exponentials, and the factor that brings earlier sums to the new maximum.
    """
    new_peak = tl.maximum(peak, tl.max(score, axis=1) * LOG2E)
    shift = finite_or_zero(new_peak)
    rescale = tl.exp2(peak - shift)
    p = tl.exp2(score * LOG2E - shift[:, None])
    return new_peak, total * rescale + tl.sum(p, axis=1), p, rescale


@triton.jit
def attention_lse_kernel(
    q_ptr, k_ptr, lse_ptr,
    L, S,
    q_image, q_row, q_col, k_image, k_row, k_col,
    E: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, EVEN_L: tl.constexpr, EVEN_S: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Computes lse of BLOCK_L rows for one image, without values. Grid: (B · ⌈L / BLOCK_L⌉,)."""
    tiles = tl.cdiv(L, BLOCK_L)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    rows = indices(tl.program_id(0) % tiles * BLOCK_L, BLOCK_L, WIDE)
    e = indices(0, BLOCK_E, WIDE)
    q = load_tile(q_ptr + image * q_image, rows, e, q_row, q_col, L, E, EVEN_L, BLOCK_E)

    peak, total = tl.full((BLOCK_L,), -float("inf"), ACC), tl.zeros((BLOCK_L,), ACC)
    for start in range(0, S, BLOCK_S):
        cols = indices(start, BLOCK_S, WIDE)
        k = load_tile(k_ptr + image * k_image, cols, e, k_row, k_col, S, E, EVEN_S, BLOCK_E)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        if not EVEN_S:
            score = tl.where(cols[None, :] < S, score, -float("inf"))
        peak, total, _, _ = online_softmax(score, peak, total)
    store_lse(lse_ptr + image * 2 * L, rows, L, peak, total)


@triton.jit
def attention_over_queries_kernel(
    q_ptr, k_ptr, v_ptr, lse_ptr, out_ptr,
    L, S,
    q_image, q_row, q_col, k_image, k_row, k_col, v_image, v_row, v_col, out_image, out_row, out_col,
    E: tl.constexpr, EV: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, EVEN_L: tl.constexpr, EVEN_S: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Computes BLOCK_L rows of out = Pᵀ v for one image, where P = softmax(k qᵀ) is normalized over queries.

    lse (B, 2, S) is that of `attention_lse_kernel` with the roles of q and k exchanged. Grid: (B · ⌈L / BLOCK_L⌉,).
    """
    tiles = tl.cdiv(L, BLOCK_L)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    rows = indices(tl.program_id(0) % tiles * BLOCK_L, BLOCK_L, WIDE)
    e = indices(0, BLOCK_E, WIDE)
    ev = indices(0, BLOCK_EV, WIDE)
    q = load_tile(q_ptr + image * q_image, rows, e, q_row, q_col, L, E, EVEN_L, BLOCK_E)

    acc = tl.zeros((BLOCK_L, BLOCK_EV), ACC)
    for start in range(0, S, BLOCK_S):
        cols = indices(start, BLOCK_S, WIDE)
        k = load_tile(k_ptr + image * k_image, cols, e, k_row, k_col, S, E, EVEN_S, BLOCK_E)
        v = load_tile(v_ptr + image * v_image, cols, ev, v_row, v_col, S, EV, EVEN_S, BLOCK_EV)
        shift, log_total = load_lse(lse_ptr + image * 2 * S, cols, S)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        if not EVEN_S:
            score = tl.where(cols[None, :] < S, score, -float("inf"))
        p = tl.exp2(score * LOG2E - shift[None, :] - log_total[None, :])
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION, out_dtype=ACC)
    store_tile(out_ptr + image * out_image, acc, rows, ev, out_row, out_col, L, EV, EVEN_L, BLOCK_EV)
