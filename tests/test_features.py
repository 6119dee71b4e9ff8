"""The feature network and the Fréchet distance."""

import numpy as np
import pytest
import scipy.linalg
import torch

from sagan_kernels.data import ImageData
from sagan_kernels.features import (
    FeatureNet,
    embed,
    fingerprint,
    frechet_distance,
    load_feature_net,
    save_feature_net,
    train_feature_net,
)


def stripes(count=384, seed=0):
    """Three classes of 32-px gray images that differ in the direction of a stripe pattern, plus noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    y, x = np.mgrid[:32, :32]
    waves = np.stack([np.sin(x), np.sin(y), np.sin(x + y)])[labels]
    images = (waves * 80 + 128 + rng.normal(0, 20, waves.shape)).clip(0, 255).astype(np.uint8)
    return ImageData(images[..., None], labels, ["x", "y", "xy"])


def test_frechet_distance_matches_the_matrix_square_root():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(300, 7)) @ rng.normal(size=(7, 7)), rng.normal(1, 2, size=(200, 7))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)


def test_frechet_distance_of_rank_deficient_features_is_finite():
    a = np.random.default_rng(0).normal(size=(50, 2)) @ np.ones((2, 5))  # rank 1
    assert frechet_distance(a, a + 1) == pytest.approx(5, rel=1e-6)


def test_training_learns_classes_that_a_held_out_set_confirms():
    net = train_feature_net(stripes(), "stripes-cnn", epochs=2, batch_size=32)
    test = stripes(96, seed=1)
    _, predicted = embed(net, iter([test.batch(np.arange(96))[0]]))
    assert (predicted == test.labels).mean() > 0.95


def test_saved_network_gives_the_same_features(tmp_path):
    net = FeatureNet("tiny-cnn", 1, 3, width=4).eval()
    save_feature_net(net, tmp_path / "net.safetensors", accuracy=0.5)
    loaded = load_feature_net(tmp_path / "net.safetensors")
    x = torch.randn(2, 1, 32, 32)
    assert loaded.name == "tiny-cnn"
    torch.testing.assert_close(loaded.features(x), net.features(x), rtol=0, atol=0)


def test_file_that_is_no_feature_network_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must be a \.safetensors file"):
        load_feature_net(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match="must hold a feature network"):
        load_feature_net(tmp_path / "text.safetensors")


def test_fingerprint_changes_with_any_pixel_or_label():
    data = stripes(12)
    other_pixel = ImageData(data.images.copy(), data.labels, data.class_names)
    other_pixel.images[3, 4, 5] ^= 1
    other_label = ImageData(data.images, data.labels[::-1].copy(), data.class_names)
    assert len({fingerprint(d) for d in (data, other_pixel, other_label)}) == 3
