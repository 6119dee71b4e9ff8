"""Our networks in timm: listed, created, loaded, adapted, pushed, and equal to our own."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch


def _torchvision():
    """Make torchvision importable, which timm needs, where its build for CUDA stands beside a torch for CPUs."""
    try:
        return importlib.import_module("torchvision"), None
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):  # the operators of its C++ part, which importing it asks for
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return importlib.import_module("torchvision"), library


_KEPT = _torchvision()

import timm  # noqa: E402
from PIL import Image  # noqa: E402
from timm.data import create_transform, resolve_model_data_config  # noqa: E402

import sagan_kernels.timm  # noqa: E402
from sagan_kernels import Discriminator, Generator, create_model, publishing, timm_settings, zoo  # noqa: E402
from sagan_kernels.nn import SelfAttention2d  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")

SHIPPED = {"sagan_32_avatars": (3, 16), "sagan_32_fashion": (1, 10)}
TINY = {"base_channels": 8, "widths": [1, 2, 2, 2]}


@pytest.fixture
def images():
    return torch.rand(3, 3, 32, 32) * 2 - 1


def logits(critic, x):
    """(B, K): our discriminator's logit of every image for every class."""
    with torch.no_grad():
        columns = [critic(x, torch.full((len(x),), k)) for k in range(critic.num_classes)]
    return torch.stack(columns, 1)


def same(first, second):
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_every_network_is_listed():
    names = [f"sagan_{side}_{part}" for side in (32, 64, 128, 256) for part in ("discriminator", "generator")]
    assert timm.list_models("sagan*") == names
    tagged = timm.list_models("sagan*", pretrained=True)
    assert tagged == [
        f"sagan_32_{p}.{tag}" for p in ("discriminator", "generator") for tag in ("avatars", "fashion")
    ]


def test_shipped_entries_are_architectures_of_timm():
    for name in SHIPPED:
        for part in ("discriminator", "generator"):
            assert timm_settings.architecture(zoo.entry(name), part) == f"sagan_32_{part}"


@pytest.mark.parametrize("name", SHIPPED)
def test_pretrained_discriminator_gives_the_logit_of_each_class(name):
    channels, K = SHIPPED[name]
    x = torch.rand(3, channels, 32, 32) * 2 - 1
    critic = create_model(name, pretrained=True, part="discriminator")
    model = timm.create_model(f"sagan_32_discriminator.{name.split('_')[-1]}", pretrained=True).eval()
    assert (model.num_classes, model.pretrained_cfg["license"]) == (K, zoo.entry(name).weights["license"])
    with torch.no_grad():
        torch.testing.assert_close(model(x), logits(critic, x), rtol=1e-4, atol=1e-4)
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        torch.testing.assert_close(features, critic.features(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SHIPPED)
def test_pretrained_generator_is_ours_bit_for_bit(name):
    model = timm.create_model(f"sagan_32_generator.{name.split('_')[-1]}", pretrained=True)
    ours = create_model(name, pretrained=True)
    assert same(model, ours)
    z, label = torch.randn(2, 128), torch.tensor([0, 1])
    with torch.no_grad():
        assert torch.equal(model.eval()(z, label), ours(z, label))


@pytest.mark.parametrize("side", [32, 64, 128, 256])
def test_published_networks_are_created_at_every_resolution(side):
    model = timm.create_model(f"sagan_{side}_discriminator", num_classes=7, base_channels=8)
    assert model(torch.zeros(1, 3, side, side)).shape == (1, 7)
    assert timm.create_model(f"sagan_{side}_generator", base_channels=8).resolution == side


@pytest.mark.parametrize("pool", ["sum", "avg", "max"])
def test_pooling_is_what_it_is_called(images, pool):
    model = timm.create_model("sagan_32_discriminator", num_classes=0, global_pool=pool, **TINY)
    maps = model.forward_features(images)
    expected = {"sum": maps.sum((2, 3)), "avg": maps.mean((2, 3)), "max": maps.flatten(2).max(2)[0]}[pool]
    torch.testing.assert_close(model(images), expected)
    assert (maps >= 0).all()


def test_head_is_dropped_replaced_and_read():
    model = timm.create_model("sagan_32_discriminator.avatars", pretrained=True)
    assert model.get_classifier().weight.shape == (16, 128)
    model.reset_classifier(5, "avg")
    x = torch.zeros(2, 3, 32, 32)
    assert model(x).shape == (2, 5)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 128, 8, 8)
    with pytest.raises(ValueError, match=r"global_pool must be one of .*, got 'catavgmax'"):
        model.reset_classifier(5, "catavgmax")


