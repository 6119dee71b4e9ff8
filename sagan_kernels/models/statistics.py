"""Batch-norm statistics that fit the latents a generator is sampled with."""

import copy

import torch
from torch import Tensor, nn

from sagan_kernels.models.sagan import Generator
from sagan_kernels.nn import ConditionalBatchNorm2d

STREAM = 2**31  # torch seeds its CPU generator with the low 32 bits
"""Added to the seed of standing statistics, so that they are not fitted on the latents that are then scored."""


def standing_statistics(
    generator: Generator,
    *,
    truncation: float | None = None,
    num_images: int = 512,
    batch_size: int = 64,
    seed: int = 0,
) -> Generator:
    """A copy of `generator` whose batch-norm statistics are those of `num_images` fresh samples, in eval mode.

    Averaged weights (EMA) and truncated latents both shift the activations away from the running statistics of
    training; sampling with those washes images out. Labels are uniformly random.

    Source: "standing statistics" of BigGAN, arXiv:1809.11096, appendix D.

    Args:
        generator: left as it is.
        truncation: as in `truncated_normal`.
        num_images: samples to average over, in batches of batch_size.
        batch_size: images a forward pass.
        seed: of the latents and labels; the same seed gives the same statistics.
    """
    generator = copy.deepcopy(generator).eval()
    for module in generator.modules():
        if isinstance(module, (ConditionalBatchNorm2d, nn.BatchNorm2d)):
            module.running_mean.zero_()  # type: ignore[union-attr]
            module.running_var.fill_(1)  # type: ignore[union-attr]
            module.num_batches_tracked.zero_()  # type: ignore[union-attr]
            module.momentum = None  # cumulative average
            module.train()  # only these: a training forward would advance the power iterations too
    random = torch.Generator().manual_seed(seed + STREAM)
    bias = generator.linear.bias
    z = truncated_normal((num_images, generator.z_dim), truncation, random).to(bias.device, bias.dtype)
    label = torch.randint(max(generator.num_classes, 1), (num_images,), generator=random).to(bias.device)
    with torch.no_grad():
        for at in torch.arange(num_images, device=bias.device).split(batch_size):
            generator(z[at], label[at] if generator.num_classes else None)
    for module in generator.modules():
        if isinstance(module, (ConditionalBatchNorm2d, nn.BatchNorm2d)):
            module.momentum = 0.1
    return generator.eval()


def truncated_normal(shape: tuple[int, ...], truncation: float | None, generator: torch.Generator) -> Tensor:
    """Standard normal numbers, those beyond `truncation` standard deviations redrawn; None for no limit.

    Source: the truncation trick, BigGAN, arXiv:1809.11096, section 3.1.

    Raises:
        ValueError: truncation is not positive.
    """
    if truncation is not None and not truncation > 0:
        raise ValueError(
            f"truncation: must be positive, got {truncation}; 0.5 to 2 is usual, leave it out for none"
        )
    z = torch.randn(shape, generator=generator)
    if truncation is None:
        return z
    # the inverse distribution function: exact, and its cost does not grow as the limit shrinks
    edge = torch.special.ndtr(torch.tensor(-truncation, dtype=torch.float64))
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64) * (1 - 2 * edge) + edge
    return torch.special.ndtri(uniform).float()
