"""Conditional batch norm against torch.nn.BatchNorm2d, one class at a time."""

import pytest
import torch
from torch import nn

from sagan_kernels.nn import ConditionalBatchNorm2d


def pair(num_classes, momentum=0.1):
    """Ours, and torch's with the same running statistics and no affine part."""
    ours = ConditionalBatchNorm2d(5, num_classes, eps=1e-4, momentum=momentum).double()
    theirs = nn.BatchNorm2d(5, eps=1e-4, momentum=momentum, affine=False).double()
    for module in (ours.gain, ours.bias):
        nn.init.normal_(module)
    for module in (ours, theirs):
        torch.manual_seed(1)
        nn.init.normal_(module.running_mean)
        nn.init.uniform_(module.running_var, 0.5, 2)
    return ours, theirs


def expected(ours, theirs, x, label):
    rows = torch.zeros(len(x), dtype=torch.long) if label is None else label
    gain, bias = (t[rows][:, :, None, None] for t in (ours.gain, ours.bias))
    return theirs(x) * (1 + gain) + bias


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_training_and_eval_match_batch_norm_with_an_affine_a_class(num_classes, momentum):
    ours, theirs = pair(num_classes, momentum)
    label = torch.tensor([2, 0, 1, 2]) if num_classes else None
    for _ in range(3):
        x = torch.randn(4, 5, 3, 2, dtype=torch.float64, requires_grad=True)
        y, z = ours(x, label), expected(ours, theirs, x, label)
        torch.testing.assert_close(y, z)
        for a, b in zip(
            *(torch.autograd.grad(t.square().sum(), (x, ours.gain)) for t in (y, z)), strict=True
        ):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)
        torch.testing.assert_close(ours.running_var, theirs.running_var)
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 3
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x, label), expected(ours, theirs, x, label))
    assert ours.num_batches_tracked == 3


def test_starts_as_plain_normalization():
    ours = ConditionalBatchNorm2d(4, 7)
    x = torch.randn(6, 4, 5, 5)
    torch.testing.assert_close(ours(x, torch.arange(6)), nn.BatchNorm2d(4, affine=False)(x))


def test_missing_label_is_named():
    with pytest.raises(ValueError, match="a label is needed, one of 7 classes, got None"):
        ConditionalBatchNorm2d(4, 7)(torch.zeros(2, 4, 3, 3))