@pytest.mark.parametrize(
    ("settings", "shape"),
    [({"num_classes": 5}, (2, 5)), ({"in_chans": 1}, (2, 16)), ({"num_classes": 0, "in_chans": 4}, (2, 128))],
    ids=str,
)
def test_weights_are_adapted_to_other_classes_and_channels(settings, shape):
    whole = timm.create_model("sagan_32_discriminator.avatars", pretrained=True)
    model = timm.create_model("sagan_32_discriminator.avatars", pretrained=True, **settings)
    assert model(torch.zeros(2, settings.get("in_chans", 3), 32, 32)).shape == shape
    assert torch.equal(model.blocks[2].conv2.weight, whole.blocks[2].conv2.weight)
    if settings.get("in_chans") == 1:
        torch.testing.assert_close(
            model.blocks[0].conv1.weight, whole.blocks[0].conv1.weight.sum(1, keepdim=True)
        )


def test_features_only_gives_the_maps_after_each_block(images):
    whole = timm.create_model("sagan_32_discriminator.avatars", pretrained=True).eval()
    model = timm.create_model("sagan_32_discriminator.avatars", pretrained=True, features_only=True).eval()
    assert model.feature_info.channels() == [32, 64, 128, 128]
    assert model.feature_info.reduction() == [2, 4, 4, 4]
    with torch.no_grad():
        maps, expected = model(images), images
        for i, (block, found) in enumerate(zip(whole.blocks, maps, strict=True)):
            expected = block(expected)
            if i == 0:
                expected = whole.attention["16"](expected)
            torch.testing.assert_close(found, expected)
        last, some = whole.forward_intermediates(images, indices=[1, 3])
        assert torch.equal(last, whole.forward_features(images))
        assert [torch.equal(a, b) for a, b in zip(some, (maps[1], maps[3]), strict=True)] == [True, True]
    two = timm.create_model("sagan_32_discriminator", features_only=True, out_indices=(0, 1))
    assert [tuple(found.shape[2:]) for found in two(images)] == [(16, 16), (8, 8)]
    assert len(two.model.blocks) == 2
    assert isinstance(two.model.get_classifier(), torch.nn.Identity)
    runs = []
    whole.blocks[2].register_forward_hook(lambda *_: runs.append(1))
    (first,) = whole.forward_intermediates(images, indices=[0], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(first, maps[0])
    assert not runs
    with pytest.raises(ValueError, match="output_fmt must be NCHW, got 'NLC'"):
        whole.forward_intermediates(images, output_fmt="NLC")


def test_checkpointing_runs_blocks_twice_and_changes_no_gradient(images):
    model = timm.create_model("sagan_32_discriminator", num_classes=2, **TINY)
    runs, grads = [], []
    model.blocks[1].register_forward_pre_hook(lambda *_: runs.append(1))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        grads.append(torch.autograd.grad(model(images).square().sum(), list(model.blocks.parameters())))
    assert len(runs) == 1 + 2
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second)


def test_data_settings_give_images_between_minus_one_and_one():
    model = timm.create_model("sagan_32_discriminator.avatars")
    settings = resolve_model_data_config(model)
    assert settings["input_size"] == (3, 32, 32)
    x = create_transform(**settings, is_training=False)(Image.new("RGB", (50, 40), (255, 0, 255)))
    assert x.shape == (3, 32, 32)
    assert (x.amin().item(), x.amax().item()) == (-1, 1)


def test_generators_refuse_what_needs_an_image():
    with pytest.raises(
        NotImplementedError, match="features_only must be left out, since the input is a latent"
    ):
        timm.create_model("sagan_32_generator", features_only=True)
    model = timm.create_model("sagan_32_generator", drop_rate=0.1, num_classes=2)
    with pytest.raises(NotImplementedError, match="the input is a latent vector"):
        model.forward_features(torch.zeros(1, 3, 32, 32))


