"""How good samples are: Fréchet distance, class accuracy, diversity within a class, distance to training images."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sagan_kernels.data import ImageData
from sagan_kernels.features import FeatureNet, embed, frechet_distance
from sagan_kernels.models import Generator
from sagan_kernels.models.inference import inference_generator
from sagan_kernels.models.statistics import standing_statistics, truncated_normal
from sagan_kernels.sampling import grid, to_bytes


@dataclass(frozen=True)
class Scores:
    """Figures of one set of images against the real training images.

    fid: Fréchet distance in the feature network's space (never comparable with an Inception FID).
    accuracy: share of images that the feature network puts into the class they were made for.
        NaN, and left out of `to_dict`, where images have no labels to be made for.
    diversity: mean absolute pixel difference of two images of one class, over the same of real images.
    feature_diversity: the same with Euclidean distances of features.
    num_images: how many images were scored.
    """

    fid: float
    accuracy: float
    diversity: float
    feature_diversity: float
    num_images: int

    def to_dict(self) -> dict[str, float]:
        return {key: value for key, value in asdict(self).items() if value == value}


class Scorer:
    """Scores images in the space of one feature network against one set of real training images.

    Args:
        net: the feature network; its name names the scores.
        train: the real training images.
        conditional: False for an unconditional generator: diversity is then that of all images together.
        pairs_per_class: random pairs that diversity is averaged over.
    """

    def __init__(
        self, net: FeatureNet, train: ImageData, *, conditional: bool = True, pairs_per_class: int = 400
    ) -> None:
        self.net, self.conditional, self.pairs_per_class = net, conditional, pairs_per_class
        labels = self._groups(train)
        self._train_features, _ = embed(net, _real_batches(train))
        self._pixels = within_class_distance(train.images, labels, pairs_per_class)
        self._features = within_class_distance(self._train_features, labels, pairs_per_class, euclidean=True)

    def score(self, data: ImageData) -> Scores:
        """Scores of labelled images, real or generated."""
        features, predicted = embed(self.net, _real_batches(data))
        labels = self._groups(data)
        pixels = within_class_distance(data.images, labels, self.pairs_per_class)
        apart = within_class_distance(features, labels, self.pairs_per_class, euclidean=True)
        classes = min(len(pixels), len(self._pixels))
        present = np.flatnonzero(~np.isnan(pixels[:classes] + self._pixels[:classes]))
        return Scores(
            fid=frechet_distance(self._train_features, features),
            accuracy=float((predicted == data.labels).mean()) if self.conditional else math.nan,
            diversity=float(pixels[present].mean() / self._pixels[present].mean()),
            feature_diversity=float(apart[present].mean() / self._features[present].mean()),
            num_images=len(data),
        )

    def _groups(self, data: ImageData) -> np.ndarray:
        return data.labels if self.conditional else np.zeros_like(data.labels)


def within_class_distance(
    samples: np.ndarray, labels: np.ndarray, pairs: int, *, euclidean: bool = False
) -> np.ndarray:
    """Mean distance of random pairs of one class, for each class: (K,), NaN where a class has fewer than two.

    Args:
        samples: (N, ...): bytes of images or features.
        labels: (N,).
        pairs: pairs drawn for each class, always the same ones.
        euclidean: Euclidean distance instead of the mean absolute difference on a scale where 255 is 1.
    """
    random = np.random.default_rng(0)
    result = np.full(int(labels.max()) + 1, np.nan)
    for label in range(len(result)):
        index = np.flatnonzero(labels == label)
        if len(index) < 2:
            continue
        first = random.integers(len(index), size=pairs)
        step = random.integers(1, len(index), size=pairs)  # not 0: never the same image twice
        second = (first + step) % len(index)
        difference = samples[index[first]].astype(np.float64) - samples[index[second]]
        difference = difference.reshape(pairs, -1)
        distance = np.linalg.norm(difference, axis=1) if euclidean else np.abs(difference).mean(1) / 255
        result[label] = distance.mean()
    return result


def generate(
    generator: Callable[[Tensor, Tensor | None], Tensor],
    config: dict,
    num_images: int,
    *,
    class_names: list[str],
    truncation: float | None = None,
    batch_size: int = 64,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> ImageData:
    """`num_images` samples with balanced labels, rounded to bytes.

    Args:
        generator: a generator in eval mode or its inference form.
        config: the generator's configuration, for z_dim and num_classes.
        num_images: how many.
        class_names: names of the labels; one name for an unconditional generator.
        truncation: limit of the latents, None for none.
        batch_size: images a forward pass.
        seed: of the latents.
        device: where the generator is.
    """
    random = torch.Generator().manual_seed(seed)
    labels = np.arange(num_images) % max(config["num_classes"], 1)
    images = []
    with torch.inference_mode():
        for start in range(0, num_images, batch_size):
            label = torch.from_numpy(labels[start : start + batch_size]).to(device)
            z = truncated_normal((len(label), config["z_dim"]), truncation, random).to(device)
            x = generator(z, label if config["num_classes"] else None)
            images.append(to_bytes(x))
    return ImageData(np.concatenate(images), labels, class_names)


def evaluate(
    generator: Generator,
    scorer: Scorer,
    train: ImageData,
    held_out: ImageData,
    *,
    num_images: int,
    truncation: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores of samples beside those of held-out real images, and how near samples come to training images.

    Args:
        generator: in eval mode.
        scorer: made with `train`.
        train: real images the generator was trained on.
        held_out: real images it was not trained on.
        num_images: samples; as many as held-out images makes the two distances comparable.
        truncation: limit of the latents; batch-norm statistics are made to fit it.
        seed: of the latents.

    Returns:
        {"score": "FID-<features>", "samples": {...}, "held_out": {...}}; nearest_training_image is the median
        root-mean-square pixel distance to the nearest training image. A copy has 0; a generator that copies is far
        below the held-out images' value. At most 1,000 images, evenly spaced, are looked up.

    Raises:
        ValueError: generator, feature network and data are not of the same classes or channels.
    """
    check_fit(generator, scorer.net, train)
    samples = _samples(generator, train, num_images, truncation, seed)
    result: dict[str, Any] = {"score": f"FID-{scorer.net.name}"}
    for name, data in (("samples", samples), ("held_out", held_out)):
        at = np.linspace(0, len(data) - 1, min(1000, len(data))).round().astype(int)  # of every class
        few = ImageData(data.images[at], data.labels[at], data.class_names)
        distance = float(np.median(nearest_training_images(few, train)[1]))
        result[name] = scorer.score(data).to_dict() | {"nearest_training_image": distance}
    return result


