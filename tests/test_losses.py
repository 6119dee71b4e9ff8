"""Losses and regularizers against hand-computed values and finite differences."""

import pytest
import torch
from torch import nn

from sagan_kernels.losses import hinge_d, hinge_g
from sagan_kernels.regularizers import diversity_shortfall, r1_penalty


def test_hinge_losses_match_numbers_worked_out_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, -0.5, 1.0])
    assert hinge_d(real, fake).item() == pytest.approx((0 + 0.5 + 2) / 3 + (0 + 0.5 + 2) / 3)
    assert hinge_g(fake).item() == pytest.approx(2.5 / 3)


class Quadratic(nn.Module):
    """D(x) = ½ Σ a x², whose gradient is a·x."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))

    def forward(self, x, label):
        return 0.5 * self.a * x.square().sum((1, 2, 3))


def test_r1_and_its_gradient_match_the_quadratic_critic():
    critic, x = Quadratic(), torch.randn(4, 2, 3, 3, dtype=torch.float64)
    penalty = r1_penalty(critic, x, None)
    norm = x.square().sum((1, 2, 3)).mean()
    torch.testing.assert_close(penalty, 9 * norm)
    penalty.backward()
    torch.testing.assert_close(critic.a.grad, 6 * norm)


def test_diversity_shortfall_is_zero_only_where_pairs_differ_enough():
    x = torch.zeros(4, 1, 2, 2)
    x[2] = 0.5  # pair (0, 2) differs by 0.5, pair (1, 3) not at all
    target = torch.tensor([0.5, 0.5])
    assert diversity_shortfall(x, target).item() == pytest.approx(0.5)
    assert diversity_shortfall(x, 2 * target).item() == pytest.approx((0.5 + 1) / 2)
    x.requires_grad_()
    diversity_shortfall(x, torch.tensor([0.1, 0.5])).backward()
    assert (x.grad[[0, 2]] == 0).all()  # far enough apart: no push
