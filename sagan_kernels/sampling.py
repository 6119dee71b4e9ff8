"""Images from a generator: one seed, one image, whatever the batch; and labelled grids of them."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import index

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sagan_kernels.models import Generator
from sagan_kernels.models.inference import inference_generator
from sagan_kernels.models.statistics import standing_statistics, truncated_normal


@dataclass(frozen=True)
class Sample:
    """One image and what it was made from: (seed, label) gives it again. label is None without classes."""

    seed: int
    label: int | None
    image: Image.Image


def draw(
    generator: Generator,
    seeds: Sequence[int],
    *,
    label: int | Sequence[int] | None = None,
    truncation: float | None = None,
    batch_size: int = 16,
) -> Iterator[Sample]:
    """Draw an image for each seed, in order.

    A latent depends on its seed and label alone, so a batch of another size gives the same images
    (up to rounding of the last gray level), and one seed under two labels gives unrelated latents.

    Args:
        generator: left as it is; its inference form is what runs.
        seeds: not negative.
        label: class of all images; several to draw every seed with each, label by label; None to let each
            seed choose its own.
        truncation: limit of the latents in standard deviations, arXiv:1809.11096, section 3.1; batch-norm
            statistics are made anew to fit it, from 512 images.
        batch_size: images a forward pass.

    Returns:
        Samples in mode "L" or "RGB", made as they are asked for.

    Raises:
        ValueError: a label is out of range or given to an unconditional generator, truncation or batch_size
            is not positive, or a seed is negative.
    """
    if batch_size < 1:
        raise ValueError(f"draw: batch_size must be at least 1, got {batch_size}")
    seeds = list(seeds)
    labels = list(label) if isinstance(label, Iterable) else [None if label is None else index(label)]
    if min(seeds, default=0) < 0:
        raise ValueError(f"draw: seeds must not be negative, got {min(seeds)}")
    for number in labels:
        _check_label(number, generator.num_classes)
    if truncation is not None:
        generator = standing_statistics(generator, truncation=truncation)
    wanted = ((seed, number) for number in labels for seed in seeds)
    return _draw(generator, wanted, truncation, batch_size)


def latent(seed: int, label: int | None, z_dim: int, truncation: float | None = None) -> Tensor:
    """(z_dim,) fp32 standard normal numbers of one image, from a stream of its own."""
    stream = np.random.SeedSequence((seed, 0 if label is None else label + 1)).generate_state(1, np.uint64)
    return truncated_normal((z_dim,), truncation, torch.Generator().manual_seed(int(stream[0] >> 1)))


def to_bytes(x: Tensor) -> np.ndarray:
    """(B, C, H, W) in [-1, 1] -> uint8 (B, H, W, C), rounded to the nearest."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def grid(
    images: Sequence[Image.Image],
    columns: int,
    *,
    row_labels: Sequence[str] | None = None,
    titles: Sequence[str] | None = None,
    scale: int | None = None,
) -> Image.Image:
    """All images on one sheet, row by row, enlarged by whole pixels.

    Args:
        images: of one size and mode, "L" or "RGB"; at least one.
        columns: images a row.
        row_labels: a text left of each row.
        titles: a text below each image, cut to its width.
        scale: enlargement; None for the least that makes images 96 pixels wide.

    Raises:
        ValueError: no images, no columns, or not as many texts as rows or images.
    """
    if not images or columns < 1:
        raise ValueError(f"grid: must have images and columns, got {len(images)} images, {columns} columns")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    for name, texts, count in (("row_labels", row_labels, rows), ("titles", titles, len(images))):
        if texts is not None and len(texts) != count:
            raise ValueError(f"grid: {name} must be {count} texts, got {len(texts)}")
    width, height = images[0].size
    scale = scale or math.ceil(96 / width)
    width, height = width * scale, height * scale
    font = ImageFont.load_default(14)
    line, gap = 20, 6
    left = gap + (max(math.ceil(font.getlength(text)) for text in row_labels) + gap if row_labels else 0)
    step_x, step_y = width + gap, height + (line if titles else gap)
    sheet = Image.new(images[0].mode, (left + columns * step_x, gap + rows * step_y), "white")
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = left + i % columns * step_x, gap + i // columns * step_y
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        if titles:
            text = _shortened(titles[i], font, width)
            pen.text((x + width // 2, y + height + line // 2), text, "black", font, anchor="mm")
    for row, text in enumerate(row_labels or ()):
        pen.text((left - gap, gap + row * step_y + height // 2), text, "black", font, anchor="rm")
    return sheet


def _draw(
    generator: Generator,
    wanted: Iterator[tuple[int, int | None]],
    truncation: float | None,
    batch_size: int,
) -> Iterator[Sample]:
    network, device = inference_generator(generator), generator.linear.bias.device
    while batch := list(islice(wanted, batch_size)):
        if generator.num_classes:
            batch = [(s, _label_of(s, generator.num_classes) if k is None else k) for s, k in batch]
        z = torch.stack([latent(seed, label, generator.z_dim, truncation) for seed, label in batch])
        label = torch.tensor([k for _, k in batch]) if generator.num_classes else None
        with torch.inference_mode():  # per batch: a yield inside would leave it on for the caller
            x = network(z.to(device), None if label is None else label.to(device))
            images = to_bytes(x)
        for (seed, number), image in zip(batch, images, strict=True):
            yield Sample(seed, number, Image.fromarray(image[..., 0] if image.shape[2] == 1 else image))


def _label_of(seed: int, num_classes: int) -> int:
    return int(np.random.default_rng(seed).integers(num_classes))


def _check_label(label: int | None, num_classes: int) -> None:
    if label is None:
        return
    if not num_classes:
        raise ValueError(f"draw: label must be left out for an unconditional generator, got {label}")
    if not 0 <= label < num_classes:
        raise ValueError(f"draw: label must be 0 to {num_classes - 1}, got {label}")


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """`text`, or as much of it as fits into `width` pixels, with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
