"""A 3×3 convolution next to a change of resolution, as one 4×4 stride-2 convolution: 2.25× fewer operations.

Enlarging by nearest neighbor repeats each input twice, and pooling averages each output twice, so in both cases
neighboring taps of the 3×3 kernel meet the same pixel. Adding those taps up beforehand gives a 4-tap kernel a side,
which is the 3-tap kernel convolved with (1, 1). Exact, linear in the weight, differentiable to every order.
"""

import torch.nn.functional as F
from torch import Tensor

from sagan_kernels import reference
from sagan_kernels.ops.dispatch import Impl, choose


def upsample_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: Impl | None = None
) -> Tensor:
    """A 3×3 convolution, zero-padded, of x enlarged twice by nearest neighbor.

    Args:
        x: (B, C, H, W).
        weight: (K, C, 3, 3).
        bias: (K,) or None.
        impl: "torch", "reference", or None to choose.

    Returns:
        (B, K, 2H, 2W).

    Gradients: of every order.
    """
    if choose(impl, x) == "reference" or not _pays(x):
        return reference.upsample_conv2d(x, weight, bias)
    return F.conv_transpose2d(x, upsample_kernel(weight), bias, stride=2, padding=1)


def upsample_kernel(weight: Tensor) -> Tensor:
    """(K, C, 3, 3) -> (C, K, 4, 4): the transposed convolution equal to `upsample_conv2d`."""
    return _box(weight.flip(2, 3)).transpose(0, 1)


def conv2d_avg_pool(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: Impl | None = None
) -> Tensor:
    """The 2×2 average pool of a 3×3 convolution, zero-padded.

    Args:
        x: (B, C, H, W), H and W at least 2.
        weight: (K, C, 3, 3).
        bias: (K,) or None.
        impl: "torch", "reference", or None to choose.

    Returns:
        (B, K, ⌊H/2⌋, ⌊W/2⌋).

    Gradients: of every order.
    """
    if choose(impl, x) == "reference" or not _pays(x):
        return reference.conv2d_avg_pool(x, weight, bias)
    return F.conv2d(x, _box(weight) / 4, bias, stride=2, padding=1)


def _pays(x: Tensor) -> bool:
    """Whether there are enough positions to make up for the new kernel, which costs passes over the weight."""
    return x.shape[0] * x.shape[2] * x.shape[3] >= 512


def _box(weight: Tensor) -> Tensor:
    """(K, C, 3, 3) -> (K, C, 4, 4): full convolution with a 2×2 kernel of ones."""
    tall = F.pad(weight, (0, 0, 0, 1)) + F.pad(weight, (0, 0, 1, 0))
    return F.pad(tall, (0, 1)) + F.pad(tall, (1, 0))
