"""Attention backward: the gradients of <softmax(q kᵀ) v, g> in two passes, without atomics.

Shapes   q, dq (B, L, E)   k, dk (B, S, E)   v, dv (B, S, Ev)   out, g (B, L, Ev)   lse (B, 2, L)   delta (B, L)
Traffic  the row pass reads q, out, g once and k, v ⌈L / BLOCK_L⌉ times; the column pass reads k, v once and q, g
         ⌈S / BLOCK_S⌉ times. The map is computed twice from lse, never stored; the result does not depend on timing.
Maths    P = exp(q kᵀ - lse)   delta = Σ g ∘ out   dS = P ∘ (g vᵀ - delta)
         dq = dS k   dk = dSᵀ q   dv = Pᵀ g
Method   arXiv:2205.14135, appendix B; two passes as in arXiv:2307.08691, but without its atomic sums.
"""

import triton
import triton.language as tl

from sagan_kernels.kernels.tiles import LOG2E, indices, load_lse, load_tile, store_tile


@triton.jit
def attention_backward_row_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, g_ptr, dq_ptr, delta_ptr,
    L, S,
    q_image, q_row, q_col, k_image, k_row, k_col, v_image, v_row, v_col,
    out_image, out_row, out_col, g_image, g_row, g_col, dq_image, dq_row, dq_col,
    E: tl.constexpr, EV: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, EVEN_L: tl.constexpr, EVEN_S: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Computes BLOCK_L rows of dq and delta for one image. Grid: (B · ⌈L / BLOCK_L⌉,)."""
    tiles = tl.cdiv(L, BLOCK_L)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    rows = indices(tl.program_id(0) % tiles * BLOCK_L, BLOCK_L, WIDE)
    e = indices(0, BLOCK_E, WIDE)
    ev = indices(0, BLOCK_EV, WIDE)
    q = load_tile(q_ptr + image * q_image, rows, e, q_row, q_col, L, E, EVEN_L, BLOCK_E)
    g = load_tile(g_ptr + image * g_image, rows, ev, g_row, g_col, L, EV, EVEN_L, BLOCK_EV)
    out = load_tile(out_ptr + image * out_image, rows, ev, out_row, out_col, L, EV, EVEN_L, BLOCK_EV)
    delta = tl.sum(g.to(ACC) * out.to(ACC), axis=1)
    tl.store(delta_ptr + image * L + rows, delta, mask=rows < L)
    shift, log_total = load_lse(lse_ptr + image * 2 * L, rows, L)

    dq = tl.zeros((BLOCK_L, BLOCK_E), ACC)
    for start in range(0, S, BLOCK_S):
        cols = indices(start, BLOCK_S, WIDE)
        k = load_tile(k_ptr + image * k_image, cols, e, k_row, k_col, S, E, EVEN_S, BLOCK_E)
        v = load_tile(v_ptr + image * v_image, cols, ev, v_row, v_col, S, EV, EVEN_S, BLOCK_EV)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        if not EVEN_S:
            score = tl.where(cols[None, :] < S, score, -float("inf"))
        p = tl.exp2(score * LOG2E - shift[:, None] - log_total[:, None])
        ds = p * (tl.dot(g, tl.trans(v), input_precision=PRECISION, out_dtype=ACC) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=ACC)
    store_tile(dq_ptr + image * dq_image, dq, rows, e, dq_row, dq_col, L, E, EVEN_L, BLOCK_E)


@triton.jit
def attention_backward_column_kernel(
    q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, g_ptr, dk_ptr, dv_ptr,
    L, S, splits, span,
    q_image, q_row, q_col, k_image, k_row, k_col, v_image, v_row, v_col,
    g_image, g_row, g_col, dk_image, dk_row, dk_col, dv_image, dv_row, dv_col,
    E: tl.constexpr, EV: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, EVEN_L: tl.constexpr, EVEN_S: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Computes BLOCK_S rows of dk and dv for one image. Grid: (B · splits · ⌈S / BLOCK_S⌉,). Runs after the row pass.

    A small batch has too few key tiles for a GPU, so queries are split too, `span` a program: image i · splits + n of
    the results has the part of image i that the n-th span gives.
    """
    tiles = tl.cdiv(S, BLOCK_S)
    part = (tl.program_id(0) // tiles).to(tl.int64)
    image = part // splits
    begin = (part % splits).to(tl.int32) * span
    cols = indices(tl.program_id(0) % tiles * BLOCK_S, BLOCK_S, WIDE)
    e = indices(0, BLOCK_E, WIDE)
    ev = indices(0, BLOCK_EV, WIDE)
    k = load_tile(k_ptr + image * k_image, cols, e, k_row, k_col, S, E, EVEN_S, BLOCK_E)
    v = load_tile(v_ptr + image * v_image, cols, ev, v_row, v_col, S, EV, EVEN_S, BLOCK_EV)

    dk = tl.zeros((BLOCK_S, BLOCK_E), ACC)
    dv = tl.zeros((BLOCK_S, BLOCK_EV), ACC)
    for start in range(begin, tl.minimum(begin + span, L), BLOCK_L):
        rows = indices(start, BLOCK_L, WIDE)
        q = load_tile(q_ptr + image * q_image, rows, e, q_row, q_col, L, E, EVEN_L, BLOCK_E)
        g = load_tile(g_ptr + image * g_image, rows, ev, g_row, g_col, L, EV, EVEN_L, BLOCK_EV)
        shift, log_total = load_lse(lse_ptr + image * 2 * L, rows, L)
        delta = tl.load(delta_ptr + image * L + rows, mask=rows < L, other=0.0)
        score = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=ACC)  # (BLOCK_S, BLOCK_L)
        if not EVEN_L:
            score = tl.where(rows[None, :] < L, score, -float("inf"))
        p = tl.exp2(score * LOG2E - shift[None, :] - log_total[None, :])
        dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION, out_dtype=ACC)
        ds = p * (tl.dot(v, tl.trans(g), input_precision=PRECISION, out_dtype=ACC) - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=ACC)
    store_tile(dk_ptr + part * dk_image, dk, cols, e, dk_row, dk_col, S, E, EVEN_S, BLOCK_E)
    store_tile(dv_ptr + part * dv_image, dv, cols, ev, dv_row, dv_col, S, EV, EVEN_S, BLOCK_EV)
