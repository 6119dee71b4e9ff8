"""The inference form gives the eval-mode generator's images."""

import copy
import io

import pytest
import torch

from sagan_kernels.models import Generator
from sagan_kernels.models.inference import inference_generator

SETTINGS = [
    {"num_classes": 5},
    {"num_classes": 0},
    {"resolution": 64, "attention_at": [8, 64]},  # attention right before the last batch norm
    {"attention_at": [], "spectral_norm": False, "image_channels": 1},
    {"residual": False},
    {"residual": False, "attention_at": [32], "num_classes": 0},
    {"widths": [3, 2, 1, 2]},
    {"upsample": "bilinear", "norm_eps": 1e-3},
    {"norm_spectral_norm": True, "attention_bias": True},
]


def generator(settings):
    """A generator whose every batch-norm and attention parameter matters."""
    g = Generator(**{"resolution": 32, "num_classes": 3, "base_channels": 8, "z_dim": 6} | settings)
    for name, parameter in g.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        if name.endswith("gamma"):
            torch.nn.init.constant_(parameter, 0.8)
    for name, buffer in g.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.3)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    g(torch.randn(4, 6), labels(g, 4))  # u and v move in training
    return g


def labels(g, count):
    return torch.arange(count) % g.num_classes if g.num_classes else None


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_float32_equals_the_eval_mode_generator(settings):
    g = generator(settings)
    before = copy.deepcopy(g.state_dict())
    fast = inference_generator(g)
    z = torch.randn(5, 6)
    torch.testing.assert_close(fast(z, labels(g, 5)), g.eval()(z, labels(g, 5)).detach(), rtol=0, atol=1e-5)
    for key, value in g.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("residual", [True, False])
def test_kept_weight_layouts_serve_every_batch_size_and_copy(residual):
    g = generator({"residual": residual})
    fast, g = inference_generator(g), g.eval()
    z = torch.randn(9, 6)
    expected = g(z, labels(g, 9)).detach()
    for count in (1, 9, 4):  # the layout is made for the first
        torch.testing.assert_close(fast(z[:count], labels(g, count)), expected[:count], rtol=0, atol=1e-5)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for other in (copy.deepcopy(fast), torch.load(file, weights_only=False)):
        torch.testing.assert_close(other(z, labels(g, 9)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("residual", [True, False])
def test_weights_loaded_or_scaled_after_a_call_are_the_ones_used(residual):
    g, other = generator({"residual": residual}), generator({"residual": residual})
    fast, z = inference_generator(g), torch.randn(3, 6)
    before = fast(z, labels(g, 3))
    fast.load_state_dict(inference_generator(other).state_dict())
    expected = other.eval()(z, labels(other, 3)).detach()
    assert (before - expected).abs().max() > 0.01
    torch.testing.assert_close(fast(z, labels(g, 3)), expected, rtol=0, atol=1e-5)
    fast._apply(torch.zeros_like)
    assert not fast(z, labels(g, 3)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_onednn_the_images_are_the_same(dtype, monkeypatch):
    g = generator({})
    z = torch.randn(3, 6)
    kept = inference_generator(g, dtype=dtype)(z, labels(g, 3))
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    plain = inference_generator(g, dtype=dtype)(z, labels(g, 3))
    torch.testing.assert_close(plain, kept, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_bfloat16_is_close(settings):
    g = generator(settings).eval()
    z = torch.randn(5, 6)
    difference = inference_generator(g, dtype=torch.bfloat16)(z, labels(g, 5)) - g(z, labels(g, 5)).detach()
    assert difference.square().mean().sqrt() < 0.01  # measured: 0.001 to 0.005


def test_inference_form_matches_double_precision():
    g = generator({"num_classes": 5}).double()
    z = torch.randn(3, 6, dtype=torch.float64)
    fast = inference_generator(copy.deepcopy(g).float())
    torch.testing.assert_close(
        fast(z.float(), labels(g, 3)).double(), g.eval()(z, labels(g, 3)).detach(), rtol=0, atol=1e-5
    )


def test_inference_form_refuses_to_train_and_asks_for_labels():
    fast = inference_generator(generator({}))
    with pytest.raises(NotImplementedError, match="must stay in eval mode"):
        fast.train()
    assert not fast.eval().training
    with pytest.raises(ValueError, match="a label is needed, one of 3 classes"):
        fast(torch.zeros(1, 6))
    assert not any(p.requires_grad for p in fast.parameters())


def test_edge_inputs_behave_as_the_training_form_does():
    g = generator({})
    fast = inference_generator(g)
    assert fast(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long)).shape == (0, 3, 32, 32)
    for label in (-1, 3):
        with pytest.raises(IndexError):
            fast(torch.zeros(1, 6), torch.tensor([label]))


def test_inference_form_may_change_its_precision_afterwards():
    g, z = generator({}), torch.randn(3, 6)
    expected = inference_generator(g)(z, labels(g, 3))
    double = inference_generator(g).double()(z, labels(g, 3))
    torch.testing.assert_close(double, expected, rtol=0, atol=1e-5)
