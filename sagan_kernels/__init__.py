"""Fused self-attention and spectral normalization for Self-Attention GANs, and a zoo of trained models."""

from typing import TYPE_CHECKING, Any

from sagan_kernels.conversion import convert_checkpoint
from sagan_kernels.models import Discriminator, Generator, create_model
from sagan_kernels.zoo import list_models

if TYPE_CHECKING:
    from sagan_kernels.swapping import SwapReport, swap_layers, unswap_layers

__all__ = [
    "Discriminator",
    "Generator",
    "SwapReport",
    "__version__",
    "convert_checkpoint",
    "create_model",
    "list_models",
    "swap_layers",
    "unswap_layers",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("SwapReport", "swap_layers", "unswap_layers"):  # imported when they are asked for
        from sagan_kernels import swapping

        return getattr(swapping, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
