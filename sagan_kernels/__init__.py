"""Fused self-attention and spectral normalization for Self-Attention GANs, and a zoo of trained models."""

from sagan_kernels.conversion import convert_checkpoint
from sagan_kernels.models import Discriminator, Generator, create_model
from sagan_kernels.zoo import list_models

__all__ = ["Discriminator", "Generator", "__version__", "convert_checkpoint", "create_model", "list_models"]

__version__ = "0.1.0"
