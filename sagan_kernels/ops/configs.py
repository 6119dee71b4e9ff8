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


def value_part(kernel: Kernel, E: int, Ev: int) -> int:
    """How many value columns one launch takes; wider values are cut, which is exact, since attention is linear in them."""
    return min(Ev, 128)


def tiling(kernel: Kernel, E: int, Ev: int, itemsize: int, arch: Arch) -> Tiling:
    """The tiling of `kernel` at key width E and value width Ev (at most `value_part`) for elements of `itemsize` bytes."""
    return Tiling(64, 64, 4, 2)


def architecture(device: torch.device) -> Arch:
    """The table to use on `device`; without a GPU, where kernels are interpreted, any will do."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return "sm_80" if major == 8 else "sm_90" if major == 9 else "sm_100"


def precision(tensor: Tensor) -> str:
    """How float32 products are computed: TF32 only where PyTorch's own matmul precision allows it.

    Otherwise three TF32 products, whose error is float32's, as the tensor cores have no float32.
    """
    if tensor.dtype != torch.float32 or interpreted() or torch.version.hip:
        return "ieee"
    allowed = torch.backends.cuda.matmul.fp32_precision
    if allowed == "none":
        allowed = torch.backends.fp32_precision
    return "tf32" if allowed == "tf32" else "tf32x3"
