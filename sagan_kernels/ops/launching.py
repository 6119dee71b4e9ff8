"""Launches that cost the host little.

Triton's own launch binds every argument by name and looks at each for what a kernel may be specialized on: with the
thirty arguments of an attention kernel the host takes longer than a GPU does. What it finds depends on nothing but
shapes, strides, dtypes and the alignment of addresses, so it is found once for each of those, and launches that follow
go to the compiled kernel.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

Arguments = tuple[int, tuple[int, ...], dict[str, Any]]
"""Programs, numbers that follow the tensors, and constants and options by name."""

_KEPT = 4096  # kinds of launches; one is a few hundred bytes
_launchers: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}


def launch(
    kernel: Any, tensors: Sequence[Tensor | None], kind: Hashable, arguments: Callable[[], Arguments]
) -> None:
    """Run `kernel` on `tensors`, its first parameters.

    Args:
        kernel: a Triton kernel whose parameters are tensors, then numbers, then constants.
        tensors: on one device; None where the kernel takes none.
        kind: all that `arguments` depends on, but for the tensors' device and dtypes.
        arguments: what else the kernel takes; called where no launch of this kind has been.
    """
    first = next(tensor for tensor in tensors if tensor is not None)
    if not first.is_cuda:
        programs, numbers, named = arguments()
        kernel[programs,](*tensors, *numbers, **named)
        return
    device = first.get_device()
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    key = (
        id(kernel),
        device,
        kind,
        *[None if tensor is None else tensor.dtype for tensor in tensors],
        *[address and address % 16 for address in addresses],
    )
    with current(device):
        known = _launchers.get(key)
        if known is not None:
            run, rest = known
            run(*addresses, *rest)
            return
        programs, numbers, named = arguments()
        compiled = kernel[programs,](*tensors, *numbers, **named)
        if len(_launchers) >= _KEPT:
            _launchers.clear()
        constants = (named[name] for name in kernel.arg_names[len(tensors) + len(numbers) :])
        _launchers[key] = compiled[programs, 1, 1], (*numbers, *constants)


def forget() -> None:
    """Let the next launches ask for their arguments again, after a change of what they depend on."""
    _launchers.clear()


def current(device: int | torch.device) -> AbstractContextManager[Any]:
    """A context in which `device` is the current one: Triton launches there, whichever device the tensors are on."""
    if isinstance(device, torch.device):
        if device.type != "cuda":
            return nullcontext()
        device = torch.cuda.current_device() if device.index is None else device.index
    return nullcontext() if device == torch.cuda.current_device() else torch.cuda.device(device)
