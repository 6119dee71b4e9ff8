"""Model folders: config.json and safetensors, written whole, read with every check. Knows no architecture.

A folder holds one file a network, `generator.safetensors` and `discriminator.safetensors`, and `config.json`:

    {"format_version": 1, "library_name": "sagan-kernels", "library_version": "0.1.0",
     "generator": {keyword arguments}, "discriminator": {keyword arguments}, "class_names": ["...", ...],
     "sha256": {"generator.safetensors": "...", "discriminator.safetensors": "..."}}
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import sagan_kernels
from sagan_kernels import zoo
from sagan_kernels.files import write_together

FORMAT_VERSION = 1
LIBRARY_NAME = "sagan-kernels"
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


class Pretrained(nn.Module):
    """A network that is read from and written to a model folder.

    A subclass says which `part` of a folder it is, takes flat keyword arguments, and keeps them in `config`.

    Attributes:
        config: keyword arguments of the constructor, ready for JSON.
        class_names: a name for each label, where the folder gives them.
    """

    part: ClassVar[str]
    config: dict[str, Any]
    class_names: list[str] | None = None

    @classmethod
    def from_pretrained(cls, name_or_dir: str | Path) -> Self:
        """The network in a model folder, in eval mode, fp32 on the CPU, with `class_names` set where known.

        Args:
            name_or_dir: name of a zoo entry, or a folder that `save_pretrained` wrote. A zoo name wins;
                `./name` is the folder of the same name.

        Raises:
            ValueError: no such entry or folder (with the nearest names), no weights, or what is there is
                damaged, of a newer format, of another library or a pickle.
            FileNotFoundError: the folder lacks config.json or the weights.
        """
        folder = resolve(name_or_dir)
        config = read_config(folder)
        tensors = _read_tensors(folder, config, cls.part)
        try:
            model = cls(**config[cls.part])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{folder / 'config.json'}: {cls.part} must be arguments of {cls.__name__}, got {error}"
            ) from error
        _load_strictly(model, tensors, _weights_file(folder, cls.part))
        model.class_names = config.get("class_names")
        model._check_names(model.class_names, str(folder / "config.json"))
        return model.eval()

    def save_pretrained(
        self,
        folder: str | Path,
        class_names: Sequence[str] | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Path:
        """Write weights and config.json; the other network's entries in an existing config.json are kept.

        Args:
            folder: made when it is not there.
            class_names: a name for each label; None for the network's own.
            dtype: of the stored weight matrices, such as torch.float16; None stores them as they are. Biases,
                singular vectors and running statistics stay as they are: they are small, and a variance may
                exceed half precision.

        Returns:
            `folder`.

        Raises:
            ValueError: class_names has another length than there are labels, `folder` holds a model of
                another library or a newer format, or a weight does not fit into `dtype`.
            OSError: could not be written; the old files are still whole.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"save_pretrained: dtype must be a floating-point one, got {dtype}")
        folder = Path(folder)
        names = self.class_names if class_names is None else list(class_names)
        self._check_names(names, "save_pretrained")
        config = read_config(folder) if (folder / "config.json").exists() else {"sha256": {}}
        weights = _weights_file(folder, self.part)
        content = safetensors.torch.save(_stored(self.state_dict(), dtype), {"format": "pt"})
        config |= {
            "format_version": FORMAT_VERSION,
            "library_name": LIBRARY_NAME,
            "library_version": sagan_kernels.__version__,
            self.part: self.config,
            "class_names": config.get("class_names") if names is None else names,
        }
        self._check_names(config["class_names"], f"save_pretrained: {folder}")
        config["sha256"][weights.name] = hashlib.sha256(content).hexdigest()
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        write_together(
            {
                weights: lambda temporary: temporary.write_bytes(content),
                folder / "config.json": lambda temporary: temporary.write_text(text, encoding="utf-8"),
            }
        )
        return folder

    def _check_names(self, names: list[str] | None, where: str) -> None:
        if names is not None and len(names) != self.config["num_classes"]:
            raise ValueError(
                f"{where}: class_names must be {self.config['num_classes']} names, got {len(names)}"
            )


