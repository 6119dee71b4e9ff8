"""Spectral normalization against singular values."""

import copy

import pytest
import torch
from torch import nn

from sagan_kernels.nn import fold_spectral_norm, spectral_norm

LAYERS = {
    "linear": lambda: nn.Linear(7, 5),
    "convolution": lambda: nn.Conv2d(3, 9, 3),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 4),
    "embedding": lambda: nn.Embedding(11, 8),
}


@pytest.mark.parametrize("name", LAYERS)
def test_weight_has_largest_singular_value_one(name):
    layer = spectral_norm(LAYERS[name]()).double()
    for _ in range(200):
        weight = layer.weight
    matrix = weight.transpose(0, 1) if name == "transposed" else weight
    assert torch.linalg.svdvals(matrix.flatten(1).detach())[0].item() == pytest.approx(1, abs=1e-6)


def test_folding_keeps_eval_outputs_and_leaves_plain_layers():
    model = nn.Sequential(spectral_norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), spectral_norm(nn.Conv2d(8, 4, 1)))
    x = torch.randn(2, 3, 6, 6)
    model(x)
    expected = model.eval()(x)
    folded = fold_spectral_norm(copy.deepcopy(model))
    torch.testing.assert_close(folded(x), expected)
    assert set(folded.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert type(folded[0]) is nn.Conv2d


def test_folding_a_copy_leaves_the_original_and_other_copies_at_work():
    model = nn.Sequential(spectral_norm(nn.Linear(4, 4)))
    other = copy.deepcopy(model)
    fold_spectral_norm(copy.deepcopy(model))
    x = torch.randn(2, 4)
    model(x).sum().backward()
    other(x).sum().backward()
    assert "0.parametrizations.weight.original" in model.state_dict()


def test_folding_does_not_advance_the_power_iteration():
    layer = spectral_norm(nn.Linear(6, 6)).train()
    u = layer.parametrizations.weight[0]._u.clone()
    folded = fold_spectral_norm(copy.deepcopy(layer))
    expected = layer.eval().weight
    assert torch.equal(layer.parametrizations.weight[0]._u, u)
    torch.testing.assert_close(folded.weight, expected)
    assert folded.training


def test_other_parametrizations_are_left_alone():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    fold_spectral_norm(layer)
    assert "parametrizations.weight.original0" in layer.state_dict()
