"""Model folders, here or on the Hugging Face Hub: written whole, read with every check. Knows no architecture.

A folder holds one file a network, `generator.safetensors` and `discriminator.safetensors`, and `config.json`:

    {"format_version": 1, "library_name": "sagan-kernels", "library_version": "0.1.0",
     "generator": {keyword arguments}, "discriminator": {keyword arguments}, "class_names": ["...", ...],
     "sha256": {"generator.safetensors": "...", "discriminator.safetensors": "..."}}

Other keys are left alone. No pickle is ever read: not from a folder, not from the Hub.
"""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import sagan_kernels
from sagan_kernels import zoo
from sagan_kernels.files import write_together
from sagan_kernels.hub_transfer import (
    LIBRARY_NAME,
    PICKLES,
    PIPELINE_TAG,
    Access,
    is_repo_id,
    push,
    remote_files,
    told_files,
    told_names,
)

FORMAT_VERSION = 1


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
    def from_pretrained(
        cls,
        name_or_dir: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        subfolder: str | None = None,
    ) -> Self:
        """The network in a model folder, in eval mode, fp32 on the CPU, with `class_names` set where known.

        Args:
            name_or_dir: name of a zoo entry, a folder that `save_pretrained` wrote, or a repository of the Hub
                (`namespace/name`). A zoo name wins, then a folder; `./name` is always a folder.
            revision: branch, tag or commit of the repository; None for main.
            token: for a private repository; None for the stored one.
            cache_dir: where fetched files are kept; None for the Hub client's own place.
            local_files_only: take what the cache has and ask nobody. HF_HUB_OFFLINE=1 does so everywhere.
            force_download: fetch again what the cache has.
            subfolder: of the folder or repository.

        Raises:
            ValueError: no such entry or folder (with the nearest names), no weights, or what is there is
                damaged, of a newer format, of another library or a pickle; a revision of what has none.
            FileNotFoundError: the folder lacks config.json or the weights; the Hub has no such repository,
                revision or file, or the cache has it not while offline.
            PermissionError: the token gives no right to read.
            ConnectionError: the Hub does not serve, and the cache has nothing.
            OSError: the cache cannot be written.
        """
        access = Access(
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
            subfolder=subfolder,
        )
        folder = resolve(name_or_dir, cls.part, access)
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
        if json.loads(text)[self.part] != self.config:
            raise ValueError(
                f"save_pretrained: config must hold what JSON gives back as it was, got {self.config!r}"
            )
        write_together(
            {
                weights: lambda temporary: temporary.write_bytes(content),
                folder / "config.json": lambda temporary: temporary.write_text(text, encoding="utf-8"),
            }
        )
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        class_names: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        private: bool | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
    ) -> str:
        """Put weights and config.json into a repository of the Hub as one commit; it is made when not there.

        The other network that the repository may hold stays, as does its card; a repository without a card gets
        a short one, to which a licence should be added.

        Args:
            repo_id: "namespace/name".
            class_names: as `save_pretrained`.
            dtype: as `save_pretrained`.
            revision: an existing branch; None for main.
            token: of an account that may write; None for the stored one.
            private: of a repository that is made; None for the namespace's default.
            create_pr: open a pull request instead of committing to the branch.
            commit_message: None for one that names the part.

        Returns:
            URL of the commit, or of the pull request.

        Raises:
            ValueError: as `save_pretrained`, or no repository name.
            FileNotFoundError: no such branch.
            PermissionError: the token gives no right to write.
            ConnectionError: the Hub does not answer or somebody else pushed; the repository is as it was.
        """
        head, present = remote_files(repo_id, token=token, revision=revision)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            if "config.json" in present:
                config = Access(revision=head, token=token).fetch(repo_id, "config.json", "push_to_hub")
                read_config(config.parent)
                (folder / "config.json").write_bytes(config.read_bytes())
            self.save_pretrained(folder, class_names, dtype=dtype)
            if "README.md" not in present:
                (folder / "README.md").write_text(self._short_card(repo_id), encoding="utf-8")
            return push(
                repo_id,
                folder,
                message=commit_message or f"Put the {self.part}'s weights",
                token=token,
                revision=revision,
                private=private,
                create_pr=create_pr,
                parent_commit=head,
            )

    def _short_card(self, repo_id: str) -> str:
        name = type(self).__name__
        return f"""---
library_name: {LIBRARY_NAME}
pipeline_tag: {PIPELINE_TAG}
tags: [gan, sagan]
---

# {repo_id.split("/")[-1]}

```python
from sagan_kernels import {name}

{self.part} = {name}.from_pretrained("{repo_id}")
```
"""

    def _check_names(self, names: list[str] | None, where: str) -> None:
        if names is not None and len(names) != self.config["num_classes"]:
            raise ValueError(
                f"{where}: class_names must be {self.config['num_classes']} names, got {len(names)}"
            )


