"""The shipped models: complete, licensed, and drawing the very images they drew when they were shipped."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sagan_kernels import create_model, list_models, sampling, zoo
from sagan_kernels.features import load_feature_net

GOLDEN = Path(__file__).parent / "golden"
SHIPPED = list_models(pretrained=True)


def drawn(name):
    """Seeds 0 to 3 of classes 0, 3 and 7: uint8 (12, 32, 32) or (12, 32, 32, 3)."""
    generator = create_model(name, pretrained=True)
    samples = sampling.draw(generator, range(4), label=[0, 3, 7], batch_size=5)
    return np.stack([np.asarray(sample.image) for sample in samples])


def test_two_models_are_shipped():
    assert {"sagan_32_avatars", "sagan_32_fashion"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_golden_samples_are_drawn_again(name):
    golden = np.load(GOLDEN / f"{name}.npz")["images"].astype(int)
    difference = np.abs(drawn(name).astype(int) - golden)
    # another CPU sums in another order: a last gray level may differ, a picture may not
    assert difference.max() <= 3
    assert (difference > 1).mean() < 1e-3


@pytest.mark.parametrize("name", SHIPPED)
def test_entry_config_and_weights_agree(name):
    entry = zoo.entry(name)
    for part in ("generator", "discriminator"):
        model = create_model(name, pretrained=True, part=part)
        for key, value in getattr(entry, part).items():
            assert model.config[key] == value
        assert len(model.class_names) == model.num_classes


@pytest.mark.parametrize("name", SHIPPED)
def test_discriminator_gives_the_golden_samples_their_golden_logits(name):
    golden = np.load(GOLDEN / f"{name}.npz")
    critic = create_model(name, pretrained=True, part="discriminator")
    images = torch.from_numpy(golden["images"]).reshape(12, 32, 32, -1).permute(0, 3, 1, 2)
    label = torch.tensor([0, 3, 7]).repeat_interleave(4)
    with torch.no_grad():
        logits = critic(images.float() / 127.5 - 1, label)
    torch.testing.assert_close(logits, torch.from_numpy(golden["logits"]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SHIPPED)
def test_feature_network_agrees_with_the_labels_of_samples(name):
    generator = create_model(name, pretrained=True)
    net = load_feature_net(zoo.feature_net(zoo.entry(name).data["features"]))
    label = torch.arange(generator.num_classes).repeat(20)
    with torch.no_grad():
        images = generator(torch.randn(len(label), generator.z_dim), label)
        accuracy = (net(images).argmax(1) == label).float().mean().item()
    assert accuracy > 0.8


@pytest.mark.parametrize("name", SHIPPED)
def test_card_and_entry_name_both_licenses(name):
    entry = zoo.entry(name)
    card = (entry.folder / "README.md").read_text(encoding="utf-8")
    assert entry.weights is not None
    for license in (entry.weights["license"], entry.data["license"]):
        assert f"{license}" in card
    assert entry.weights["score"] in card
    for key in ("fid", "accuracy", "diversity"):
        assert f"{entry.weights[key]:.3f}" in card, key


def test_shipped_weights_stay_small():
    files = zoo.zoo_folder().rglob("*.safetensors")
    assert sum(path.stat().st_size for path in files) < 25e6
