"""Spectral norm of whole networks, weights only, against torch's two forms. pytest benchmarks -k spectral_norm.

One training forward (a power iteration and W/σ of every layer), forward + backward, and an evaluation forward. Layers
have the shapes of BigGAN-128's D (23 layers) and G (41) at several widths, and of SAGAN's networks here.
"""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm as Hook

from benchmarks import measuring
from sagan_kernels.models import Discriminator, Generator
from sagan_kernels.nn import group_spectral_norm, spectral_norm

NORMED = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)


def biggan_discriminator(ch):
    """BigGAN-128 D without biases: six blocks, attention at 64 px, class projection of 1,000 classes."""
    inputs, outputs = [3, *(ch * n for n in (1, 2, 4, 8, 16))], [ch * n for n in (1, 2, 4, 8, 16, 16)]
    layers = []
    for i, (a, b) in enumerate(zip(inputs, outputs, strict=True)):
        layers += [conv(a, b, 3), conv(b, b, 3)] + [conv(a, b, 1)] * (i < 5)
    return [*layers, *attention(ch), nn.Linear(16 * ch, 1, bias=False), nn.Embedding(1000, 16 * ch)]


def biggan_generator(ch):
    """BigGAN-128 G without biases: five blocks with conditional norms from 128 + 20 numbers, attention at 64 px."""
    layers = [nn.Linear(20, 256 * ch, bias=False)]
    for a, b in zip((16, 16, 8, 4, 2), (16, 8, 4, 2, 1), strict=True):
        norms = [nn.Linear(148, ch * n, bias=False) for n in (a, a, b, b)]
        layers += [conv(ch * a, ch * b, 3), conv(ch * b, ch * b, 3), conv(ch * a, ch * b, 1), *norms]
    return [*layers, *attention(2 * ch), conv(ch, 3, 3)]


def sagan(kind, resolution):
    """The layers of our own networks."""
    network = kind(resolution, 10, spectral_norm=False)
    return [copy.deepcopy(module) for module in network.modules() if isinstance(module, NORMED)]


def conv(a, b, k):
    return nn.Conv2d(a, b, k, bias=False)


