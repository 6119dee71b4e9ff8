"""Functional operators: checks, choice of implementation, gradients. No state."""

from sagan_kernels.ops.attention import attention, sagan_attention
from sagan_kernels.ops.dispatch import Impl, choose, not_supported_reasons
from sagan_kernels.ops.resample import conv2d_avg_pool, upsample_conv2d, upsample_kernel

__all__ = [
    "Impl",
    "attention",
    "choose",
    "conv2d_avg_pool",
    "not_supported_reasons",
    "sagan_attention",
    "upsample_conv2d",
    "upsample_kernel",
]