def resolve(name_or_dir: str | Path, part: str | None = None, access: Access | None = None) -> Path:
    """The folder of a model: of a zoo entry, the folder itself, or where the Hub's files are in the cache.

    Args:
        name_or_dir: as `Pretrained.from_pretrained`.
        part: the network whose weights are wanted from the Hub; None for config.json alone.
        access: how files of the Hub are fetched.

    Raises:
        ValueError: none of them; the message gives the nearest zoo names, or refuses a pickle with the reason.
        FileNotFoundError, PermissionError, ConnectionError, OSError: as `Access.fetch`.
    """
    access = access or Access()
    path = Path(name_or_dir)
    zoo_entry = str(name_or_dir) in zoo.list_models()
    if isinstance(name_or_dir, str) and not zoo_entry and not path.exists() and is_repo_id(name_or_dir):
        return _fetched(name_or_dir, part, access)
    if access.revision is not None:
        raise ValueError(
            f"from_pretrained: revision must be left out for {str(name_or_dir)!r}, which is not on the Hub, "
            f"got {access.revision!r}"
        )
    if zoo_entry:
        return zoo.weights_folder(str(name_or_dir)) / (access.subfolder or "")
    if not str(name_or_dir):
        raise ValueError("from_pretrained: must be a zoo entry or a model folder, got an empty name")
    path = path / (access.subfolder or "")
    if not (path / "config.json").exists() and (path / "best" / "config.json").is_file():
        raise ValueError(f"{path}: must be a model folder, got a run folder; give {path / 'best'}")
    if path.is_file():
        raise ValueError(f"{path}: must be a model folder with config.json, got {_kind(path)}")
    if not path.is_dir():
        raise ValueError(
            f"from_pretrained: must be a zoo entry or a model folder, got {str(path)!r}; "
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
            raise ValueError(f"{path}: must have the key {key!r}, got {told_names(config)}")
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
            raise ValueError(f"{folder / 'config.json'}: must have the key {key!r}, got {told_names(table)}")
    content = path.read_bytes()  # the bytes that were checked are the bytes that are loaded
    found, expected = hashlib.sha256(content).hexdigest(), str(config["sha256"][path.name])
    if found != expected:
        raise ValueError(
            f"{path}: sha256 must be config.json's {expected[:12]}…, got {found[:12]}…; "
            "the file is truncated or altered, fetch it again (from the Hub: force_download=True)"
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
        told = "; ".join(f"{len(keys)} {fault}: {told_names(keys)}" for fault, keys in faults.items() if keys)
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


def _fetched(repo_id: str, part: str | None, access: Access) -> Path:
    """The folder of a repository's files in the cache, all of one commit."""
    config = access.fetch(repo_id, "config.json")
    read_config(config.parent)  # another library's weights are not worth fetching
    if part is not None:
        pinned = replace(access, revision=access.commit(config))
        pinned.fetch(repo_id, f"{part}.safetensors")
    return config.parent


def _weights_file(folder: Path, part: str) -> Path:
    return folder / f"{part}.safetensors"


def _kind(path: Path) -> str:
    return told_files([path.name]) if path.suffix in PICKLES else f"the file {path.name}; give the folder"


def _listing(folder: Path) -> str:
    return told_files(path.name for path in folder.iterdir() if path.is_file())
