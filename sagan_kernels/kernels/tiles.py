"""Loads and stores of matrix tiles with any strides, shared by the attention kernels.

A matrix (rows, cols) of one image lies at `ptr + row · row_stride + col · col_stride`: NCHW feature maps have
row_stride 1 and col_stride H·W, NHWC maps row_stride C and col_stride 1. Both are read in place.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # the hardware's exponential is base 2


@triton.jit
def load_tile(
    ptr, rows, cols, row_stride, col_stride, n_rows,
    N_COLS: tl.constexpr, EVEN_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Reads a (rows, cols) tile; what lies beyond the matrix is 0."""
    at = ptr + rows[:, None] * row_stride + cols[None, :] * col_stride
    if EVEN_ROWS and N_COLS == BLOCK_COLS:
        return tl.load(at)
    if EVEN_ROWS:
        return tl.load(at, mask=cols[None, :] < N_COLS, other=0.0)
    if N_COLS == BLOCK_COLS:
        return tl.load(at, mask=rows[:, None] < n_rows, other=0.0)
    return tl.load(at, mask=(rows[:, None] < n_rows) & (cols[None, :] < N_COLS), other=0.0)


@triton.jit
def store_tile(
    ptr, tile, rows, cols, row_stride, col_stride, n_rows,
    N_COLS: tl.constexpr, EVEN_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Writes a (rows, cols) tile in the dtype of the matrix, without what lies beyond it."""
    at = ptr + rows[:, None] * row_stride + cols[None, :] * col_stride
    tile = tile.to(ptr.dtype.element_ty)
    if EVEN_ROWS and N_COLS == BLOCK_COLS:
        tl.store(at, tile)
    else:
        tl.store(at, tile, mask=(rows[:, None] < n_rows) & (cols[None, :] < N_COLS))


@triton.jit
def indices(start, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """start, start + 1, ...; in int64 where an offset within one image may pass 2³¹."""
    at = start + tl.arange(0, BLOCK)
    if WIDE:
        at = at.to(tl.int64)
    return at


@triton.jit
def store_lse(lse_ptr, rows, n_rows, peak, total):
    """Writes a row's log2-sum-exp as two numbers, (2, n_rows): the maximum, and what the sum adds to it.

    In one float32 a sum near 1e4 would be off by 1e-3, and every probability of the row with it. SAGAN's logits are
    unscaled, so such sums occur.
    """
    tl.store(lse_ptr + rows, finite_or_zero(peak), mask=rows < n_rows)
    tl.store(lse_ptr + n_rows + rows, tl.log2(total), mask=rows < n_rows)


@triton.jit
def load_lse(lse_ptr, rows, n_rows):
    """Reads what `store_lse` wrote; the probabilities of rows beyond the matrix will be 0."""
    shift = tl.load(lse_ptr + rows, mask=rows < n_rows, other=float("inf"))
    return shift, tl.load(lse_ptr + n_rows + rows, mask=rows < n_rows, other=0.0)


@triton.jit
def finite_or_zero(peak):
    """What to subtract from scores; a row of -inf so far must not become NaN, for finite ones may follow."""
    return tl.where(peak == -float("inf"), 0.0, peak)
