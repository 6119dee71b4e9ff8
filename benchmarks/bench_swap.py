"""What a swap is worth: layers and networks of known projects before and after it. pytest benchmarks -k swap.

Attention layers at the shapes of their projects; BigGAN-, StudioGAN- and mimicry-like networks with class labels, where
attention and spectral norm are swapped at once. The layers and networks are the stand-ins of tests/hosts.
"""

import functools
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import measuring
from benchmarks.attention_contenders import gradient_like

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from hosts import (
    biggan_pytorch,
    fastai,
    heykeetae,
    mimicry,
    mmgeneration,
    pretrained_biggan,
    rosinality,
    studiogan,
    timm_layers,
    torchgan,
    voletiv,
)

from sagan_kernels import swap_layers

HOST = "host"
GPU = torch.cuda.is_available()
# layer, batch, channels, height and width of the feature map in the project's own networks
LAYERS = {
    "BigGAN-PyTorch": (biggan_pytorch.Attention, 4, 64, 64),
    "StudioGAN": (studiogan.SelfAttention, 16, 256, 16),
    "mimicry": (mimicry.SelfAttention, 8, 256, 32),
    "mmgeneration": (mmgeneration.SelfAttentionBlock, 4, 64, 64),
    "voletiv": (voletiv.Self_Attn, 8, 128, 32),
    "pretrained-BigGAN": (pretrained_biggan.SelfAttn, 2, 256, 64),
    "heykeetae": (heykeetae.Self_Attn, 8, 64, 32),
    "rosinality": (rosinality.SelfAttention, 8, 128, 32),
    "fastai": (fastai.SelfAttention, 2, 256, 32),
    "torchgan": (torchgan.SelfAttention2d, 8, 64, 32),
    "timm": (timm_layers.NonLocalAttn, 8, 256, 28),
}
# (network, batch, pixels); a generator takes latents of width 6
NETWORKS = {
    "BigGAN-PyTorch D ch32": (lambda: biggan_pytorch.Discriminator(ch=32), 8, 32),
    "StudioGAN D conv_dim64": (lambda: studiogan.Discriminator(conv_dim=64), 8, 32),
    "mimicry D ndf128": (lambda: mimicry.Discriminator(ndf=128), 8, 32),
    "BigGAN-PyTorch G ch32": (lambda: biggan_pytorch.Generator(ch=32), 8, 32),
    "StudioGAN G conv_dim32": (lambda: studiogan.Generator(conv_dim=32), 8, 32),
    "mimicry G ngf128": (lambda: mimicry.Generator(ngf=128), 8, 32),
    "BigGAN-PyTorch D ch16": (lambda: biggan_pytorch.Discriminator(128, ch=16, attention=(64,)), 4, 128),
    "mimicry D ndf256": (lambda: mimicry.Discriminator(128, ndf=256), 4, 128),
}
TASKS = ("forward", "forward + backward")
SMOKE = {
    "BigGAN-PyTorch D ch8": lambda: biggan_pytorch.Discriminator(ch=8),
    "StudioGAN G conv_dim8": lambda: studiogan.Generator(conv_dim=8),
}


def case(task, suite, name, make, batch, inputs):
    """The host, its compiled form, and a swapped copy, all in training mode and all with their own u and v."""
    torch.manual_seed(0)
    host = make().to(measuring.device())
    for parameter in host.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.constant_(parameter, 0.5)  # gamma
    for module in host.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            with torch.no_grad():  # a ReLU after it is far from 0 nearly everywhere
                module.bias.copy_(3.0 - 6.0 * (torch.arange(len(module.bias)) % 2))
    with torch.no_grad():
        for _ in range(10):  # spectral norm finds its vectors
            host(*inputs)
    swapped, exact = copied(make, host), copied(make, host).double()
    assert swap_layers(swapped).swapped, f"swap: {name} must have layers to swap, got none"
    compiled = copied(make, host)
    doubled = [t.double() if t.is_floating_point() else t for t in inputs]
    contenders = {
        HOST: measuring.Contender(functools.partial(step, task, host, host, inputs)),
        "torch.compile": measuring.Contender(
            functools.partial(step, task, torch.compile(compiled, dynamic=False), compiled, inputs),
            "of the host", compiles=True,
        ),
        measuring.OURS: measuring.Contender(functools.partial(step, task, swapped, swapped, inputs), "swapped"),
    }  # fmt: skip
    return measuring.Case(
        suite,
        task,
        name,
        contenders,
        functools.partial(step, task, exact, exact, doubled),
        batch=batch,
        tolerance=1e-3,
    )


def copied(make, host):
    """Another such module with the same parameters and buffers; some spectral norms cannot be deep-copied."""
    made = make().to(measuring.device())
    made.load_state_dict(host.state_dict())
    with (
        torch.no_grad()
    ):  # in rosinality's layers a normalized weight lies in its parameter's memory until the first call
        for parameter, original in zip(made.parameters(), host.parameters(), strict=True):
            parameter.copy_(original)
    return made


def step(task, call, module, inputs):
    """One training forward, and the gradients of every parameter that learns."""
    with torch.set_grad_enabled(task != "forward"):
        result = call(*inputs)
        y = result[0] if isinstance(result, tuple) else result
    if task == "forward":
        return y
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.autograd.grad(y, parameters, from_above(y), materialize_grads=True)


def from_above(y):
    """One number a channel of each image.

    A gradient is then a sum that grows with the pixels. That of noise grows with their root: one ReLU of three million
    so near 0 that the sign is float32's to choose moved that of gamma by 6e-3.
    """
    return gradient_like(y[..., :1, :1]).expand_as(y).contiguous() if y.ndim == 4 else gradient_like(y)


def inputs_of(network, batch, pixels):
    """Latents for a generator, images for a discriminator, and labels."""
    torch.manual_seed(0)
    label = torch.arange(batch) % 3
    first = torch.randn(batch, 6) if " G " in network else torch.randn(batch, 3, pixels, pixels)
    return [first.to(measuring.device()), label.to(measuring.device())]


@pytest.mark.parametrize("project", LAYERS)
@pytest.mark.parametrize("task", TASKS)
def bench_swap_layer(task, project, versus):
    layer, batch, channels, side = LAYERS[project]
    torch.manual_seed(0)
    x = torch.randn(batch, channels, side, side).to(measuring.device())
    name = f"{project} layer, C{channels} {side}×{side}"
    versus(
        case(task, "swap of a layer", name, functools.partial(layer, channels), batch, [x]),
        rounds=21 if GPU else 9,
    )


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("task", TASKS)
def bench_swap_network(task, network, versus):
    make, batch, pixels = NETWORKS[network]
    inputs = inputs_of(network, batch, pixels)
    name = f"{network}, {pixels} px"
    versus(case(task, "swap of a network", name, make, batch, inputs), rounds=21 if GPU else 9)


@pytest.mark.parametrize("network", SMOKE)
@pytest.mark.parametrize("task", TASKS)
def bench_swap_smoke(task, network, versus):
    made = case(task, "swap of a network", network, SMOKE[network], 8, inputs_of(network, 8, 32))
    versus(measuring.without_compilers(made), rounds=1)
