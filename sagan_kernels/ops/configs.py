"""How each attention kernel is cut into tiles: pure functions of widths, dtype and architecture.

The choice is made from tables, not by timing at run time: the same call always runs the same code, CUDA graphs can
capture it, and `benchmarks/static_report.py` can compile all that may ever run and count its registers.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sagan_kernels.ops.dispatch import interpreted

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
    num_warps: int
    num_stages: int


def width_block(width: int) -> int:
    """The power of two that holds `width`; `tl.dot` needs 16 lanes, and SAGAN's E = C/8 is 8 at C = 64."""
    return max(16, 1 << (width - 1).bit_length())


def value_part(kernel: Kernel, E: int, Ev: int, arithmetic: Arithmetic) -> int:
    """How many value columns one launch takes; wider values are cut, which is exact, since attention is linear in them."""
    return min(Ev, 128)


def tiling(kernel: Kernel, E: int, Ev: int, arithmetic: Arithmetic, arch: Arch) -> Tiling:
    """The tiling of `kernel` at key width E and value width Ev (at most `value_part`) for elements of `itemsize` bytes."""
    return Tiling(64, 64, 4, 2)


@dataclass(frozen=True)
class ProjectionTiling:
    """What one program of the pooled projection holds: block_s positions, block_o channels, block_c at a time."""

    block_s: int
    block_o: int
    block_c: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class LayerTiling:
    """What one program of the fused layer holds; channels of x come block_c at a time."""

    block_l: int
    block_s: int
    block_c: int
    num_warps: int
    num_stages: int


def projection_tiling(C: int, O: int, arithmetic: Arithmetic, arch: Arch) -> ProjectionTiling:  # noqa: E741
    """The tiling of the pooled projection from C to O channels."""
    return ProjectionTiling(32, min(width_block(O), 64), min(width_block(C), 64), 4, 2)


def layer_tiling(C: int, E: int, Ev: int, arithmetic: Arithmetic, arch: Arch) -> LayerTiling | None:
    """The tiling of the fused layer, or None where separate kernels are the faster choice."""
    if Ev > 128 or E > 64:
        return None
    return LayerTiling(64, 64, min(width_block(C), 64), 4, 2)


def architecture(device: torch.device) -> Arch:
    """The table to use on `device`; without a GPU, where kernels are interpreted, any will do."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
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
        allowed = torch.backends.fp32_precision
    return "tf32" if allowed == "tf32" else "tf32x3"
