"""Converted networks give the hosts' numbers, and come back as the hosts' bits."""

import numpy as np
import pytest
import torch

from hosts import biggan_pytorch, mimicry, mmgeneration, official, studiogan, voletiv
from hosts.formulas import lived_in
from sagan_kernels import Discriminator, Generator, convert_checkpoint

# host, stand-in, its settings, and what a checkpoint cannot tell
GENERATORS = [
    ("biggan_pytorch", biggan_pytorch, {}, {}),
    ("biggan_pytorch", biggan_pytorch, {"resolution": 64, "ch": 2, "attention": (16, 32), "classes": 7}, {}),
    ("studiogan", studiogan, {}, {}),
    ("studiogan", studiogan, {"resolution": 64, "conv_dim": 2, "attention": (2,)}, {}),
    ("studiogan_2020", studiogan, {"old": True}, {}),
    ("mimicry", mimicry, {}, {}),
    ("mimicry", mimicry, {"resolution": 128, "ngf": 32}, {}),
    ("mmgeneration", mmgeneration, {}, {}),
    ("mmgeneration_biggan", mmgeneration, {"normed": False, "eps": 1e-5}, {}),
    ("mmgeneration_biggan", mmgeneration, {"normed": False, "eps": 3e-4}, {"norm_eps": 3e-4}),
    ("voletiv", voletiv, {}, {}),
]
DISCRIMINATORS = [
    ("biggan_pytorch", biggan_pytorch, {}, {}),
    ("biggan_pytorch", biggan_pytorch, {"resolution": 64, "ch": 8, "attention": (16, 32)}, {}),
    ("studiogan", studiogan, {}, {}),
    ("studiogan", studiogan, {"resolution": 64, "conv_dim": 4, "attention": (2,)}, {}),
    ("mimicry", mimicry, {}, {}),
    ("mimicry", mimicry, {"resolution": 128, "ndf": 64}, {}),
    ("mmgeneration", mmgeneration, {}, {}),
    ("mmgeneration", mmgeneration, {"inplace": True}, {"shortcut_relu": True}),
    ("voletiv", voletiv, {}, {}),
]
MATCH = {"rtol": 1e-10, "atol": 1e-10}


def latents(classes=3):
    return torch.randn(4, 6, dtype=torch.float64), torch.arange(4) % classes


def images(resolution=32, classes=3):
    return torch.randn(2, 3, resolution, resolution, dtype=torch.float64), torch.arange(2) % classes


def generator(host, settings):
    inputs = latents(settings.get("classes", 3))
    return lived_in(host.Generator(**settings), *inputs), inputs


def discriminator(host, settings):
    resolution = 128 if host is voletiv else settings.get("resolution", 32)
    inputs = images(resolution, settings.get("classes", 3))
    return lived_in(host.Discriminator(**settings), *inputs), inputs


NETWORKS = [(generator, *case) for case in GENERATORS] + [(discriminator, *case) for case in DISCRIMINATORS]
every_network = pytest.mark.parametrize(
    ("make", "name", "host", "settings", "told"),
    NETWORKS,
    ids=[f"{make.__name__}-{name}-{settings}" for make, name, _, settings, _ in NETWORKS],
)


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype, key
        assert torch.equal(actual[key], tensor), key


@every_network
def test_converted_network_gives_the_hosts_outputs(make, name, host, settings, told):
    network, inputs = make(host, settings)
    conversion = convert_checkpoint(network.state_dict(), settings=told)
    assert conversion.source == name
    torch.testing.assert_close(conversion.model()(*inputs), network(*inputs), **MATCH)


@every_network
def test_there_and_back_gives_the_same_bits(make, name, host, settings, told):
    network, _ = make(host, settings)
    conversion = convert_checkpoint(network.state_dict(), source=name, settings=told)
    back = convert_checkpoint(conversion, target=name, settings=told).state_dicts[make.__name__]
    assert_same_bits(back, network.state_dict())


@every_network
def test_our_network_alone_goes_back_to_the_same_outputs(make, name, host, settings, told):
    """Without what the conversion kept: u is found anew where only v is ours, and unread tensors are missing."""
    network, inputs = make(host, settings)
    expected = network(*inputs)
    ours = convert_checkpoint(network.state_dict(), settings=told).model()
    back = convert_checkpoint(ours, target=name, settings=told).state_dicts[make.__name__]
    fresh = type(network)(**settings).double().eval()
    missing, unexpected = fresh.load_state_dict(back, strict=False)
    assert not unexpected
    assert all(key.startswith("block5.snconv2d0.") for key in missing)
    torch.testing.assert_close(fresh(*inputs), expected, **MATCH)
