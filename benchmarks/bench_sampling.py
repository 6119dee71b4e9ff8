"""Sampling: the inference form against the generator run step by step. pytest benchmarks -k sampling.

The other is written as other code bases write it, on the same parameters and our layers of spectral norm.
"""

import copy

import pytest
import torch

from benchmarks import measuring, peers
from sagan_kernels.models import Generator
from sagan_kernels.models.inference import inference_generator

# (resolution, base_channels, attention_at, batch): 128 px with the published placements, 32 px as shipped
SHAPES = [
    (128, 32, 64, 1), (128, 32, 64, 8), (128, 64, 64, 1), (128, 32, 32, 1),
    (32, 32, 16, 1), (32, 32, 16, 8), (32, 32, 16, 64),
]  # fmt: skip
if torch.cuda.is_available():
    SHAPES += [(128, 64, 64, 64), (128, 64, 64, 256)]


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
    return model.eval().to(measuring.device())


def case(shape):
    resolution, base_channels, attention_at, batch = shape
    model = trained_like(resolution=resolution, base_channels=base_channels, attention_at=[attention_at])
    device = measuring.device()
    z, label = torch.randn(batch, model.z_dim).to(device), (torch.arange(batch) % 10).to(device)
    fp32, bf16 = inference_generator(model), inference_generator(model, dtype=torch.bfloat16)
    exact = copy.deepcopy(model).double()
    eager, compiled = (
        torch.no_grad()(peers.generator),
        torch.no_grad()(torch.compile(peers.generator, dynamic=False)),
    )
    return measuring.Case(
        "sampling", "forward", f"{resolution}px ch{base_channels} attention{attention_at}",
        {
            measuring.BASELINE: measuring.Contender(lambda: eager(model, z, label)),
            "torch.compile": measuring.Contender(lambda: compiled(model, z, label), "of eager", compiles=True),
            "ours, training form": measuring.Contender(lambda: torch.no_grad()(model)(z, label)),
            "ours, bf16": measuring.Contender(lambda: bf16(z, label), "inference form", tolerance=0.01),
            measuring.OURS: measuring.Contender(lambda: fp32(z, label), "inference form"),
        },
        lambda: eager(exact, z.double(), label),
        batch=batch,
    )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}px-ch{s[1]}-attention{s[2]}-B{s[3]}")
def bench_sampling(shape, versus):
    resolution, base_channels, _, batch = shape
    versus(case(shape), rounds=7 if base_channels * batch * resolution >= 8192 else 31)


def bench_sampling_smoke(versus):
    versus(measuring.without_compilers(case((32, 8, 16, 2))), rounds=1)
