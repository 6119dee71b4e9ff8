"""Drop-in modules: parameters, buffers and names around the operators of `sagan_kernels.ops`."""

from sagan_kernels.nn.attention import PaperSelfAttention2d, SelfAttention2d
from sagan_kernels.nn.batch_norm import ConditionalBatchNorm2d
from sagan_kernels.nn.spectral_norm import fold_spectral_norm, spectral_norm

__all__ = [
    "ConditionalBatchNorm2d",
    "PaperSelfAttention2d",
    "SelfAttention2d",
    "fold_spectral_norm",
    "spectral_norm",
]
