"""Scores of images against figures worked out another way."""

import numpy as np
import pytest
import torch

from sagan_kernels.data import ImageData
from sagan_kernels.evaluation import (
    Scorer,
    check_fit,
    evaluate,
    generate,
    nearest_training_images,
    within_class_distance,
)
from sagan_kernels.features import FeatureNet
from sagan_kernels.models import Generator
from sagan_kernels.sampling import to_bytes


def noise(count=60, classes=3, low=0, high=256, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(low, high, (count, 32, 32, 1), np.uint8)
    return ImageData(images, np.arange(count) % classes, [str(i) for i in range(classes)])


def test_distance_of_uniform_noise_is_a_third():
    # E|a - b| of two independent uniform numbers on [0, 1] is 1/3
    data = noise()
    np.testing.assert_allclose(within_class_distance(data.images, data.labels, 100), 1 / 3, atol=0.01)


def test_distance_never_pairs_an_image_with_itself():
    images = np.stack([np.zeros((4, 4, 1), np.uint8), np.full((4, 4, 1), 255, np.uint8)])
    np.testing.assert_allclose(within_class_distance(images, np.zeros(2, np.int64), 50), 1.0)


def test_distance_of_a_class_with_one_image_is_unknown():
    data = noise(4, classes=3)  # labels 0 1 2 0
    assert np.isnan(within_class_distance(data.images, data.labels, 5)).tolist() == [False, True, True]


def test_real_images_score_as_themselves_and_collapsed_ones_do_not():
    torch.manual_seed(0)
    data = noise(120)
    scorer = Scorer(FeatureNet("noise-cnn", 1, 3, width=4).eval(), data, pairs_per_class=200)
    same = scorer.score(data)
    assert same.fid == pytest.approx(0, abs=1e-7)
    assert same.diversity == pytest.approx(1)
    assert same.feature_diversity == pytest.approx(1)
    collapsed = ImageData(data.images[data.labels % 3][:], data.labels, data.class_names)  # one image a class
    scores = scorer.score(collapsed)
    assert scores.diversity == 0
    assert scores.feature_diversity < 1e-6
    assert scores.fid > same.fid


def test_accuracy_is_the_share_of_agreeing_labels():
    data = noise(30)
    net = FeatureNet("noise-cnn", 1, 3, width=4).eval()
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))  # always says class 1
    assert Scorer(net, data).score(data).accuracy == pytest.approx(1 / 3)


def test_unconditional_scores_compare_all_images_and_claim_no_accuracy():
    data = noise(90)
    data.images[data.labels == 0] //= 4  # one class is darker: together they differ more than within a class
    unlabelled = ImageData(data.images, np.zeros_like(data.labels), ["all"])
    net = FeatureNet("noise-cnn", 1, 3, width=4).eval()
    scores = Scorer(net, data, conditional=False).score(unlabelled).to_dict()
    assert "accuracy" not in scores
    assert scores["diversity"] == pytest.approx(1)


def test_samples_that_lack_a_class_are_scored_on_those_they_have():
    data = noise(60)
    some = ImageData(data.images[data.labels < 2], data.labels[data.labels < 2], data.class_names)
    scores = Scorer(FeatureNet("noise-cnn", 1, 3, width=4).eval(), data).score(some)
    assert scores.diversity == pytest.approx(1, abs=0.02)


def test_bytes_round_to_the_nearest():
    x = torch.tensor([-1.0, -1 + 0.6 / 127.5, 0.0, 1.0, 1.5]).reshape(1, 1, 1, 5)
    assert to_bytes(x).ravel().tolist() == [0, 1, 128, 255, 255]


def test_generated_sets_are_balanced_and_repeatable():
    generator = Generator(32, 3, z_dim=8, base_channels=2, image_channels=1, attention_at=()).eval()
    first = generate(generator, generator.config, 10, class_names=["a", "b", "c"], batch_size=4)
    again = generate(generator, generator.config, 10, class_names=["a", "b", "c"], batch_size=10)
    assert np.bincount(first.labels).tolist() == [4, 3, 3]
    assert first.images.shape == (10, 32, 32, 1)
    assert np.abs(first.images.astype(int) - again.images.astype(int)).max() <= 1


def test_nearest_training_image_is_found_with_its_distance():
    train = noise(50)
    shifted = np.clip(train.images[[7, 31]].astype(int) + 3, 0, 255).astype(np.uint8)
    index, distance = nearest_training_images(ImageData(shifted, np.zeros(2), ["a"]), train)
    assert index.tolist() == [7, 31]
    expected = np.sqrt(np.square(shifted / 255 - train.images[[7, 31]] / 255).mean((1, 2, 3)))
    np.testing.assert_allclose(distance, expected, rtol=1e-3)


def test_nearest_distance_is_looked_up_in_every_class():
    rng = np.random.default_rng(0)
    train = ImageData(rng.integers(0, 256, (40, 32, 32, 1), np.uint8), np.arange(40) // 20, ["near", "far"])
    # 2,000 held-out images sorted by class: the first half are training images, the second are white
    held_out = ImageData(
        np.concatenate([train.images[np.arange(900) % 20], np.full((1100, 32, 32, 1), 255, np.uint8)]),
        (np.arange(2000) >= 900).astype(np.int64),
        train.class_names,
    )
    generator = Generator(32, 2, z_dim=4, base_channels=2, image_channels=1, attention_at=()).eval()
    scorer = Scorer(FeatureNet("x-cnn", 1, 2, width=2).eval(), train, pairs_per_class=10)
    result = evaluate(generator, scorer, train, held_out, num_images=20)
    assert result["held_out"]["nearest_training_image"] > 0.3


def test_truncation_reaches_both_latents_and_statistics(monkeypatch):
    seen = []
    monkeypatch.setattr("sagan_kernels.evaluation.standing_statistics", lambda g, **k: seen.append(k) or g)
    monkeypatch.setattr(
        "sagan_kernels.evaluation.generate", lambda *a, **k: seen.append(k["truncation"]) or noise(20, 2)
    )
    train = noise(20, 2)
    generator = Generator(32, 2, z_dim=4, base_channels=2, image_channels=1, attention_at=()).eval()
    scorer = Scorer(FeatureNet("x-cnn", 1, 2, width=2).eval(), train, pairs_per_class=10)
    evaluate(generator, scorer, train, train, num_images=20, truncation=0.5)
    assert seen == [{"truncation": 0.5}, 0.5]


@pytest.mark.parametrize(
    ("names", "classes", "channels", "message"),
    [
        (["a", "b"], 3, 1, "feature network must be of 1 channels and 2 classes, got x-cnn with 1 and 3"),
        (["a", "b"], 2, 3, "got x-cnn with 3 and 2"),
        (["b", "a"], 2, 1, "class 0 of the data must be the generator's 'b', got 'a'"),
    ],
)
def test_network_features_and_data_must_belong_together(names, classes, channels, message):
    generator = Generator(32, 2, z_dim=4, base_channels=2, image_channels=1, attention_at=())
    generator.class_names = names
    data = ImageData(noise(4, 2).images, np.arange(4) % 2, ["a", "b"])
    with pytest.raises(ValueError, match=message):
        check_fit(generator, FeatureNet("x-cnn", channels, classes, width=2), data)
