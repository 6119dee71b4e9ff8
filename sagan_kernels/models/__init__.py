"""SAGAN's generator and discriminator."""

from sagan_kernels.models.sagan import Discriminator, Generator

__all__ = ["Discriminator", "Generator"]
