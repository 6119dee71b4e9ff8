"""Adversarial losses on logits."""

import torch.nn.functional as F
from torch import Tensor


def hinge_d(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Discriminator hinge loss: E[max(0, 1 - D(real))] + E[max(0, 1 + D(fake))].

    Source: arXiv:1705.02894; SAGAN, arXiv:1805.08318, equation 4.
    """
    return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()


def hinge_g(fake_logits: Tensor) -> Tensor:
    """Generator hinge loss: -E[D(fake)]."""
    return -fake_logits.mean()
