"""Converted networks give the hosts' numbers, and come back as the hosts' bits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hosts import biggan_pytorch, mimicry, mmgeneration, official, studiogan, voletiv
from hosts.formulas import lived_in
from safetensors.torch import load_file

from sagan_kernels import Discriminator, Generator, convert_checkpoint
from sagan_kernels.conversion import layout
from sagan_kernels.models.inference import inference_generator
from sagan_kernels.nn import ConditionalBatchNorm2d

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
    ("biggan_pytorch", biggan_pytorch, {"resolution": 64, "ch": 8, "attention": (32,), "wide": False}, {}),
    ("studiogan", studiogan, {}, {}),
    ("studiogan", studiogan, {"resolution": 64, "conv_dim": 4, "attention": (2,)}, {}),
    ("mimicry", mimicry, {}, {}),
    ("mimicry", mimicry, {"resolution": 128, "ndf": 64}, {}),
    ("mmgeneration", mmgeneration, {}, {}),
    ("mmgeneration", mmgeneration, {"inplace": True}, {"shortcut_relu": True}),
    ("voletiv", voletiv, {}, {}),
]
MATCH = {"rtol": 1e-10, "atol": 1e-10}
GOLDEN = Path(__file__).parent / "golden"


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


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("biggan_pytorch_64", "G"),
        ("biggan_pytorch_64", "D"),
        ("studiogan_32_generator", "G"),
        ("studiogan_32_discriminator", "D"),
        ("mimicry_32_generator", "G"),
        ("mimicry_32_discriminator", "D"),
    ],
)
def test_real_hosts_outputs_are_reproduced(name, part):
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    weights = {key[2:]: tensor for key, tensor in tensors.items() if key.startswith(f"{part}.")}
    model = convert_checkpoint(weights).model()
    if part == "G":
        image = model(tensors["io.z"], tensors["io.label"])
        torch.testing.assert_close(image, tensors["io.image"], rtol=1e-4, atol=2e-5)
        return
    real = tensors["io.real"].requires_grad_()
    logits = model(real, tensors["io.label"])
    (grad,) = torch.autograd.grad(logits.sum(), real)
    torch.testing.assert_close(logits, tensors["io.logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, tensors["io.real_grad"], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def tensorflow():
    return official.variables(np.random.default_rng(0))


def test_the_official_variables_give_both_networks(tensorflow):
    (z, label), (x, _) = latents(), images(128)
    conversion = convert_checkpoint(tensorflow)
    assert conversion.source == "official"
    made = conversion.model("generator")(z, label)
    torch.testing.assert_close(made, official.generator(tensorflow, z, label), **MATCH)
    logits = conversion.model("discriminator")(x, label[:2])
    torch.testing.assert_close(logits, official.discriminator(tensorflow, x, label[:2]), **MATCH)


def test_the_official_variables_come_back_with_the_same_bits(tensorflow, tmp_path):
    slots = {"global_step": np.array(7), "beta1_power": np.array(0.9)}
    slots |= {f"{name}/Adam_1": array for name, array in tensorflow.items()}
    conversion = convert_checkpoint({f"{name}:0": array for name, array in (tensorflow | slots).items()})
    (path,) = convert_checkpoint(conversion, target="official").save(tmp_path)
    assert_same_bits(load_file(path), {name: torch.from_numpy(array) for name, array in tensorflow.items()})


def test_our_network_alone_goes_back_to_the_official_outputs(tensorflow):
    z, label = latents()
    ours = convert_checkpoint(tensorflow).model("generator")
    back = convert_checkpoint(ours, target="official").state_dicts["generator"]
    variables = {name: tensor.numpy() for name, tensor in back.items()}
    assert variables.keys() == {name for name in tensorflow if name.startswith("model/g_")}
    again = official.generator(variables, z, label)
    torch.testing.assert_close(again, official.generator(tensorflow, z, label), **MATCH)


def test_a_network_trained_here_gives_biggan_the_same_outputs_once_u_and_v_have_settled():
    critic = Discriminator(32, 3, base_channels=8).double()
    x, label = images()
    with torch.no_grad():
        for _ in range(300):
            critic(x, label)
    theirs = biggan_pytorch.Discriminator().double().eval()
    theirs.load_state_dict(convert_checkpoint(critic, target="biggan_pytorch").state_dicts["discriminator"])
    torch.testing.assert_close(theirs(x, label), critic.eval()(x, label), rtol=1e-4, atol=1e-5)


def test_u_and_v_follow_the_order_of_one_iteration():
    """BigGAN's u0 becomes v = n(Wᵀu0), u = n(W v): unit vectors whose uᵀWv is the σ that BigGAN divides by."""
    network, _ = generator(biggan_pytorch, {})
    state = convert_checkpoint(network.state_dict()).state_dicts["generator"]
    layer = network.blocks[0][0].conv1
    W, u0 = layer.weight.detach().flatten(1), layer.u0[0]
    u, v = (state[f"blocks.0.conv1.parametrizations.weight.0.{name}"] for name in ("_u", "_v"))
    torch.testing.assert_close(v, W.T @ u0 / (W.T @ u0).norm())
    torch.testing.assert_close(u, W @ v / (W @ v).norm())
    sigma = (layer.weight / layer.W_()).mean()
    torch.testing.assert_close(u @ W @ v, sigma.detach())


def test_a_vector_of_u_is_found_again_for_wide_and_for_tall_weights():
    for shape in [(5, 12), (12, 5)]:
        weight, u0 = torch.randn(shape, dtype=torch.float64), torch.randn(shape[0], dtype=torch.float64)
        _, v = layout.iterate(weight, u0)
        torch.testing.assert_close(layout.iterate(weight, layout.before(weight, v))[1], v, **MATCH)


