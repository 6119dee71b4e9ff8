"""The networks with other projects' weights give those projects' numbers. tests/golden/README.md says whose."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sagan_kernels.models import Discriminator, Generator

GOLDEN = Path(__file__).parent / "golden"


def host(name, part):
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    weights = {key[2:]: value for key, value in tensors.items() if key.startswith(part + ".")}
    return weights, {key[3:]: value for key, value in tensors.items() if key.startswith("io.")}


def biggan_weight(weights, name):
    """BigGAN-PyTorch in eval mode: one power iteration from the stored u, not kept."""
    weight = weights[f"{name}.weight"]
    if f"{name}.u0" not in weights:
        return weight
    matrix = weight.flatten(1)
    v = torch.nn.functional.normalize(weights[f"{name}.u0"] @ matrix, eps=1e-8)
    u = torch.nn.functional.normalize(v @ matrix.T, eps=1e-8)
    return weight / (v @ matrix.T @ u.T).squeeze()


def fill(model, values):
    missing, unexpected = model.load_state_dict(values, strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)
    return model.eval()


def torch_weight(weights, name):
    """torch.nn.utils.spectral_norm in eval mode: the stored u and v."""
    weight = weights[f"{name}.weight_orig"]
    return weight / (weights[f"{name}.weight_u"] @ weight.flatten(1) @ weights[f"{name}.weight_v"])


def layer(values, ours, theirs, weights, read):
    values[f"{ours}.weight"] = read(weights, theirs)
    if f"{theirs}.bias" in weights:
        values[f"{ours}.bias"] = weights[f"{theirs}.bias"]


def check_critic(model, io):
    real = io["real"].clone().requires_grad_()
    logits = model(real, io["label"])
    (grad,) = torch.autograd.grad(logits.sum(), real)
    torch.testing.assert_close(logits, io["logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, io["real_grad"], rtol=1e-4, atol=1e-5)


def test_discriminator_reproduces_biggan_pytorch():
    weights, io = host("biggan_pytorch_64", "D")
    values = {"attention.32.gamma": weights["blocks.0.1.gamma"]}
    for i in range(5):
        for ours, theirs in [("conv1", "conv1"), ("conv2", "conv2"), ("shortcut", "conv_sc")]:
            if f"blocks.{i}.0.{theirs}.weight" in weights:
                layer(values, f"blocks.{i}.{ours}", f"blocks.{i}.0.{theirs}", weights, biggan_weight)
    for ours, theirs in [("query", "theta"), ("key", "phi"), ("value", "g"), ("out", "o")]:
        layer(values, f"attention.32.{ours}", f"blocks.0.1.{theirs}", weights, biggan_weight)
    layer(values, "linear", "linear", weights, biggan_weight)
    layer(values, "embedding", "embed", weights, biggan_weight)
    check_critic(fill(Discriminator(64, 5, base_channels=8, spectral_norm=False), values), io)


def test_generator_reproduces_biggan_pytorch():
    weights, io = host("biggan_pytorch_64", "G")
    values = {"attention.32.gamma": weights["blocks.2.1.gamma"]}
    for i in range(4):
        for ours, theirs in [("conv1", "conv1"), ("conv2", "conv2"), ("shortcut", "conv_sc")]:
            layer(values, f"blocks.{i}.{ours}", f"blocks.{i}.0.{theirs}", weights, biggan_weight)
        for norm in (1, 2):
            theirs = f"blocks.{i}.0.bn{norm}"
            for our_name, their_name in [
                ("gain", "gain.weight"),
                ("bias", "bias.weight"),
                ("running_mean", "stored_mean"),
                ("running_var", "stored_var"),
            ]:
                values[f"blocks.{i}.norm{norm}.{our_name}"] = weights[f"{theirs}.{their_name}"]
    for ours, theirs in [("query", "theta"), ("key", "phi"), ("value", "g"), ("out", "o")]:
        layer(values, f"attention.32.{ours}", f"blocks.2.1.{theirs}", weights, biggan_weight)
    layer(values, "linear", "linear", weights, biggan_weight)
    layer(values, "to_image", "output_layer.2", weights, biggan_weight)
    for ours, theirs in [("weight", "gain"), ("bias", "bias"), ("running_mean", "stored_mean")]:
        values[f"norm.{ours}"] = weights[f"output_layer.0.{theirs}"]
    values["norm.running_var"] = weights["output_layer.0.stored_var"]
    generator = Generator(64, 5, base_channels=8, widths=[16, 16, 8, 4, 2], spectral_norm=False)
    image = fill(generator, values)(io["z"], io["label"])
    torch.testing.assert_close(image, io["image"], rtol=1e-4, atol=2e-5)


STUDIOGAN = {
    "blocks": ["blocks.0.0", "blocks.2.0", "blocks.3.0", "blocks.4.0"],
    "block": {"conv1": "conv2d1", "conv2": "conv2d2", "shortcut": "conv2d0"},
    "attention": "blocks.1.0",
    "projections": {
        "query": "conv1x1_theta",
        "key": "conv1x1_phi",
        "value": "conv1x1_g",
        "out": "conv1x1_attn",
    },
    "gamma": "sigma",
    "heads": {"linear": "linear1", "embedding": "embedding"},
}
MIMICRY = {
    "blocks": ["block1", "block2", "block3", "block4"],
    "block": {"conv1": "c1", "conv2": "c2", "shortcut": "c_sc"},
    "attention": "attn_block",
    "projections": {"query": "theta", "key": "phi", "value": "g", "out": "o"},
    "gamma": "gamma",
    "heads": {"linear": "l5", "embedding": "l_y"},
}


@pytest.mark.parametrize(
    ("name", "names", "settings"),
    [
        ("studiogan_32_discriminator", STUDIOGAN, {"base_channels": 24, "attention_at": [16]}),
        (
            "mimicry_32_discriminator",
            MIMICRY,
            {"base_channels": 32, "widths": [1, 1, 1, 1], "attention_at": [8]},
        ),
    ],
    ids=["studiogan", "mimicry"],
)
def test_discriminator_reproduces(name, names, settings):
    weights, io = host(name, "D")
    side = settings["attention_at"][0]
    values = {f"attention.{side}.gamma": weights[f"{names['attention']}.{names['gamma']}"].squeeze()}
    for i, block in enumerate(names["blocks"]):
        for ours, theirs in names["block"].items():
            if f"{block}.{theirs}.weight_orig" in weights:
                layer(values, f"blocks.{i}.{ours}", f"{block}.{theirs}", weights, torch_weight)
    for ours, theirs in names["projections"].items():
        layer(values, f"attention.{side}.{ours}", f"{names['attention']}.{theirs}", weights, torch_weight)
    for ours, theirs in names["heads"].items():
        layer(values, ours, theirs, weights, torch_weight)
    # both hosts' blocks begin with an in-place ReLU
    critic = fill(Discriminator(32, 10, spectral_norm=False, shortcut_relu=True, **settings), values)
    check_critic(critic, io)


def test_stored_u_and_v_in_our_spectral_norm_reproduce_studiogan():
    """The same network with our spectral normalization at work, its weights unfolded."""
    weights, io = host("studiogan_32_discriminator", "D")
    critic = Discriminator(32, 10, base_channels=24, shortcut_relu=True)
    values = {"attention.16.gamma": weights["blocks.1.0.sigma"].squeeze()}
    pairs = {f"attention.16.{ours}": f"blocks.1.0.{n}" for ours, n in STUDIOGAN["projections"].items()}
    pairs |= STUDIOGAN["heads"]
    for i, block in enumerate(STUDIOGAN["blocks"]):
        pairs |= {f"blocks.{i}.{ours}": f"{block}.{n}" for ours, n in STUDIOGAN["block"].items()}
    for ours, theirs in pairs.items():
        if f"{theirs}.weight_orig" in weights:
            values[f"{ours}.parametrizations.weight.original"] = weights[f"{theirs}.weight_orig"]
            values[f"{ours}.parametrizations.weight.0._u"] = weights[f"{theirs}.weight_u"]
            values[f"{ours}.parametrizations.weight.0._v"] = weights[f"{theirs}.weight_v"]
        if f"{theirs}.bias" in weights:
            values[f"{ours}.bias"] = weights[f"{theirs}.bias"]
    check_critic(fill(critic, values), io)
