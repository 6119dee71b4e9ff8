"""What a machine has and what runs on it: the text that people paste into issues."""

import importlib
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.version import Version

import sagan_kernels
from sagan_kernels.hub_transfer import cache_folder
from sagan_kernels.ops import choose, not_supported_reasons

PACKAGES = (
    "torch", "triton", "torchvision", "timm", "huggingface-hub", "safetensors", "einops", "numpy", "kernels",
    "onnxruntime",
)  # fmt: skip
SETTINGS = (
    "SAGAN_KERNELS_IMPL", "TRITON_INTERPRET", "TRITON_CACHE_DIR", "HF_HUB_OFFLINE", "HF_HOME", "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)  # fmt: skip
OLDEST = {"torch": "2.11", "triton": "3.6"}


def report() -> dict[str, Any]:
    """What `sagan doctor` prints, for programs: nested dicts of texts, numbers and lists.

    Nothing of it is private: paths are shortened to begin with ~, and tokens are not read.
    """
    return {
        "sagan-kernels": sagan_kernels.__version__,
        "system": {
            "platform": platform.platform(terse=True),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "processors": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": [_device("cpu"), *(_device(f"cuda:{i}") for i in range(torch.cuda.device_count()))],
        "settings": {name: _short(os.environ[name]) for name in SETTINGS if os.environ.get(name)},
        "caches": [
            _cache("Hugging Face Hub", cache_folder()),
            _cache("torch.hub", torch.hub.get_dir()),
            _cache("Triton", os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"),
        ],
        "findings": findings(),
    }


def findings() -> list[str]:
    """What is wrong or slow here, one line each, with what to do; empty when nothing is."""
    found = []
    for name, oldest in OLDEST.items():
        version = _version(name)
        if version is not None and Version(version) < Version(oldest):
            found.append(f"{name} must be {oldest} or newer, got {version}; pip install -U {name}")
    triton = _version("triton")
    if torch.cuda.is_available() and triton is None:
        found.append("triton is missing, so the GPU runs PyTorch's operators; pip install triton")
    # builds of PyTorch for GPUs name the triton they were made with
    wanted = [
        r
        for r in map(Requirement, metadata.requires("torch") or [])
        if r.name in ("triton", "pytorch-triton")
    ]
    for requirement in wanted:
        fits = triton is None or requirement.specifier.contains(triton, prereleases=True)
        if not fits and (requirement.marker is None or requirement.marker.evaluate()):
            found.append(
                f"torch {torch.__version__} goes with {requirement.name}{requirement.specifier}, got {triton}"
            )
    if _version("torchvision") is not None and not _imports("torchvision"):
        found.append(
            f"torchvision {_version('torchvision')} cannot be imported beside torch {torch.__version__}, "
            "and timm needs it; install both from the same index"
        )
    if torch.version.cuda and not torch.cuda.is_available():
        found.append(
            f"torch was built for CUDA {torch.version.cuda} and sees no GPU; look at the driver: nvidia-smi"
        )
    if os.environ.get("TRITON_INTERPRET") == "1":
        found.append("TRITON_INTERPRET=1: Triton kernels run in Python, for tests only; unset it")
    for cache in (
        _cache("the Hub's cache", cache_folder()),
        _cache("torch.hub's cache", torch.hub.get_dir()),
    ):
        if not cache["writable"]:
            found.append(f"{cache['what']} {cache['path']} cannot be written; set HF_HOME or TORCH_HOME")
        elif cache["free_gb"] is not None and cache["free_gb"] < 1:
            found.append(f"{cache['what']} {cache['path']} has less than 1 GB left; make room")
    return found


def text(found: dict[str, Any]) -> str:
    """A report as lines to paste."""
    system, packages = found["system"], found["packages"]
    lines = [
        f"sagan-kernels {found['sagan-kernels']}, Python {system['python']}, {system['platform']} {system['machine']}",
        f"{system['processors']} processors, {system['threads']} threads in PyTorch",
        "packages: " + ", ".join(f"{name} {version or 'missing'}" for name, version in packages.items()),
    ]
    for device in found["devices"]:
        lines.append(
            f"{device['name']}: runs {device['runs']}" + (f" ({device['why']})" if device["why"] else "")
        )
    settings = ", ".join(f"{name}={value}" for name, value in found["settings"].items())
    lines.append(f"environment: {settings or 'nothing that matters is set'}")
    for cache in found["caches"]:
        state = "can be written" if cache["writable"] else "cannot be written"
        room = "" if cache["free_gb"] is None else f", {cache['free_gb']:.0f} GB free"
        lines.append(f"{cache['what']}: {cache['path']} ({state}{room})")
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    lines.append(
        "Hub: offline, only what is in the cache" if offline else "Hub: online when something is missing"
    )
    return "\n".join([*lines, *(f"! {line}" for line in found["findings"] or ["nothing to mend"])])


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _imports(name: str) -> bool:
    """Whether a package with libraries of its own fits what it was built for."""
    try:
        importlib.import_module(name)
    except Exception:  # a library that does not fit fails in any way
        return False
    return True


def _device(name: str) -> dict[str, Any]:
    """A device, what would run on it, and why not Triton's kernels."""
    probe = torch.empty(0, device=name)
    runs, why = "nothing", ""
    try:
        runs, why = str(choose(None, probe)), "; ".join(not_supported_reasons("triton", probe))
    except (ValueError, NotImplementedError) as error:  # what the environment asks for cannot run
        why = str(error)
    if name == "cpu":
        told = f"CPU {platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    else:
        of = torch.cuda.get_device_properties(name)
        told = f"{name} {of.name}, {of.total_memory / 2**30:.0f} GiB, capability {of.major}.{of.minor}"
    return {"name": told, "runs": runs, "why": why}


def _cache(what: str, path: str | Path) -> dict[str, Any]:
    """A folder, or the nearest one above it that is there, and whether it can be written."""
    path = Path(path).expanduser()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    try:
        free = shutil.disk_usage(there).free / 1e9
    except OSError:
        free = None
    writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    return {"what": what, "path": _short(str(path)), "writable": writable, "free_gb": free}


def _short(path: str) -> str:
    home = str(Path.home())
    return "~" + path.removeprefix(home) if path == home or path.startswith(home + os.sep) else path