@pytest.mark.parametrize("make", [generator, discriminator])
@pytest.mark.parametrize("host", [studiogan, mimicry, voletiv])
def test_converted_network_trains_as_the_host_does(make, host):
    """Batch statistics, running averages, gradients; u and v at rest, since the two iterate in another order."""
    network, inputs = make(host, {})
    for module in network.modules():
        if hasattr(module, "weight_u"):
            left, _, right = torch.linalg.svd(module.weight_orig.detach().flatten(1), full_matrices=False)
            module.weight_u.copy_(left[:, 0]), module.weight_v.copy_(right[0])
    ours = convert_checkpoint(network.state_dict()).model().train()
    momentum = {"voletiv": 0.001}.get(host.__name__.split(".")[-1], 0.1)
    for module in ours.modules():
        if isinstance(module, ConditionalBatchNorm2d):
            module.momentum = momentum
    x = inputs[0].requires_grad_()
    theirs_out, ours_out = network.train()(*inputs), ours(*inputs)
    torch.testing.assert_close(ours_out, theirs_out, **MATCH)
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (ours_out, theirs_out)]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-8)
    if make is generator:
        norm = next(m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d))
        torch.testing.assert_close(ours.blocks[0].norm1.running_var, norm.running_var, **MATCH)


def test_a_file_of_several_networks_gives_each(tmp_path):
    (g, _), (ema, inputs), (d, _) = (
        generator(mmgeneration, {}), generator(mmgeneration, {}), discriminator(mmgeneration, {}),
    )  # fmt: skip
    tensors = {
        f"{prefix}.{key}": tensor
        for prefix, network in {"generator": g, "generator_ema.module": ema, "discriminator": d}.items()
        for key, tensor in network.state_dict().items()
    }
    path = tmp_path / "sagan.pth"
    torch.save(
        {"meta": {"epoch": 3, "name": "x"}, "state_dict": tensors | {"generator_ema.steps": torch.ones(1)}},
        path,
    )
    conversion = convert_checkpoint(path, source="mmagic")
    assert sorted(conversion.state_dicts) == ["discriminator", "generator", "generator_ema"]
    torch.testing.assert_close(conversion.model()(*inputs), ema(*inputs), **MATCH)
    torch.testing.assert_close(conversion.model("generator")(*inputs), g(*inputs), **MATCH)


def test_networks_are_found_in_wrapped_and_parallel_checkpoints():
    g, inputs = generator(biggan_pytorch, {})
    d, _ = discriminator(biggan_pytorch, {})
    wrapped = {"G_ema": {f"module.{k}": v for k, v in g.state_dict().items()}, "D": d.state_dict(), "step": 5}
    conversion = convert_checkpoint({"model_state_dict": wrapped})
    assert sorted(conversion.state_dicts) == ["discriminator", "generator_ema"]
    torch.testing.assert_close(conversion.model()(*inputs), g(*inputs), **MATCH)


def test_the_moving_average_is_what_is_saved(tmp_path):
    (ema, (z, label)), (g, _) = (generator(biggan_pytorch, {}) for _ in range(2))
    conversion = convert_checkpoint({"G_ema": ema.state_dict(), "G": g.state_dict()})
    assert conversion.save(tmp_path) == [tmp_path / "generator.safetensors"]
    torch.testing.assert_close(Generator.from_pretrained(tmp_path)(z.float(), label), ema(z, label).float())


def test_a_conversion_stays_when_the_network_it_is_from_trains_on():
    network, inputs = generator(mimicry, {})
    expected = network(*inputs)
    conversion = convert_checkpoint(network.state_dict())
    torch.nn.init.zeros_(network.block2.c1.weight_orig)
    torch.testing.assert_close(conversion.model()(*inputs), expected, **MATCH)


def test_saved_conversion_is_a_model_folder_that_samples(tmp_path):
    g, (z, label) = generator(studiogan, {})
    d, _ = discriminator(studiogan, {})
    for network in (g, d):
        network.float()
        files = convert_checkpoint(network.state_dict()).save(tmp_path)
        assert all(file.is_file() for file in files)
    loaded = Generator.from_pretrained(tmp_path)
    assert loaded.config["norm_eps"] == 1e-4
    expected = g(z.float(), label)
    torch.testing.assert_close(loaded(z.float(), label), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(inference_generator(loaded)(z.float(), label), expected, rtol=1e-4, atol=1e-5)
    back = convert_checkpoint(tmp_path, target="studiogan")
    assert_same_bits(back.state_dicts["discriminator"], d.state_dict())


def test_between_two_hosts_there_is_ours():
    network, inputs = generator(studiogan, {})
    old = convert_checkpoint(convert_checkpoint(network.state_dict()), target="studiogan_2020")
    fresh = studiogan.Generator(old=True).double().eval()
    fresh.load_state_dict(old.state_dicts["generator"])
    torch.testing.assert_close(fresh(*inputs), network(*inputs), **MATCH)


def test_networks_without_spectral_norm_convert():
    network = Generator(32, 3, z_dim=6, base_channels=4, attention_at=[], spectral_norm=False).double().eval()
    theirs = convert_checkpoint(network, target="biggan_pytorch").state_dicts["generator"]
    assert not any(key.endswith("u0") for key in theirs)
    again = convert_checkpoint(theirs).model()
    assert again.config == network.config
    assert_same_bits(dict(again.state_dict()), dict(network.state_dict()))
