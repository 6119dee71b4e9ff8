"""Our layers inside other people's GANs: their modules, parameters and checkpoints, our operators."""

from sagan_kernels.swapping.report import Row, SwapReport
from sagan_kernels.swapping.swap import swap_layers, unswap_layers

__all__ = ["Row", "SwapReport", "swap_layers", "unswap_layers"]
