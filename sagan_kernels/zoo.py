"""The zoo: names of models and what is known of each, read from the TOML files in `zoo/`."""

import difflib
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ZooEntry:
    """One `zoo/<name>.toml`, table by table. Weights, where there are some, lie in the folder `zoo/<name>/`.

    Attributes:
        name: the file's stem.
        path: the TOML file.
        generator: keyword arguments of `sagan_kernels.models.Generator`.
        discriminator: keyword arguments of `sagan_kernels.models.Discriminator`.
        train: settings of the training run.
        data: what the model was trained on.
        weights: license and scores of the shipped weights; None when none are shipped.
    """

    name: str
    path: Path
    generator: dict[str, Any]
    discriminator: dict[str, Any]
    train: dict[str, Any]
    data: dict[str, Any]
    weights: dict[str, Any] | None

    @property
    def folder(self) -> Path:
        """Where the weights lie."""
        return self.path.with_suffix("")


def list_models(pretrained: bool = False) -> list[str]:
    """Names of the zoo's entries, sorted; with `pretrained`, of those that have weights."""
    names = sorted(path.stem for path in zoo_folder().glob("*.toml"))
    return [name for name in names if not pretrained or entry(name).weights is not None]


def entry(name: str) -> ZooEntry:
    """The entry called `name`.

    Raises:
        ValueError: there is none (the nearest names are given), or its file is not TOML made of known tables.
    """
    if name not in list_models():
        raise ValueError(f"zoo: the name must be an entry's, got {name!r}; {nearest(name)}")
    return read_entry(zoo_folder() / f"{name}.toml")


def read_entry(path: Path) -> ZooEntry:
    """The entry in one TOML file, in the zoo or not.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not TOML, or not made of the known tables.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: must be a TOML file such as those in zoo/, got nothing there")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: must be TOML, got {error}") from error
    known = ("generator", "discriminator", "train", "data", "weights")
    for key, table in tables.items():
        if key not in known or not isinstance(table, dict):
            raise ValueError(f"{path}: must hold the tables {', '.join(known)} only, got {key!r}")
    weights = tables.pop("weights", None)
    return ZooEntry(path.stem, path, **{key: tables.get(key, {}) for key in known[:-1]}, weights=weights)


def weights_folder(name: str) -> Path:
    """The folder of the weights of entry `name`.

    Raises:
        ValueError: no such entry, or it has no weights; the message names entries that have.
    """
    found = entry(name)
    if found.weights is None:
        have = ", ".join(list_models(pretrained=True)) or "no entry yet"
        raise ValueError(f"zoo: pretrained weights are there for {have}, got {name!r}; train it: sagan train")
    return found.folder


def feature_net(name: str) -> Path:
    """The file of the feature network called `name`, such as "fashion-cnn".

    Raises:
        ValueError: the zoo ships no such network; the message names those it has.
    """
    path = zoo_folder() / "features" / f"{name}.safetensors"
    if not path.is_file():
        have = ", ".join(sorted(p.stem for p in path.parent.glob("*.safetensors"))) or "none"
        raise ValueError(f"zoo: the feature network must be one of {have}, or a file, got {name!r}")
    return path


def nearest(name: str) -> str:
    """Advice for an unknown name: the entries nearest to it, or all."""
    names = list_models()
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    return f"the zoo has {', '.join(names) or 'no entries'}"


def zoo_folder() -> Path:
    """Where the zoo is: inside an installed package, else beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "_zoo"
    return installed if installed.is_dir() else package.parent / "zoo"
