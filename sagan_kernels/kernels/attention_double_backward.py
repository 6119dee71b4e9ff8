"""Attention double backward: the gradient of <dq, a> + <dk, b> + <dv, c>, in one row pass and one column pass.

dq, dk, dv are the gradients of <softmax(q kᵀ) v, g>, and a, b, c the cotangents that a gradient penalty sends them.

Shapes   q, a, q2 (B, L, E)   k, b, k2 (B, S, E)   v, c, v2 (B, S, Ev)   out, g, g2 (B, L, Ev)
         lse (B, 2, L)   r, x_sum (B, L)
Traffic  the row pass reads k, b, v, c ⌈L / BLOCK_L⌉ times, the column pass q, a, g ⌈S / BLOCK_S⌉ times.
Maths    P = exp(q kᵀ - lse)   delta = Σ g ∘ out   T = a kᵀ + q bᵀ   r = Σ P ∘ T   D = g vᵀ - delta
         X = P ∘ ((T - r) ∘ D + g cᵀ)   X -= P ΣX
         q2 = X k + (P ∘ D) b       g2 = (P ∘ (T - r)) v + P c
         k2 = Xᵀ q + (P ∘ D)ᵀ a     v2 = (P ∘ (T - r))ᵀ g
         The row pass does not know r and ΣX before its end; both enter linearly, so it corrects q2 by r dq + ΣX P k
         and g2 by r out. g2 is also the derivative of out in the direction (a, b, c).
Source   derived for this library by differentiating arXiv:2205.14135, appendix B.
"""

import triton
import triton.language as tl

from sagan_kernels.kernels.tiles import LOG2E, indices, load_lse, load_tile, store_tile