def test_one_published_repository_serves_both_loaders(ada, images):
    publishing.publish({"sagan_32_avatars": "ada/avatars"})
    config = json.loads(ada.content("ada/avatars", "config.json"))
    assert (config["architecture"], config["num_classes"], config["num_features"]) == (
        "sagan_32_discriminator", 16, 128,
    )  # fmt: skip
    bundled = timm.create_model("sagan_32_discriminator.avatars", pretrained=True).eval()
    for name in (
        "hf-hub:ada/avatars",
        f"hf-hub:ada/avatars@{ada.repositories['ada/avatars'].branches['main']}",
    ):
        model = timm.create_model(name, pretrained=True).eval()
        assert same(model, bundled)
        assert model.pretrained_cfg["label_names"][:2] == ["critters", "clay"]
    ours = Discriminator.from_pretrained("ada/avatars")
    assert same(ours, create_model("sagan_32_avatars", pretrained=True, part="discriminator"))
    with torch.no_grad():
        torch.testing.assert_close(bundled(images), logits(ours, images), rtol=1e-4, atol=1e-4)
    assert Generator.from_pretrained("ada/avatars").class_names == ours.class_names
    folder = publishing.write_folder("sagan_32_avatars", "ada/avatars", Path("out"))
    assert same(timm.create_model(f"local-dir:{folder}", pretrained=True), bundled)


@pytest.mark.parametrize("part", ["discriminator", "generator"])
def test_timm_pushes_and_loads_what_it_made(ada, part):
    model = timm.create_model(f"sagan_32_{part}", num_classes=4)
    timm.models._hub.push_to_hf_hub(model, "ada/own", safe_serialization=True, model_card={"license": "mit"})
    assert same(timm.create_model("hf-hub:ada/own", pretrained=True), model)
    timm.models._hub.save_for_hf(model, "saved", safe_serialization=True)
    assert same(timm.create_model("local-dir:saved", pretrained=True), model)
    assert "model.safetensors" in ada.repositories["ada/own"].find("main").files


def test_untrained_networks_say_that_they_have_no_weights():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for sagan_64_discriminator"):
        timm.create_model("sagan_64_discriminator", pretrained=True)


def test_folding_keeps_what_is_folded_already():
    model = timm.create_model("sagan_32_discriminator", num_classes=3, **TINY)
    state = model.state_dict()
    assert sagan_kernels.timm.fold_discriminator(state, model) is state


@pytest.mark.parametrize("K", [0, 3])
@pytest.mark.parametrize("normalize", [True, False])
def test_folding_fits_every_kind_of_discriminator(images, K, normalize):
    critic = Discriminator(
        32, K, base_channels=8, attention_at=[16], spectral_norm=normalize, widths=[1, 2, 2, 2]
    )
    critic(images, torch.arange(3) if K else None)  # moves the singular vectors
    critic.eval()
    model = timm.create_model("sagan_32_discriminator", num_classes=max(K, 1), **TINY).eval()
    model.load_state_dict(sagan_kernels.timm.fold_discriminator(critic.state_dict(), model))
    expected = logits(critic, images) if K else critic(images)[:, None]
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)


def test_self_attention_is_an_attention_layer_of_timms_networks():
    settings = {
        "num_classes": 3,
        "zero_init_last": False,
        "block_args": {"attn_layer": sagan_kernels.timm.AttentionLayer},
    }
    model = timm.create_model("resnet18", **settings)
    layers = [module for module in model.modules() if isinstance(module, SelfAttention2d)]
    assert [layer.query.in_channels for layer in layers] == [64, 64, 128, 128, 256, 256, 512, 512]
    plain = timm.create_model("resnet18", num_classes=3)
    plain.load_state_dict(model.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), plain.eval()(x))  # gamma is 0
        for layer in layers:
            layer.gamma.fill_(1)
        assert not torch.allclose(model(x), plain(x), rtol=1e-3, atol=1e-3)


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.models", None)
    monkeypatch.delitem(sys.modules, "sagan_kernels.timm")
    with pytest.raises(
        ImportError, match=r"sagan_kernels\.timm needs timm: pip install sagan-kernels\[timm\]"
    ):
        importlib.import_module("sagan_kernels.timm")
