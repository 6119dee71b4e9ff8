"""Loads and stores of matrix tiles with any strides, shared by the attention kernels.

A matrix (rows, cols) of one image lies at `ptr + row · row_stride + col · col_stride`: NCHW feature maps have
row_stride 1 and col_stride H·W, NHWC maps row_stride C and col_stride 1. Both are read in place.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # the hardware's exponential is base 2
LN2 = tl.constexpr(0.6931471805599453)


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