@triton.jit
def attention_double_backward_row_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, g_ptr, dq_ptr, a_ptr, b_ptr, c_ptr,
    q2_ptr, g2_ptr, delta_ptr, r_ptr, x_sum_ptr,
    L, S,
    q_image, q_row, q_col, k_image, k_row, k_col, v_image, v_row, v_col, out_image, out_row, out_col,
    g_image, g_row, g_col, dq_image, dq_row, dq_col, a_image, a_row, a_col, b_image, b_row, b_col,
    c_image, c_row, c_col, q2_image, q2_row, q2_col, g2_image, g2_row, g2_col,
    E: tl.constexpr, EV: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, EVEN_L: tl.constexpr, EVEN_S: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Computes BLOCK_L rows of q2, g2, delta, r and ΣX for one image. Grid: (B · ⌈L / BLOCK_L⌉,)."""
    tiles = tl.cdiv(L, BLOCK_L)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    rows = indices(tl.program_id(0) % tiles * BLOCK_L, BLOCK_L, WIDE)
    e = indices(0, BLOCK_E, WIDE)
    ev = indices(0, BLOCK_EV, WIDE)
    q = load_tile(q_ptr + image * q_image, rows, e, q_row, q_col, L, E, EVEN_L, BLOCK_E)
    a = load_tile(a_ptr + image * a_image, rows, e, a_row, a_col, L, E, EVEN_L, BLOCK_E)
    g = load_tile(g_ptr + image * g_image, rows, ev, g_row, g_col, L, EV, EVEN_L, BLOCK_EV)
    out = load_tile(out_ptr + image * out_image, rows, ev, out_row, out_col, L, EV, EVEN_L, BLOCK_EV)
    delta = tl.sum(g.to(ACC) * out.to(ACC), axis=1)
    shift, log_total = load_lse(lse_ptr + image * 2 * L, rows, L)

    q2, pk = tl.zeros((BLOCK_L, BLOCK_E), ACC), tl.zeros((BLOCK_L, BLOCK_E), ACC)
    g2 = tl.zeros((BLOCK_L, BLOCK_EV), ACC)
    r, x_sum = tl.zeros((BLOCK_L,), ACC), tl.zeros((BLOCK_L,), ACC)
    for start in range(0, S, BLOCK_S):
        cols = indices(start, BLOCK_S, WIDE)
        k = load_tile(k_ptr + image * k_image, cols, e, k_row, k_col, S, E, EVEN_S, BLOCK_E)
        b = load_tile(b_ptr + image * b_image, cols, e, b_row, b_col, S, E, EVEN_S, BLOCK_E)
        v = load_tile(v_ptr + image * v_image, cols, ev, v_row, v_col, S, EV, EVEN_S, BLOCK_EV)
        c = load_tile(c_ptr + image * c_image, cols, ev, c_row, c_col, S, EV, EVEN_S, BLOCK_EV)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        if not EVEN_S:
            score = tl.where(cols[None, :] < S, score, -float("inf"))
        p = tl.exp2(score * LOG2E - shift[:, None] - log_total[:, None])
        t = tl.dot(a, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        t = tl.dot(q, tl.trans(b), t, input_precision=PRECISION, out_dtype=ACC)
        pt = p * t
        r += tl.sum(pt, axis=1)
        g2 = tl.dot(pt.to(v.dtype), v, g2, input_precision=PRECISION, out_dtype=ACC)
        g2 = tl.dot(p.to(c.dtype), c, g2, input_precision=PRECISION, out_dtype=ACC)
        pk = tl.dot(p.to(k.dtype), k, pk, input_precision=PRECISION, out_dtype=ACC)
        d = tl.dot(g, tl.trans(v), input_precision=PRECISION, out_dtype=ACC) - delta[:, None]
        x = pt * d + p * tl.dot(g, tl.trans(c), input_precision=PRECISION, out_dtype=ACC)
        x_sum += tl.sum(x, axis=1)
        q2 = tl.dot(x.to(k.dtype), k, q2, input_precision=PRECISION, out_dtype=ACC)
        q2 = tl.dot((p * d).to(b.dtype), b, q2, input_precision=PRECISION, out_dtype=ACC)

    dq = load_tile(dq_ptr + image * dq_image, rows, e, dq_row, dq_col, L, E, EVEN_L, BLOCK_E)
    q2 -= r[:, None] * dq.to(ACC) + x_sum[:, None] * pk
    g2 -= r[:, None] * out.to(ACC)
    store_tile(q2_ptr + image * q2_image, q2, rows, e, q2_row, q2_col, L, E, EVEN_L, BLOCK_E)
    store_tile(g2_ptr + image * g2_image, g2, rows, ev, g2_row, g2_col, L, EV, EVEN_L, BLOCK_EV)
    tl.store(delta_ptr + image * L + rows, delta, mask=rows < L)
    tl.store(r_ptr + image * L + rows, r, mask=rows < L)
    tl.store(x_sum_ptr + image * L + rows, x_sum, mask=rows < L)


@triton.jit
def attention_double_backward_column_kernel(
    q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, r_ptr, x_sum_ptr, g_ptr, a_ptr, b_ptr, c_ptr, k2_ptr, v2_ptr,
    L, S, splits, span,
    q_image, q_row, q_col, k_image, k_row, k_col, v_image, v_row, v_col, g_image, g_row, g_col,
    a_image, a_row, a_col, b_image, b_row, b_col, c_image, c_row, c_col,
    k2_image, k2_row, k2_col, v2_image, v2_row, v2_col,
    E: tl.constexpr, EV: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, EVEN_L: tl.constexpr, EVEN_S: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Computes BLOCK_S rows of k2 and v2 for one image. Grid: (B · splits · ⌈S / BLOCK_S⌉,). Runs after the row pass.

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
    b = load_tile(b_ptr + image * b_image, cols, e, b_row, b_col, S, E, EVEN_S, BLOCK_E)
    v = load_tile(v_ptr + image * v_image, cols, ev, v_row, v_col, S, EV, EVEN_S, BLOCK_EV)
    c = load_tile(c_ptr + image * c_image, cols, ev, c_row, c_col, S, EV, EVEN_S, BLOCK_EV)

    k2 = tl.zeros((BLOCK_S, BLOCK_E), ACC)
    v2 = tl.zeros((BLOCK_S, BLOCK_EV), ACC)
    for start in range(begin, tl.minimum(begin + span, L), BLOCK_L):
        rows = indices(start, BLOCK_L, WIDE)
        q = load_tile(q_ptr + image * q_image, rows, e, q_row, q_col, L, E, EVEN_L, BLOCK_E)
        a = load_tile(a_ptr + image * a_image, rows, e, a_row, a_col, L, E, EVEN_L, BLOCK_E)
        g = load_tile(g_ptr + image * g_image, rows, ev, g_row, g_col, L, EV, EVEN_L, BLOCK_EV)
        shift, log_total = load_lse(lse_ptr + image * 2 * L, rows, L)
        delta = tl.load(delta_ptr + image * L + rows, mask=rows < L, other=0.0)
        r = tl.load(r_ptr + image * L + rows, mask=rows < L, other=0.0)
        x_sum = tl.load(x_sum_ptr + image * L + rows, mask=rows < L, other=0.0)
        score = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=ACC)  # (BLOCK_S, BLOCK_L)
        if not EVEN_L:
            score = tl.where(rows[None, :] < L, score, -float("inf"))
        p = tl.exp2(score * LOG2E - shift[None, :] - log_total[None, :])
        t = tl.dot(k, tl.trans(a), input_precision=PRECISION, out_dtype=ACC)
        t = tl.dot(b, tl.trans(q), t, input_precision=PRECISION, out_dtype=ACC)
        pt = p * (t - r[None, :])
        v2 = tl.dot(pt.to(g.dtype), g, v2, input_precision=PRECISION, out_dtype=ACC)
        d = tl.dot(v, tl.trans(g), input_precision=PRECISION, out_dtype=ACC) - delta[None, :]
        u = tl.dot(c, tl.trans(g), input_precision=PRECISION, out_dtype=ACC) - x_sum[None, :]
        x = pt * d + p * u
        k2 = tl.dot(x.to(q.dtype), q, k2, input_precision=PRECISION, out_dtype=ACC)
        k2 = tl.dot((p * d).to(a.dtype), a, k2, input_precision=PRECISION, out_dtype=ACC)
    store_tile(k2_ptr + part * k2_image, k2, cols, e, k2_row, k2_col, S, E, EVEN_S, BLOCK_E)
    store_tile(v2_ptr + part * v2_image, v2, cols, ev, v2_row, v2_col, S, EV, EVEN_S, BLOCK_EV)


@triton.jit
def attention_tangent_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, a_ptr, b_ptr, c_ptr, g2_ptr,
    L, S,
    q_image, q_row, q_col, k_image, k_row, k_col, v_image, v_row, v_col, out_image, out_row, out_col,
    a_image, a_row, a_col, b_image, b_row, b_col, c_image, c_row, c_col, g2_image, g2_row, g2_col,
    E: tl.constexpr, EV: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, EVEN_L: tl.constexpr, EVEN_S: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Computes BLOCK_L rows of g2, the derivative of out in direction (a, b, c). Grid: (B · ⌈L / BLOCK_L⌉,)."""
    tiles = tl.cdiv(L, BLOCK_L)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    rows = indices(tl.program_id(0) % tiles * BLOCK_L, BLOCK_L, WIDE)
    e = indices(0, BLOCK_E, WIDE)
    ev = indices(0, BLOCK_EV, WIDE)
    q = load_tile(q_ptr + image * q_image, rows, e, q_row, q_col, L, E, EVEN_L, BLOCK_E)
    a = load_tile(a_ptr + image * a_image, rows, e, a_row, a_col, L, E, EVEN_L, BLOCK_E)
    shift, log_total = load_lse(lse_ptr + image * 2 * L, rows, L)

    g2 = tl.zeros((BLOCK_L, BLOCK_EV), ACC)
    r = tl.zeros((BLOCK_L,), ACC)
    for start in range(0, S, BLOCK_S):
        cols = indices(start, BLOCK_S, WIDE)
        k = load_tile(k_ptr + image * k_image, cols, e, k_row, k_col, S, E, EVEN_S, BLOCK_E)
        b = load_tile(b_ptr + image * b_image, cols, e, b_row, b_col, S, E, EVEN_S, BLOCK_E)
        v = load_tile(v_ptr + image * v_image, cols, ev, v_row, v_col, S, EV, EVEN_S, BLOCK_EV)
        c = load_tile(c_ptr + image * c_image, cols, ev, c_row, c_col, S, EV, EVEN_S, BLOCK_EV)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        if not EVEN_S:
            score = tl.where(cols[None, :] < S, score, -float("inf"))
        p = tl.exp2(score * LOG2E - shift[:, None] - log_total[:, None])
        t = tl.dot(a, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        t = tl.dot(q, tl.trans(b), t, input_precision=PRECISION, out_dtype=ACC)
        pt = p * t
        r += tl.sum(pt, axis=1)
        g2 = tl.dot(pt.to(v.dtype), v, g2, input_precision=PRECISION, out_dtype=ACC)
        g2 = tl.dot(p.to(c.dtype), c, g2, input_precision=PRECISION, out_dtype=ACC)
    out = load_tile(out_ptr + image * out_image, rows, ev, out_row, out_col, L, EV, EVEN_L, BLOCK_EV)
    g2 -= r[:, None] * out.to(ACC)
    store_tile(g2_ptr + image * g2_image, g2, rows, ev, g2_row, g2_col, L, EV, EVEN_L, BLOCK_EV)
