"""A discriminator's training step against the same network run eagerly. pytest benchmarks -k train_step."""

import copy

import peers
import pytest
import torch

from sagan_kernels.losses import hinge_d
from sagan_kernels.models import Discriminator

# (resolution, base_channels, attention_at, batch)
SHAPES = [(32, 32, 16, 16), (64, 32, 32, 8)]


def contenders(shape):
    resolution, base_channels, attention_at, batch = shape
    torch.manual_seed(0)
    model = Discriminator(resolution, 10, base_channels=base_channels, attention_at=[attention_at])
    real, fake = (torch.randn(batch, 3, resolution, resolution) for _ in range(2))
    label = torch.arange(batch) % 10

    def step(model, forward, memory_format):
        x = torch.cat([real, fake]).contiguous(memory_format=memory_format)
        logits = forward(model, x, torch.cat([label, label]))
        loss = hinge_d(*logits.chunk(2))
        model.zero_grad()
        loss.backward()
        return loss

    eager, ours = model, copy.deepcopy(model).to(memory_format=torch.channels_last)
    calls = {
        "eager": lambda: step(eager, peers.discriminator, torch.contiguous_format),
        "ours": lambda: step(ours, lambda m, x, y: m(x, y), torch.channels_last),
    }
    losses = [call() for call in calls.values()]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    for (name, p), q in zip(eager.named_parameters(), ours.parameters(), strict=True):
        scale = p.grad.abs().max().item() + 1e-6
        torch.testing.assert_close(
            q.grad, p.grad, rtol=0, atol=1e-3 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
    return calls


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}px-ch{s[1]}-B{s[3]}")
def bench_train_step(shape, versus):
    versus(contenders(shape), rounds=11, shape=str(shape), dtype="float32")


def bench_train_step_smoke(versus):
    versus(contenders((32, 8, 16, 2)), rounds=1, shape="(32, 8, 16, 2)", dtype="float32")