def attention(channels):
    return [conv(channels, channels // n, 1) for n in (8, 8, 2)] + [conv(channels // 2, channels, 1)]


NETWORKS = {
    "BigGAN128-D-ch16": lambda: biggan_discriminator(16),
    "BigGAN128-D-ch32": lambda: biggan_discriminator(32),
    "BigGAN128-D-ch64": lambda: biggan_discriminator(64),
    "BigGAN128-D-ch96": lambda: biggan_discriminator(96),
    "BigGAN128-G-ch32": lambda: biggan_generator(32),
    "BigGAN128-G-ch96": lambda: biggan_generator(96),
    "SAGAN32-D": lambda: sagan(Discriminator, 32),
    "SAGAN64-D": lambda: sagan(Discriminator, 64),
    "SAGAN64-G": lambda: sagan(Generator, 64),
    "SAGAN128-D": lambda: sagan(Discriminator, 128),
}


class Weights(nn.Module):
    """A model that does nothing but read its layers' normalized weights, once each."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self):
        for layer in self.layers:
            for hook in layer._forward_pre_hooks.values():
                if isinstance(hook, Hook):
                    hook(layer, None)
        return [layer.weight for layer in self.layers]


def contenders(build):
    """The same weights, u and v under every form. The group holds torch's own layers."""
    torch.manual_seed(0)
    layers = [layer.to(measuring.device()) for layer in build()]
    forms = {
        "parametrization": parametrizations.spectral_norm,
        "hook": nn.utils.spectral_norm,
        "layers": spectral_norm,
    }
    models = {
        name: Weights([normalize(copy.deepcopy(layer)) for layer in layers])
        for name, normalize in forms.items()
    }
    first = models["parametrization"]
    for name, key in (("hook", "weight"), ("layers", "parametrizations.weight.0.")):
        for layer, source in zip(models[name].layers, first.layers, strict=True):
            for letter in "uv":
                target = (
                    getattr(layer, f"{key}_{letter}")
                    if name == "hook"
                    else layer.get_buffer(f"{key}_{letter}")
                )
                target.copy_(getattr(source.parametrizations.weight[0], f"_{letter}"))
    models["grouped"] = copy.deepcopy(first)
    group_spectral_norm(models["grouped"])
    return models


def checked(models):
    """A wrong result has no speed. All have the same σ in evaluation; the hook iterates in another order."""
    for training, names in ((False, list(models)), (True, [name for name in models if name != "hook"])):
        found = {}
        for name in names:
            model = copy.deepcopy(models[name]).train(training)
            outs = model()
            torch.manual_seed(1)
            loss = sum((out * torch.randn_like(out)).sum() for out in outs)
            found[name] = [*outs, *torch.autograd.grad(loss, originals(model))]
        for name in names:
            for actual, wanted in zip(found[name], found["parametrization"], strict=True):
                atol = 1e-4 * wanted.abs().max().item()
                torch.testing.assert_close(
                    actual, wanted, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
                )
    return models


def case(step, network, calls):
    """What `versus` takes; `checked` has compared the results."""
    named = {name: measuring.Contender(call, compiles="compiled" in name) for name, call in calls.items()}
    return measuring.Case("spectral norm", step.replace("_", " + "), network, named)


def originals(model):
    return [parameter for name, parameter in model.named_parameters() if not name.endswith("bias")]


def forward(models):
    return {name: model.train() for name, model in models.items()}


def forward_backward(models):
    def call(model):
        return torch.autograd.grad(model(), parameters[model], grads)

    grads = [torch.randn_like(weight) for weight in models["parametrization"]()]
    parameters = {model.train(): originals(model) for model in models.values()}
    return {name: functools.partial(call, model) for name, model in models.items()}


def evaluation(models):
    def call(model):
        with torch.no_grad():
            return model()

    return {name: functools.partial(call, model.eval()) for name, model in models.items()}


@pytest.mark.parametrize("step", [forward, forward_backward, evaluation])
@pytest.mark.parametrize("network", NETWORKS)
def bench_spectral_norm(network, step, versus):
    models = checked(contenders(NETWORKS[network]))
    versus(case(step.__name__, f"{network}, {len(models['grouped'].layers)} layers", step(models)), rounds=15)


@pytest.mark.parametrize("network", ["BigGAN128-D-ch16", "SAGAN64-D"])
def bench_spectral_norm_compiled(network, versus):
    """Torch's form and ours compiled: where torch's has weights of two to four columns its gradients come out wrong."""
    eager = contenders(NETWORKS[network])
    models = {
        "parametrization": eager["parametrization"],
        "compiled": torch.compile(copy.deepcopy(eager["parametrization"]), fullgraph=True),
        "layers, compiled": torch.compile(eager["layers"], fullgraph=True),
        "grouped": eager["grouped"],
    }
    checked({name: model for name, model in models.items() if name != "compiled"})
    calls = forward_backward(models)
    try:
        checked({name: models[name] for name in ("parametrization", "compiled")})
    except AssertionError as error:
        (difference,) = (line for line in str(error).splitlines() if "absolute difference" in line)
        calls["compiled"] = functools.partial(refuse, f"wrong gradients, {difference.lower()}")
    versus(case("forward_backward, compiled", network, calls), rounds=15)


def refuse(why):
    """A contender without a speed."""
    raise ArithmeticError(why)


@pytest.mark.parametrize("step", [forward, forward_backward, evaluation])
def bench_spectral_norm_smoke(step, versus):
    models = checked(contenders(lambda: [conv(3, 5, 3), nn.Linear(7, 1), nn.Embedding(4, 6), conv(5, 9, 1)]))
    versus(case(step.__name__, "four layers", step(models)), rounds=1)
