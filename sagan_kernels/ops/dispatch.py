"""One word chooses an implementation: `impl`, overridden by the environment variable SAGAN_KERNELS_IMPL."""

import os
from typing import Literal, cast, get_args

from torch import Tensor

Impl = Literal["triton", "torch", "reference"]
"""triton: fused GPU kernels. torch: the fastest composition of PyTorch's own operators. reference: the formula."""


def choose(impl: Impl | None, tensor: Tensor) -> Impl:
    """The implementation to run on `tensor`.

    SAGAN_KERNELS_IMPL wins over `impl`; where both are silent, the fastest implementation that supports the tensor.

    Raises:
        ValueError: the word is unknown.
        NotImplementedError: the implementation asked for cannot run here, with the reasons.
    """
    asked = os.environ.get("SAGAN_KERNELS_IMPL") or impl
    if asked is None:
        return "torch" if not_supported_reasons("triton", tensor) else "triton"
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
    if impl == "triton":
        return ["this version of sagan_kernels ships no Triton kernel yet"]
    return []
