"""Checkpoints of other projects into our networks, and ours into theirs."""

from sagan_kernels.conversion.convert import Conversion, convert_checkpoint

__all__ = ["Conversion", "convert_checkpoint"]
