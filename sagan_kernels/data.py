"""Training images: an image folder, an .npz pack, or Fashion-MNIST's IDX files, held in memory as bytes."""

import gzip
import struct
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

Split = Literal["train", "test"]
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
HELD_OUT = 10
"""A pack or folder has no test split of its own: every tenth image of each class is held out as one."""
FASHION_CLASSES = [
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
]  # fmt: skip


@dataclass(frozen=True)
class ImageData:
    """Labelled images of one size. images uint8 (N, R, R, C), labels int64 (N,), one name a class."""

    images: np.ndarray
    labels: np.ndarray
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """Images (B, C, R, R) float32 in [-1, 1], channels_last, and labels (B,) int64."""
        images = torch.from_numpy(self.images[index]).permute(0, 3, 1, 2)
        return images.float() / 127.5 - 1, torch.from_numpy(self.labels[index])


def load_images(
    path: str | Path,
    *,
    resolution: int,
    channels: int = 3,
    split: Split = "train",
    broken: Literal["refuse", "skip"] = "refuse",
) -> ImageData:
    """Read all images of one split into memory: R·R·channels bytes an image.

    Args:
        path: a folder of class folders (or of images: one class), an .npz file with `images` uint8 (N, R, R, C) or
            (N, R, R), `labels` and optionally `class_names`, or a folder with Fashion-MNIST's four IDX files.
        resolution: side in pixels. Folder images are turned as their EXIF
            says, put on white where transparent, center-cropped and resized; 28 px IDX images are padded to 32,
            packs must fit.
        channels: 3 for RGB, 1 for gray.
        split: "train" or "test". IDX files have their own; elsewhere every tenth image of each class is the test split.
        broken: what to do with a file that cannot be decoded: "refuse" names it, "skip" leaves it out.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: empty, broken, or of another size.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"data: {path} must be a folder or an .npz file, got nothing there")
    if path.is_file():
        return _split(_read_pack(path, resolution, channels), split)
    if _idx_file(path, "train-images-idx3-ubyte"):
        return _read_idx(path, resolution, channels, split)
    return _split(_read_folder(path, resolution, channels, broken), split)


def _split(data: ImageData, split: Split) -> ImageData:
    held_out = np.zeros(len(data), bool)
    for label in range(len(data.class_names)):
        held_out[np.flatnonzero(data.labels == label)[HELD_OUT - 1 :: HELD_OUT]] = True
    chosen = held_out if split == "test" else ~held_out
    if not chosen.any():
        raise ValueError(
            f"data: the {split} split needs a class of at least {HELD_OUT} images, got {len(data)} images "
            f"in {len(data.class_names)} classes; add images"
        )
    return ImageData(data.images[chosen], data.labels[chosen], data.class_names)


def _read_pack(path: Path, resolution: int, channels: int) -> ImageData:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as pack:
            arrays = {key: pack[key] for key in ("images", "labels", "class_names") if key in pack}
            if not all(isinstance(array, np.ndarray) for array in arrays.values()):
                raise ValueError("a member is no array")
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: must be an .npz pack of plain arrays, got a file that is not") from error
    if missing := [key for key in ("images", "labels") if key not in arrays]:
        raise ValueError(f"{path}: an .npz pack must have 'images' and 'labels', got no {missing[0]!r}")
    images, labels = arrays["images"], arrays["labels"]
    names = [str(name) for name in arrays.get("class_names", np.array([])).ravel()]
    if images.ndim == 3:
        images = images[..., None]
    wanted = f"uint8 (N, {resolution}, {resolution}, {channels})"
    if images.dtype != np.uint8 or images.shape[1:] != (resolution, resolution, channels):
        raise ValueError(f"{path}: images must be {wanted}, got {images.dtype} {images.shape}")
    _check_labels(path, images, labels)
    labels = labels.astype(np.int64)
    names = names or [str(i) for i in range(int(labels.max()) + 1)]
    if labels.max() >= len(names):
        raise ValueError(f"{path}: labels must be below {len(names)} classes, got {labels.max()}")
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: class_names must differ, got {', '.join(names)}")
    return ImageData(images, labels, names)


def _check_labels(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    got = f"{labels.dtype} {labels.shape}"
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),) or len(images) == 0:
        raise ValueError(
            f"{path}: labels must be one whole number for each of {len(images)} images, got {got}"
        )
    if labels.min() < 0:
        raise ValueError(f"{path}: labels must be at least 0, got {labels.min()}")


def _idx_file(folder: Path, stem: str) -> Path | None:
    return next((p for p in (folder / stem, folder / f"{stem}.gz") if p.is_file()), None)


def _read_idx(folder: Path, resolution: int, channels: int, split: Split) -> ImageData:
    stem = "train" if split == "train" else "t10k"
    arrays = []
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        file = _idx_file(folder, f"{stem}-{kind}")
        if file is None:
            raise FileNotFoundError(
                f"data: {folder} must have {stem}-{kind} or {stem}-{kind}.gz, got neither"
            )
        try:
            blob = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
            dims = blob[3]
            shape = struct.unpack(f">{dims}I", blob[4 : 4 + 4 * dims])
            arrays.append(np.frombuffer(blob, np.uint8, offset=4 + 4 * dims).reshape(shape))
        except (OSError, EOFError, IndexError, zlib.error, struct.error, ValueError) as error:
            raise ValueError(f"{file}: must be a whole IDX file, got one that cannot be read") from error
    images, labels = arrays
    if images.ndim != 3 or images.shape[1] != images.shape[2]:
        raise ValueError(f"data: IDX images in {folder} must be square, got {images.shape}")
    _check_labels(folder, images, labels)
    margin = resolution - images.shape[1]
    if margin < 0 or margin % 2 or channels != 1:
        raise ValueError(
            f"data: IDX images of {images.shape[1]} px are padded to an even margin and have 1 channel, "
            f"got resolution {resolution} and {channels} channels; use resolution 32 and image_channels 1"
        )
    padded = np.pad(images, ((0, 0), (margin // 2,) * 2, (margin // 2,) * 2))[..., None]
    names = FASHION_CLASSES if labels.max() < 10 else [str(i) for i in range(int(labels.max()) + 1)]
    return ImageData(padded, labels.astype(np.int64), names)


def _read_folder(folder: Path, resolution: int, channels: int, broken: str) -> ImageData:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not files:
        raise ValueError(
            f"data: {folder} must hold images ({', '.join(sorted(IMAGE_SUFFIXES))}) or IDX files, got none"
        )
    classes = sorted({_class_of(file, folder) for file in files})
    images, labels, skipped = [], [], []
    for file in files:
        try:
            with Image.open(file) as image:
                images.append(_fit(image, resolution, channels))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            if broken == "refuse":
                raise ValueError(
                    f"{file}: must be an image, got one that cannot be decoded; "
                    "mend or remove it, or skip broken images"
                ) from error
            skipped.append(file)
            continue
        labels.append(classes.index(_class_of(file, folder)))
    if not images:
        raise ValueError(f"data: {folder} must hold images, got only broken ones ({len(files)} files)")
    if skipped:
        told = ", ".join(str(file.relative_to(folder)) for file in skipped[:3])
        more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        print(f"data: skipped {len(skipped)} broken of {len(files)} images: {told}{more}", file=sys.stderr)
    return ImageData(np.stack(images), np.array(labels, np.int64), classes)


def _class_of(file: Path, folder: Path) -> str:
    parts = file.relative_to(folder).parts
    return parts[0] if len(parts) > 1 else folder.resolve().name


def _fit(image: Image.Image, resolution: int, channels: int) -> np.ndarray:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 or 32 bits a pixel, which convert() would clip to white
        deep = np.asarray(image, np.float64)
        image = Image.fromarray(np.round(deep / max(65535.0, deep.max()) * 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if side != resolution:
        image = image.resize((resolution, resolution), Image.Resampling.LANCZOS)
    return np.asarray(image, np.uint8).reshape(resolution, resolution, channels)
