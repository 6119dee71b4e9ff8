"""Sampling: the inference form against the generator as other code bases ship it. pytest benchmarks -k sampling."""

import peers
import pytest
import torch

from sagan_kernels.models import Generator
from sagan_kernels.models.inference import inference_generator

# (resolution, base_channels, attention_at, batch): 128 px with the published placements, 32 px as shipped
SHAPES = [
    (128, 32, 64, 1),
    (128, 32, 64, 8),
    (128, 64, 64, 1),
    (128, 32, 32, 1),
    (32, 32, 16, 1),
    (32, 32, 16, 8),
]


def trained_like(**settings):
    """A generator in eval mode whose gains, statistics and attention are not those of initialization."""
    torch.manual_seed(0)
    model = Generator(num_classes=10, **settings)
    for name, parameter in model.named_parameters():
        if name.endswith(("gain", "norm1.bias", "norm2.bias")):
            torch.nn.init.normal_(parameter, std=0.2)
        if name.endswith("gamma"):
            torch.nn.init.constant_(parameter, 0.5)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, model.z_dim), torch.arange(8))  # running statistics, u and v
    return model.eval()


def contenders(model, batch):
    z, label = torch.randn(batch, model.z_dim), torch.arange(batch) % 10
    fp32, bf16 = inference_generator(model), inference_generator(model, dtype=torch.bfloat16)

    def eager():
        with torch.no_grad():
            return peers.generator(model, z, label)

    def ours_training_form():
        with torch.no_grad():
            return model(z, label)

    calls = {
        "eager": eager,
        "ours, training form": ours_training_form,
        "ours, inference form, bf16": lambda: bf16(z, label),
        "ours, inference form": lambda: fp32(z, label),
    }
    expected = eager()  # a wrong image has no speed
    torch.testing.assert_close(calls["ours, training form"](), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(calls["ours, inference form"](), expected, rtol=0, atol=2e-5)
    assert (calls["ours, inference form, bf16"]() - expected).abs().mean() < 0.01
    return calls


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}px-ch{s[1]}-attention{s[2]}-B{s[3]}")
def bench_sampling(shape, versus):
    resolution, base_channels, attention_at, batch = shape
    model = trained_like(resolution=resolution, base_channels=base_channels, attention_at=[attention_at])
    rounds = 7 if base_channels * batch * resolution >= 8192 else 31
    versus(contenders(model, batch), rounds=rounds, shape=str(shape), dtype="float32")


def bench_sampling_smoke(versus):
    model = trained_like(resolution=32, base_channels=8, attention_at=[16])
    versus(contenders(model, 2), rounds=1, shape="(32, 8, 16, 2)", dtype="float32")
