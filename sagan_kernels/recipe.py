"""What a TOML file says about making a model: both networks' arguments, and one frozen record of the training run."""

import difflib
import inspect
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sagan_kernels import zoo
from sagan_kernels.augment import POLICIES
from sagan_kernels.models import Discriminator, Generator

_KINDS = {int: "a whole number", float: "a number", str: "a text"}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. Learning rates and moments default to the paper's, arXiv:1805.08318, section 4."""

    batch_size: int = 256  # real images a discriminator step
    total_kimg: float = 256_000.0  # run length, thousands of real images shown
    lr_g: float = 1e-4  # Adam step size of the generator
    lr_d: float = 4e-4  # of the discriminator: two time scales, arXiv:1706.08500
    beta1: float = 0.0  # Adam, both networks
    beta2: float = 0.9
    decay: float = 0.0  # share of the run, its last, over which both step sizes fall linearly to zero
    d_steps: int = 1  # discriminator steps a generator step
    ema_decay: float = 0.999  # of the generator's weights, a generator step
    augment: tuple[str, ...] = ()  # DiffAugment policies: color, translation, cutout
    r1_gamma: float = 0.0  # weight of the R1 penalty, as γ/2 · E‖∇D(real)‖²
    r1_every: int = 16  # discriminator steps between R1 steps, whose weight is multiplied by this (lazy)
    diversity: float = 0.0  # weight of regularizers.diversity_shortfall in the generator's loss
    precision: str = "fp32"  # or "bf16": autocast of both networks' forward passes; R1 stays in fp32
    seed: int = 0
    log_every: int = 50  # generator steps between lines of metrics.jsonl
    checkpoint_every: int = 500  # generator steps
    score_every: int = 500  # generator steps; each score may become the new best
    score_images: int = 2000
    grid_every: int = 500  # generator steps between sample grids

    def __post_init__(self) -> None:
        for name in ("batch_size", "total_kimg", "lr_g", "lr_d", "d_steps", "r1_every", "log_every",
                     "checkpoint_every", "score_every", "score_images", "grid_every"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ValueError(f"[train] {name}: must be positive, got {getattr(self, name)}")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"[train] {name}: must be at least 0 and below 1, got {getattr(self, name)}")
        for name in ("r1_gamma", "diversity", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"[train] {name}: must not be negative, got {getattr(self, name)}")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"[train] {field.name}: must be finite, got {value}")
        if self.score_images < 2:
            raise ValueError(f"[train] score_images: must be at least 2, got {self.score_images}")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"[train] decay: must be from 0 to 1, got {self.decay}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"[train] precision: must be fp32 or bf16, got {self.precision!r}")
        if unknown := [name for name in self.augment if name not in POLICIES]:
            raise ValueError(f"[train] augment: must be among {', '.join(POLICIES)}, got {unknown[0]!r}")
        if self.diversity and self.batch_size % 2:
            raise ValueError(
                f"[train] diversity: needs an even batch_size to make pairs, got batch_size {self.batch_size}"
            )

    @property
    def total_steps(self) -> int:
        """Generator steps of the whole run."""
        return max(1, math.ceil(self.total_kimg * 1000 / (self.batch_size * self.d_steps)))


@dataclass(frozen=True)
class Recipe:
    """What a zoo TOML says about making a model: keyword arguments of both networks, and the training run."""

    name: str
    generator: dict[str, Any]
    discriminator: dict[str, Any]
    train: TrainConfig


def load_recipe(path: str | Path, **overrides: Any) -> Recipe:
    """Read the [generator], [discriminator] and [train] tables of a TOML file; `overrides` replace train fields.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not TOML, an unknown key (with the nearest known one), or a value out of range.
    """
    entry = zoo.read_entry(Path(path))
    table = entry.train | overrides
    for name, keys, function in (
        ("generator", entry.generator, Generator),
        ("discriminator", entry.discriminator, Discriminator),
        ("train", table, TrainConfig),
    ):
        _check_keys(f"{entry.path.name}: [{name}]", keys, list(inspect.signature(function).parameters))
    for field in fields(TrainConfig):
        if field.name in table and not _fits(table[field.name], field.default):
            kind = "a list of texts" if field.name == "augment" else _KINDS[type(field.default)]
            raise ValueError(
                f"{entry.path.name}: [train] {field.name} must be {kind}, got {table[field.name]!r}"
            )
    table["augment"] = tuple(table.get("augment", ()))
    return Recipe(entry.name, entry.generator, entry.discriminator, TrainConfig(**table))


def _check_keys(where: str, table: dict[str, Any], known: list[str]) -> None:
    for key in sorted(table.keys() - set(known)):
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        raise ValueError(f"{where} must have known keys only, got {key!r}; {hint}")


def _fits(value: Any, default: Any) -> bool:
    if isinstance(default, tuple):
        return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
    if isinstance(default, float):
        return type(value) in (int, float)
    return type(value) is type(default)