def neighbor_sheet(
    generator: Generator,
    train: ImageData,
    *,
    truncation: float | None = None,
    seed: int = 0,
    per_class: int = 1,
) -> Image.Image:
    """Samples, each left of its nearest training image: copies would show as equal pairs."""
    samples = _samples(generator, train, per_class * len(train.class_names), truncation, seed)
    index, distance = nearest_training_images(samples, train)
    images, titles = [], []
    for i in range(len(samples)):
        for data, at, title in ((samples, i, "sample"), (train, index[i], f"nearest, {distance[i]:.2f}")):
            images.append(Image.fromarray(data.images[at].squeeze()))
            titles.append(title)
    return grid(images, 8, titles=titles)


def check_fit(generator: Generator, net: FeatureNet, train: ImageData) -> None:
    """Refuse a generator, a feature network and data that do not belong together.

    Raises:
        ValueError: they differ in channels, or in number, names or order of classes.
    """
    names, K = generator.class_names, generator.num_classes
    channels, classes = net.config["image_channels"], net.config["num_classes"]
    if channels != generator.config["image_channels"] or classes != len(train.class_names):
        raise ValueError(
            f"evaluate: the feature network must be of {generator.config['image_channels']} channels and "
            f"{len(train.class_names)} classes, got {net.name} with {channels} and {classes}; name another"
        )
    if K and len(train.class_names) != K:
        raise ValueError(
            f"evaluate: the data must have the generator's {K} classes, got {len(train.class_names)}"
        )
    if K and names is not None and names != train.class_names:
        at = next(i for i in range(K) if names[i] != train.class_names[i])
        raise ValueError(
            f"evaluate: class {at} of the data must be the generator's {names[at]!r}, got {train.class_names[at]!r}; "
            "use the data it was trained on, its classes in the same order"
        )


def _samples(
    generator: Generator, train: ImageData, num_images: int, truncation: float | None, seed: int
) -> ImageData:
    if truncation is not None:
        generator = standing_statistics(generator, truncation=truncation)
    return generate(
        inference_generator(generator),
        generator.config,
        num_images,
        class_names=train.class_names,
        truncation=truncation,
        seed=seed,
        device=generator.linear.bias.device,
    )


def nearest_training_images(samples: ImageData, train: ImageData) -> tuple[np.ndarray, np.ndarray]:
    """For each sample the index of the closest training image by pixels, and its root-mean-square distance.

    Returns:
        index int64 (N,), distance float64 (N,) on a scale where black to white is 1.
    """
    flat = torch.from_numpy(train.images.reshape(len(train), -1)).float() / 255
    squares = flat.square().sum(1)
    index, distance = [], []
    for start in range(0, len(samples), 256):
        x = torch.from_numpy(samples.images[start : start + 256].reshape(-1, flat.shape[1])).float() / 255
        squared = x.square().sum(1, keepdim=True) + squares - 2 * x @ flat.T
        best = squared.min(1)
        index.append(best.indices.numpy())
        distance.append((best.values.clamp_min(0) / flat.shape[1]).sqrt().double().numpy())
    return np.concatenate(index), np.concatenate(distance)


def _real_batches(data: ImageData, batch_size: int = 256) -> Iterator[Tensor]:
    for start in range(0, len(data), batch_size):
        yield data.batch(np.arange(start, min(start + batch_size, len(data))))[0]
