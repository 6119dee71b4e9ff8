"""Drop-in modules: parameters, buffers and names around the operators of `sagan_kernels.ops`."""

from sagan_kernels.nn.attention import PaperSelfAttention2d, SelfAttention2d
from sagan_kernels.nn.batch_norm import ConditionalBatchNorm2d
from sagan_kernels.nn.spectral_norm import spectral_norm, spectral_norms
from sagan_kernels.nn.spectral_norm_folding import fold_spectral_norm, unfold_spectral_norm
from sagan_kernels.nn.spectral_norm_group import (
    SpectralNormGroup,
    group_spectral_norm,
    ungroup_spectral_norm,
)

__all__ = [
    "ConditionalBatchNorm2d",
    "PaperSelfAttention2d",
    "SelfAttention2d",
    "SpectralNormGroup",
    "fold_spectral_norm",
    "group_spectral_norm",
    "spectral_norm",
    "spectral_norms",
    "unfold_spectral_norm",
    "ungroup_spectral_norm",
]
