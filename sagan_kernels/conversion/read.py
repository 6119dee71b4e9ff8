"""Checkpoints as tensors by name, without running anything that is in them."""

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

WRAPPERS = ("state_dict", "model_state_dict")  # where StudioGAN, mmgeneration and mimicry keep the tensors
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and torch.compile
FORMATS = (".safetensors", ".npz", ".pth", ".pt", ".bin", ".ckpt", ".tar")


def read_file(path: Path) -> dict[str, dict[str, Tensor]]:
    """The networks in a checkpoint, as `tensors_in`.

    A pickle (.pth and its like) is read by PyTorch's restricted unpickler, `weights_only=True`, and .npz without
    pickles; what needs more is refused.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, of another format, or more than tensors and plain values.
    """
    if path.is_dir():
        found = sorted(file.name for file in path.iterdir() if file.suffix in FORMATS)
        raise ValueError(
            f"{path}: must be a file, got a folder of {', '.join(found) or 'none'}; give one of its files"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path}: must be there, got no such file")
    if path.suffix not in FORMATS:
        raise ValueError(
            f"{path}: must end in {', '.join(FORMATS)}, got {path.suffix or 'no ending'}; a TensorFlow checkpoint is "
            "given as an .npz file of its variables"
        )
    try:
        content = _load(path)
    except (SafetensorError, EOFError, RuntimeError, BadZipFile, KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path}: must be a whole {path.suffix} file, got {_first_line(error)}") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: must hold tensors and plain values only, got {_need(error)}; refused, since reading it could run "
            "any code. Where its origin is trusted, save the state dict alone with the project's own code"
        ) from error
    return tensors_in(content, str(path))


def tensors_in(content: Any, where: str = "convert_checkpoint") -> dict[str, dict[str, Tensor]]:
    """The state dicts in what a checkpoint holds, by the name each has there; "" for a bare one.

    Raises:
        TypeError: `content` is no mapping.
        ValueError: no tensors in it.
    """
    if not isinstance(content, Mapping):
        raise TypeError(f"{where}: must be a mapping of names to tensors, got {type(content).__name__}")
    for wrapper in WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            return tensors_in(content[wrapper], where)
    if _all_tensors(content):
        return {"": _plain(content, where)}
    networks = {str(name): _plain(part, where) for name, part in content.items() if _all_tensors(part)}
    if not networks:
        raise ValueError(
            f"{where}: must hold the tensors of a network by name, got "
            f"{', '.join(map(str, list(content)[:5])) or 'nothing'}"
        )
    return networks


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    if path.suffix == ".npz":
        with ZipFile(path) as archive:
            return {
                name.removesuffix(".npy"): np.lib.format.read_array(archive.open(name), allow_pickle=False)
                for name in archive.namelist()
            }
    with (
        warnings.catch_warnings()
    ):  # of an unusual pickle protocol, which the unpickler then takes or refuses
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def _all_tensors(content: object) -> bool:
    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(isinstance(key, str) for key in content)
        and all(isinstance(value, Tensor | np.ndarray | np.generic) for value in content.values())
    )


def _plain(tensors: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    plain = {}
    for key, value in tensors.items():
        tensor = value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        if tensor.is_meta:
            raise ValueError(f"{where}: must hold values, got {key} on the meta device")
        if not tensor.is_floating_point() and tensor.numel() > 1:
            raise ValueError(f"{where}: must hold floating-point numbers, got {key} of {tensor.dtype}")
        # copied: the network they are from may train on. TensorFlow ends a variable's name in :0
        plain[key.removesuffix(":0")] = tensor.cpu().clone()
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in plain):
            plain = {key.removeprefix(prefix): tensor for key, tensor in plain.items()}
    return plain


def _need(error: Exception) -> str:
    """What a pickle asked for."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    other = re.search(r"Unsupported [^\n]*", str(error))
    return f"a need of {found[1]}" if found else other[0] if other else _first_line(error)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
