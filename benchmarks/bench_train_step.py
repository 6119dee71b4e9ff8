"""A discriminator's training step against the same network run eagerly. pytest benchmarks -k train_step."""

import copy

import pytest
import torch

from benchmarks import measuring, peers
from sagan_kernels.losses import hinge_d
from sagan_kernels.models import Discriminator
from sagan_kernels.nn import group_spectral_norm

# (resolution, base_channels, attention_at, batch)
SHAPES = [(32, 32, 16, 16), (64, 32, 32, 8)]
if torch.cuda.is_available():
    SHAPES += [(128, 64, 64, 64)]


def case(shape):
    """Each contender has a copy of its own: a step moves the vectors of the power iteration.

    Gradients of biases nearly cancel between real and fake at initialization, so one ReLU that chooses otherwise shows:
    float32 is 1e-3 off in the mean there, float64 2e-14.
    """
    resolution, base_channels, attention_at, batch = shape
    torch.manual_seed(0)
    model = Discriminator(resolution, 10, base_channels=base_channels, attention_at=[attention_at])
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.constant_(parameter, 0.5)  # at 0 no gradient would reach the attention's weights
    model = model.to(measuring.device())
    images = torch.randn(2 * batch, 3, resolution, resolution).to(measuring.device())
    label = (torch.arange(batch) % 10).repeat(2).to(measuring.device())

    def step(forward, model, x):
        loss = hinge_d(*forward(model, x, label).chunk(2))
        model.zero_grad()
        loss.backward()
        return [loss, *(p.grad for p in model.parameters())]

    def contender(forward, memory_format=torch.contiguous_format, grouped=False, **told):
        own = copy.deepcopy(model).to(memory_format=memory_format)
        if grouped:
            group_spectral_norm(own)
        x = images.contiguous(memory_format=memory_format)
        return measuring.Contender(lambda: step(forward, own, x), **told)

    def exact():
        return step(peers.discriminator, copy.deepcopy(model).double(), images.double())

    def ours(model, x, label):
        return model(x, label)

    compiled = torch.compile(peers.discriminator, dynamic=False)
    contenders = {
        measuring.BASELINE: contender(peers.discriminator),
        "eager, NHWC": contender(peers.discriminator, torch.channels_last),
        "torch.compile": contender(compiled, note="of eager", compiles=True),
        "torch.compile, NHWC": contender(compiled, torch.channels_last, note="of eager", compiles=True),
        "ours, grouped": contender(ours, torch.channels_last, True, note="NHWC, spectral norms together"),
        measuring.OURS: contender(ours, torch.channels_last, note="NHWC"),
    }
    name = f"{resolution}px ch{base_channels} attention{attention_at}"
    return measuring.Case(
        "training step", "forward + backward", name, contenders, exact, batch=batch, tolerance=2e-3
    )


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}px-ch{s[1]}-B{s[3]}")
def bench_train_step(shape, versus):
    versus(case(shape), rounds=11)


def bench_train_step_smoke(versus):
    versus(measuring.without_compilers(case((32, 8, 16, 2))), rounds=1)
