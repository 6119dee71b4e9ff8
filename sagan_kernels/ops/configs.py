"""How each kernel is cut into tiles: pure functions of widths, arithmetic and architecture.

The choice is made from tables, not by timing at run time: the same call always runs the same code, CUDA graphs can
capture it, and `benchmarks/static_report.py` can compile all that may ever run and count its registers. The tables
hold the largest tiles that were found to compile without spilling registers and to leave room for two programs on a
multiprocessor; rows that also name warps and stages were timed, on the GPU that stands above them.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sagan_kernels.ops.dispatch import capability, interpreted

Kernel = Literal["forward", "lse", "over_queries", "row", "column", "double_row", "double_column", "tangent"]
Arch = Literal["sm_80", "sm_90", "sm_100", "gfx942"]
"""The architectures that tables are kept for; others take those of the nearest older one."""

Arithmetic = Literal["half", "tf32", "tf32x3", "ieee"]
"""How products are computed: on 16-bit inputs, with one TF32 product, with three, or in the inputs' own precision."""


@dataclass(frozen=True)
class Tiling:
    """What one program of a kernel holds: block_l query rows, block_s key rows, num_warps warps."""

    block_l: int
    block_s: int
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class ProjectionTiling:
    """What one program of the pooled projection holds: block_s positions, block_k channels, block_c at a time."""

    block_s: int
    block_k: int
    block_c: int
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class LayerTiling:
    """What one program of the fused layer holds; channels of x come block_c at a time."""

    block_l: int
    block_s: int
    block_c: int
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class SpectralNormTiling:
    """What one program of the spectral-norm kernels holds.

    Attributes:
        rows: rows of a product W v, row_span columns at a time.
        row_span: see rows.
        columns: columns of a product Wᵀu, column_span rows at a time.
        column_span: see columns.
        block: elements of a weight, where it is divided or its gradient is computed.
        block_t: partial sums added at a time.
        warps: of every program.
    """

    rows: int = 8
    row_span: int = 128
    columns: int = 64
    column_span: int = 32
    block: int = 2048
    block_t: int = 256
    warps: int = 4


_PROGRAMS = 256  # about two for each multiprocessor of a large GPU

SPECTRAL_NORM = SpectralNormTiling()

# For each kernel rows of (widest key, widest value part, block_l, block_s[, num_warps, num_stages]), the first that is
# wide enough counts.
_Table = dict[Kernel, tuple[tuple[int, ...], ...]]