def resolve(name_or_dir: str | Path) -> Path:
    """The folder of a zoo entry's weights, or the folder itself.

    Raises:
        ValueError: neither; the message gives the nearest zoo names, or refuses a pickle with the reason.
    """
    if str(name_or_dir) in zoo.list_models():
        return zoo.weights_folder(str(name_or_dir))
    path = Path(name_or_dir)
    if not str(name_or_dir):
        raise ValueError("from_pretrained: must be a zoo entry or a model folder, got an empty name")
    if not (path / "config.json").exists() and (path / "best" / "config.json").is_file():
        raise ValueError(f"{path}: must be a model folder, got a run folder; give {path / 'best'}")
    if path.is_file():
        raise ValueError(f"{path}: must be a model folder with config.json, got {_kind(path)}")
    if not path.is_dir():
        raise ValueError(
            f"from_pretrained: must be a zoo entry or a model folder, got {str(name_or_dir)!r}; "
            f"{zoo.nearest(str(name_or_dir))}"
        )
    return path


def read_config(folder: Path) -> dict[str, Any]:
    """The checked content of `folder`/config.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: not JSON, of another library or a newer format, a missing key, or a value of a wrong kind.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: must be there, got {_listing(folder)}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: must be JSON, got {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: must be a JSON object, got {type(config).__name__}")
    if (library := config.get("library_name", LIBRARY_NAME)) != LIBRARY_NAME:
        raise ValueError(f"{path}: library_name must be {LIBRARY_NAME!r}, got {library!r}")
    for key in ("format_version", "library_name", "sha256"):
        if key not in config:
            raise ValueError(f"{path}: must have the key {key!r}, got {_names(config)}")
    version = config["format_version"]
    if type(version) is not int or version < 1:
        raise ValueError(f"{path}: format_version must be a whole number from 1, got {version!r}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version must be at most {FORMAT_VERSION}, got {version}, written by "
            f"{LIBRARY_NAME} {config.get('library_version')}; pip install --upgrade {LIBRARY_NAME}"
        )
    for key in ("generator", "discriminator", "sha256"):
        if not isinstance(config.get(key, {}), dict):
            raise ValueError(f"{path}: {key!r} must be an object, got {config[key]!r}")
    names = config.get("class_names")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{path}: class_names must be a list of texts, got {names!r}")
    return config


def _read_tensors(folder: Path, config: dict[str, Any], part: str) -> dict[str, Tensor]:
    path = _weights_file(folder, part)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: must be there, got {_listing(folder)}")
    for key, table in ((part, config), (path.name, config["sha256"])):
        if key not in table:
            raise ValueError(f"{folder / 'config.json'}: must have the key {key!r}, got {_names(table)}")
    content = path.read_bytes()  # the bytes that were checked are the bytes that are loaded
    found, expected = hashlib.sha256(content).hexdigest(), str(config["sha256"][path.name])
    if found != expected:
        raise ValueError(
            f"{path}: sha256 must be config.json's {expected[:12]}…, got {found[:12]}…; "
            "the file is truncated or altered, fetch it again"
        )
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise ValueError(f"{path}: must be a safetensors file, got {error}") from error


def _load_strictly(model: nn.Module, tensors: dict[str, Tensor], where: Path) -> None:
    own = model.state_dict()
    faults = {
        "missing": own.keys() - tensors.keys(),
        "unexpected": tensors.keys() - own.keys(),
        "misshapen": {
            f"{key} {tuple(tensors[key].shape)} for {tuple(own[key].shape)}"
            for key in own.keys() & tensors.keys()
            if own[key].shape != tensors[key].shape
        },
    }
    if any(faults.values()):
        told = "; ".join(f"{len(keys)} {fault}: {_names(keys)}" for fault, keys in faults.items() if keys)
        raise ValueError(f"{where}: tensors must be those of config.json's network, got {told}")
    model.load_state_dict(tensors)


def _stored(tensors: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    stored = {}
    for key, tensor in tensors.items():
        smaller = dtype is not None and tensor.is_floating_point() and tensor.ndim > 1
        stored[key] = tensor.detach().cpu().to(dtype if smaller else tensor.dtype).contiguous()
        if smaller and not stored[key].isfinite().all():
            raise ValueError(
                f"save_pretrained: {key} must fit into {dtype}, got {tensor.abs().max().item():.3g}"
            )
    return stored


def _weights_file(folder: Path, part: str) -> Path:
    return folder / f"{part}.safetensors"


def _kind(path: Path) -> str:
    if path.suffix in PICKLES:
        return f"{path.name}, a pickle, refused because loading one can run any code; ask for safetensors"
    return f"the file {path.name}; give the folder"


def _listing(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    pickles = [path for path in files if path.suffix in PICKLES]
    if pickles and not any(path.suffix == ".safetensors" for path in files):
        return _kind(pickles[0])
    return _names(path.name for path in files)


def _names(names: Iterable[str]) -> str:
    """The first few of `names`, for a message."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return (", ".join(ordered[:3]) or "nothing") + more
