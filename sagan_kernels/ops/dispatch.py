"""One word chooses an implementation: `impl`, overridden by the environment variable SAGAN_KERNELS_IMPL."""

import functools
import os
from importlib.util import find_spec
from typing import Literal, cast, get_args

import torch
from torch import Tensor

Impl = Literal["triton", "torch", "reference"]
"""triton: fused GPU kernels. torch: the fastest composition of PyTorch's own operators. reference: the formula."""

_INSTALLED = find_spec("triton") is not None  # without importing it


def choose(impl: Impl | None, tensor: Tensor) -> Impl:
    """The implementation to run on `tensor`.

    SAGAN_KERNELS_IMPL wins over `impl`; where both are silent, the fastest implementation that supports the tensor.

    Raises:
        ValueError: the word is unknown.
        NotImplementedError: the implementation asked for cannot run here, with the reasons.
    """
    asked = os.environ.get("SAGAN_KERNELS_IMPL") or impl
    if asked is None:
        if tensor.device.type == "meta":  # for shapes any will do
            return "reference"
        # the interpreter is for tests: never chosen, only asked for
        return "triton" if tensor.is_cuda and not not_supported_reasons("triton", tensor) else "torch"
    if asked not in get_args(Impl):
        where = "SAGAN_KERNELS_IMPL" if os.environ.get("SAGAN_KERNELS_IMPL") else "impl"
        raise ValueError(f"{where}: must be one of {', '.join(get_args(Impl))}, got {asked!r}")
    asked = cast(Impl, asked)
    if reasons := not_supported_reasons(asked, tensor):
        raise NotImplementedError(
            f"impl={asked!r}: {'; '.join(reasons)}; leave impl=None to choose one that runs"
        )
    return asked


def not_supported_reasons(impl: Impl, tensor: Tensor) -> list[str]:
    """Why `impl` cannot run on `tensor`; empty when it can."""
    if impl != "triton":
        return []
    if not _INSTALLED:
        return ["the package triton is not installed"]
    if tensor.is_cuda:
        return _gpu_reasons(tensor)
    if not interpreted():
        return [f"Triton kernels run on GPUs, and the tensor is on {tensor.device.type}"]
    if tensor.device.type != "cpu":
        return [f"Triton's interpreter runs on the CPU, and the tensor is on {tensor.device.type}"]
    if tensor.dtype == torch.bfloat16:
        return ["Triton's interpreter computes bfloat16 wrongly"]
    return _dtype_reasons(tensor, (torch.float16, torch.float32, torch.float64))


def interpreted() -> bool:
    """Whether Triton kernels run in its Python interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _gpu_reasons(tensor: Tensor) -> list[str]:
    if not torch.version.hip and (found := capability(tensor.get_device())) < (8, 0):
        return [f"the kernels need compute capability 8.0, and {tensor.device} has {found[0]}.{found[1]}"]
    return _dtype_reasons(tensor, (torch.float16, torch.bfloat16, torch.float32))


def capability(index: int) -> tuple[int, int]:
    """The compute capability of a GPU, asked for once: PyTorch takes microseconds to tell."""
    if torch.compiler.is_compiling():  # which looks into a cached function, and warns that it does
        return torch.cuda.get_device_capability(index)
    return _capability(index)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _dtype_reasons(tensor: Tensor, supported: tuple[torch.dtype, ...]) -> list[str]:
    if tensor.dtype in supported:
        return []
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in supported)
    return [f"the kernels take {names}, and the tensor is {str(tensor.dtype).removeprefix('torch.')}"]