# NVIDIA H100 80GB HBM3, torch 2.11.0+cu130, triton 3.6.0, 2026-11-27, B 16, L 4096, S 1024:
# python -m benchmarks.tune --minutes 4.7 --arithmetic half tf32x3; times in benchmarks/results/tuned_h100.json
_HALF_90: _Table = {
    "forward": (
        (16, 32, 64, 64, 4, 3),
        (16, 64, 128, 64, 4, 3),
        (16, 128, 64, 64, 4, 3),
        (32, 64, 64, 64, 4, 3),
        (32, 128, 64, 64, 4, 3),
        (64, 32, 64, 128),
        (64, 128, 128, 64, 4, 3),
        (256, 128, 32, 32),
    ),
    "lse": ((64, 0, 64, 128), (256, 0, 32, 64)),
    "over_queries": ((64, 64, 64, 128), (64, 128, 64, 32), (256, 128, 32, 32)),
    "row": (
        (16, 32, 64, 64, 4, 3),
        (16, 64, 64, 64, 4, 3),
        (16, 128, 64, 64, 4, 3),
        (32, 64, 64, 64, 4, 3),
        (32, 128, 128, 64, 4, 3),
        (64, 128, 128, 64, 4, 2),
        (256, 128, 32, 32),
    ),
    "column": (
        (16, 32, 128, 64, 4, 3),
        (16, 64, 128, 64, 4, 3),
        (16, 128, 64, 64, 4, 3),
        (32, 64, 128, 64, 4, 2),
        (32, 128, 64, 64, 4, 3),
        (64, 128, 64, 64, 4, 3),
        (256, 128, 32, 32),
    ),
    "double_row": (
        (16, 32, 64, 64, 4, 3),
        (16, 64, 64, 64, 4, 3),
        (32, 64, 64, 64, 4, 3),
        (64, 64, 32, 32),
        (256, 64, 16, 16),
    ),
    "double_column": (
        (16, 32, 64, 64, 4, 2),
        (16, 64, 64, 64, 4, 2),
        (32, 64, 64, 64, 4, 2),
        (64, 64, 32, 64),
        (256, 64, 16, 16),
    ),
    "tangent": ((32, 128, 64, 64), (64, 128, 64, 32), (256, 128, 16, 32)),
}
_HALF_100: _Table = {
    "forward": ((64, 32, 64, 128), (64, 128, 64, 64), (256, 128, 32, 32)),
    "lse": ((64, 0, 64, 128), (256, 0, 32, 64)),
    "over_queries": ((64, 64, 64, 128), (64, 128, 64, 32), (256, 128, 32, 32)),
    "row": ((64, 128, 64, 64), (256, 128, 32, 32)),
    "column": ((32, 128, 64, 64), (64, 128, 32, 64), (256, 128, 32, 32)),
    "double_row": ((32, 64, 64, 32), (64, 64, 32, 32), (256, 64, 16, 16)),
    "double_column": ((16, 64, 64, 64), (64, 64, 32, 64), (256, 64, 16, 16)),
    "tangent": ((32, 128, 64, 64), (64, 128, 64, 32), (256, 128, 16, 32)),
}
_HALF_80: _Table = {
    "forward": ((64, 32, 64, 64), (32, 128, 64, 32), (64, 128, 32, 64), (256, 128, 32, 32)),
    "lse": ((64, 0, 64, 128), (256, 0, 32, 64)),
    "over_queries": (
        (64, 32, 64, 128),
        (32, 64, 64, 64),
        (32, 128, 64, 32),
        (64, 128, 32, 64),
        (256, 128, 32, 32),
    ),
    "row": ((64, 128, 64, 64), (256, 128, 32, 32)),
    "column": ((64, 64, 64, 64), (32, 128, 32, 64), (64, 128, 32, 32), (256, 128, 32, 32)),
    "double_row": ((16, 64, 64, 32), (32, 64, 16, 32), (64, 64, 32, 32), (256, 64, 16, 16)),
    "double_column": ((16, 64, 64, 64), (64, 64, 32, 32), (256, 64, 16, 16)),
    "tangent": ((32, 32, 64, 64), (64, 128, 64, 32), (256, 128, 16, 32)),
}
_TF32_90: _Table = {
    "forward": ((64, 128, 64, 64), (256, 128, 32, 32)),
    "lse": ((32, 0, 64, 128), (64, 0, 64, 64), (256, 0, 32, 32)),
    "over_queries": ((64, 128, 64, 64), (256, 128, 32, 32)),
    "row": ((64, 64, 64, 64), (256, 64, 16, 32)),
    "column": ((16, 32, 64, 64), (64, 64, 32, 64), (256, 64, 16, 32)),
    "double_row": ((16, 32, 64, 32), (64, 32, 16, 32), (256, 32, 16, 16)),
    "double_column": ((64, 32, 32, 64), (256, 32, 16, 16)),
    "tangent": ((64, 64, 64, 32), (256, 64, 16, 32)),
}
# As _HALF_90, the column and double passes by runs of their own. Four warps only: with eight Triton 3.6 computes some
# of these products wrongly, or writes where it must not.
_TF32X3_90: _Table = {
    "forward": ((16, 32, 128, 64, 4, 3), (64, 64, 64, 64), (256, 64, 32, 32)),
    "lse": ((32, 0, 64, 128), (64, 0, 64, 64), (256, 0, 32, 32)),
    "over_queries": ((64, 64, 64, 64), (256, 64, 32, 32)),
    "row": ((16, 32, 128, 64, 4, 2), (32, 64, 64, 64), (64, 64, 64, 32), (256, 64, 16, 32)),
    "column": ((16, 64, 32, 64, 4, 1), (64, 32, 32, 64), (256, 32, 16, 32)),
    "double_row": ((16, 32, 64, 32, 4, 1), (32, 32, 16, 32), (64, 32, 16, 16), (256, 32, 16, 16)),
    "double_column": ((16, 32, 32, 64, 4, 1), (32, 32, 32, 64), (64, 32, 32, 32), (256, 32, 16, 16)),
    "tangent": ((64, 64, 64, 32), (256, 64, 16, 32)),
}
_TF32X3_100: _Table = {
    "forward": ((64, 64, 64, 64), (256, 64, 32, 32)),
    "lse": ((32, 0, 64, 128), (64, 0, 64, 64), (256, 0, 32, 32)),
    "over_queries": ((64, 64, 64, 64), (256, 64, 32, 32)),
    "row": ((32, 64, 64, 64), (64, 64, 64, 32), (256, 64, 16, 32)),
    "column": ((64, 32, 32, 64), (256, 32, 16, 32)),
    "double_row": ((16, 32, 64, 16), (32, 32, 16, 32), (64, 32, 16, 16), (256, 32, 16, 16)),
    "double_column": ((32, 32, 32, 64), (64, 32, 32, 32), (256, 32, 16, 16)),
    "tangent": ((64, 64, 64, 32), (256, 64, 16, 32)),
}
_TF32X3_80: _Table = {
    "forward": ((32, 64, 64, 32), (64, 64, 32, 32), (256, 64, 32, 32)),
    "lse": ((32, 0, 64, 64), (64, 0, 64, 32), (256, 0, 32, 32)),
    "over_queries": ((32, 64, 64, 32), (64, 64, 32, 32), (256, 64, 32, 32)),
    "row": ((32, 32, 64, 32), (256, 32, 16, 32)),
    "column": ((16, 16, 32, 64), (64, 32, 32, 32), (256, 32, 16, 32)),
    "double_row": ((16, 32, 64, 16), (32, 32, 16, 32), (64, 32, 16, 16), (256, 32, 16, 16)),
    "double_column": ((32, 32, 16, 64), (64, 32, 32, 16), (256, 32, 16, 16)),
    "tangent": ((32, 32, 64, 32), (256, 32, 16, 32)),
}
_TABLES: dict[tuple[Arithmetic, Arch], _Table] = {
    ("half", "sm_80"): _HALF_80,
    ("half", "sm_90"): _HALF_90,
    ("half", "sm_100"): _HALF_100,
    ("half", "gfx942"): _HALF_80,
    ("tf32", "sm_80"): _TF32X3_80,
    ("tf32", "sm_90"): _TF32_90,
    ("tf32", "sm_100"): _TF32_90,
    ("tf32x3", "sm_80"): _TF32X3_80,
    ("tf32x3", "sm_90"): _TF32X3_90,
    ("tf32x3", "sm_100"): _TF32X3_100,
    ("ieee", "gfx942"): _TF32X3_80,
    ("ieee", "sm_90"): _HALF_100,  # the interpreter
}


