"""Differentiable augmentation of what the discriminator sees, real and fake alike.

Source: Zhao et al., "Differentiable Augmentation for Data-Efficient GAN Training", arXiv:2006.10738: the policies and
their ranges. Random numbers come from a given generator, so a resumed run repeats them.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def diff_augment(x: Tensor, policy: tuple[str, ...], generator: Generator) -> Tensor:
    """Apply the named augmentations in order, each with its own random draw an image.

    Args:
        x: (B, C, H, W) in [-1, 1].
        policy: any of "color", "translation", "cutout".
        generator: source of randomness, on x's device.

    Returns:
        (B, C, H, W), differentiable with respect to x to every order.

    Raises:
        ValueError: unknown name in policy.
    """
    for name in policy:
        if name not in POLICIES:
            raise ValueError(f"augment: policy must be among {', '.join(POLICIES)}, got {name!r}")
        x = POLICIES[name](x, generator)
    return x


def _color(x: Tensor, generator: Generator) -> Tensor:
    """Brightness ±0.5, saturation 0 to 2, contrast 0.5 to 1.5."""
    x = x + (_uniform(x, generator) - 0.5)
    mean = x.mean(1, keepdim=True)
    x = (x - mean) * (2 * _uniform(x, generator)) + mean
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (0.5 + _uniform(x, generator)) + mean


def _translation(x: Tensor, generator: Generator) -> Tensor:
    """Shift by up to an eighth of the side, zero filled."""
    B, _, H, W = x.shape
    reach_h, reach_w = round(H / 8), round(W / 8)
    dy = torch.randint(-reach_h, reach_h + 1, (B, 1), generator=generator, device=x.device)
    dx = torch.randint(-reach_w, reach_w + 1, (B, 1), generator=generator, device=x.device)
    rows = (torch.arange(H, device=x.device) + dy).clamp(-1, H) + 1  # 0 and H + 1 are the zero margin
    cols = (torch.arange(W, device=x.device) + dx).clamp(-1, W) + 1
    padded = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)
    image = torch.arange(B, device=x.device)[:, None, None]
    return padded[image, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def _cutout(x: Tensor, generator: Generator) -> Tensor:
    """A square of half the side set to zero, its center anywhere."""
    B, _, H, W = x.shape
    cy = torch.randint(0, H + 1, (B, 1, 1), generator=generator, device=x.device)
    cx = torch.randint(0, W + 1, (B, 1, 1), generator=generator, device=x.device)
    rows = torch.arange(H, device=x.device)[:, None]
    cols = torch.arange(W, device=x.device)
    dy, dx = rows - cy, cols - cx
    inside = (dy >= -(H // 4)) & (dy < H // 2 - H // 4) & (dx >= -(W // 4)) & (dx < W // 2 - W // 4)
    return x * (~inside).unsqueeze(1).to(x.dtype)


def _uniform(x: Tensor, generator: Generator) -> Tensor:
    return torch.rand(x.shape[0], 1, 1, 1, generator=generator, device=x.device).to(x.dtype)


POLICIES: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "color": _color,
    "translation": _translation,
    "cutout": _cutout,
}
