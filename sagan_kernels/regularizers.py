"""Terms added to the adversarial loss."""

import torch
from torch import Tensor, nn


def r1_penalty(discriminator: nn.Module, real: Tensor, label: Tensor | None) -> Tensor:
    """E[‖∇D(real)‖²]: the mean squared norm of the logit's gradient at real images, a scalar.

    Weigh it with γ/2. Differentiable: its gradient goes through the discriminator's double backward.

    Source: Mescheder et al., arXiv:1801.04406, equation 9.
    """
    real = real.detach().requires_grad_()
    (slope,) = torch.autograd.grad(discriminator(real, label).sum(), real, create_graph=True)
    return slope.square().sum((1, 2, 3)).mean()


def diversity_shortfall(images: Tensor, target: Tensor) -> Tensor:
    """How far pairs of images of one class are from being as different as real pairs are: a scalar from 0 to 1.

    Args:
        images: (2·P, C, H, W); image i and image P + i have the same label and different latents.
        target: (P,), the mean absolute pixel difference of two real images of that label.

    Returns:
        mean of max(0, 1 - |x - x'| / target). Zero where samples differ as much as real images do.

    Source: the pairwise idea of Mao et al. (mode seeking, arXiv:1903.05628) and Yang et al. (arXiv:1901.09024),
    bounded here by what the data has instead of by a constant.
    """
    first, second = images.chunk(2)
    distance = (first - second).abs().mean((1, 2, 3))
    return torch.relu(1 - distance / target).mean()