def width_block(width: int) -> int:
    """The power of two that holds `width`; `tl.dot` needs 16 lanes, and SAGAN's E = C/8 is 8 at C = 64."""
    return max(16, 1 << (int(width) - 1).bit_length())  # torch.jit.trace gives sizes as tensors


@functools.lru_cache(maxsize=1024)
def value_part(kernel: Kernel, E: int, Ev: int, arithmetic: Arithmetic, arch: Arch) -> int:
    """How many value columns one launch takes. Wider values are cut, which is exact: attention is linear in them."""
    return min(Ev, max(row[1] for row in _TABLES[arithmetic, arch][kernel] if row[0] >= E))


def tiling(kernel: Kernel, E: int, Ev: int, arithmetic: Arithmetic, arch: Arch) -> Tiling:
    """The tiling of `kernel` for keys of width E, at most 256, and values of width Ev, at most `value_part`."""
    for widest_key, widest_value, *tile in _TABLES[arithmetic, arch][kernel]:
        if width_block(E) <= widest_key and (kernel == "lse" or width_block(Ev) <= widest_value):
            return Tiling(*tile)
    raise AssertionError(f"no tiling of {kernel} for E {E}, Ev {Ev}")


@functools.lru_cache(maxsize=1024)
def column_splits(
    kernel: Kernel, B: int, L: int, S: int, E: int, Ev: int, arithmetic: Arithmetic, arch: Arch
) -> int:
    """Into how many parts a column pass cuts the query positions: more than one where key tiles do not fill a GPU.

    A part has four tiles of queries or more, since results are summed over parts.
    """
    tile = tiling(kernel, E, Ev, arithmetic, arch)
    programs = max(1, B * -(-S // tile.block_s))
    return 1 if programs >= _PROGRAMS // 2 else max(1, min(_PROGRAMS // programs, L // (4 * tile.block_l)))


def projection_tiling(C: int, K: int, arithmetic: Arithmetic, arch: Arch) -> ProjectionTiling:
    """The tiling of the pooled projection from C to K channels."""
    block_k, block_c = min(max(width_block(K), 32), 64), min(width_block(C), 32)
    stages = 3 if arithmetic == "half" and arch == "sm_90" else 2
    return ProjectionTiling(32 if arithmetic in ("half", "tf32") else 16, block_k, block_c, num_stages=stages)


def layer_tiling(C: int, E: int, Ev: int, arithmetic: Arithmetic, arch: Arch) -> LayerTiling | None:
    """The tiling of the fused layer, or None where separate kernels are the faster choice.

    The output of all value columns must fit one program's registers, so that the out projection can follow.
    """
    E, Ev = width_block(E), width_block(Ev)
    if E > 64 or Ev > (128 if arithmetic in ("half", "tf32") else 64):
        return None
    block_c = min(width_block(C), 64)
    if arithmetic == "half" and arch == "sm_90":  # timed as _HALF_90 was
        return LayerTiling(64, 128 if Ev <= 32 else 64, block_c, num_stages=3)
    if arithmetic == "half" and arch != "sm_80" and Ev <= 64:
        return LayerTiling(64, 128, block_c)
    if arithmetic in ("half", "tf32"):
        return LayerTiling(64, 64, block_c)
    if arch == "sm_80":
        return LayerTiling(32, 32, min(block_c, 16)) if E < 64 else None
    return LayerTiling(64, 32, min(block_c, 32))


def architecture(device: torch.device) -> Arch:
    """The table to use on `device`; without a GPU, where kernels are interpreted, any will do."""
    if device.type != "cuda" or interpreted():
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    major = capability(torch.cuda.current_device() if device.index is None else device.index)[0]
    return "sm_80" if major == 8 else "sm_90" if major == 9 else "sm_100"


def arithmetic(tensor: Tensor) -> Arithmetic:
    """How products with `tensor` are computed: float32 by TF32 only where PyTorch's matmul precision allows it.

    Otherwise by three TF32 products, whose error is float32's, as NVIDIA's tensor cores have no float32.
    """
    if tensor.dtype in (torch.float16, torch.bfloat16):
        return "half"
    if tensor.dtype == torch.float64 or interpreted() or torch.version.hip:
        return "ieee"
    allowed = torch.backends.cuda.matmul.fp32_precision
    if allowed == "none":
        allowed = torch.backends.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if allowed == "tf32" else "tf32x3"
