"""Short ways through PyTorch for eager code: an operator's body without its dispatcher, a Function without its binding.

At the layers of a GAN both take longer than the kernels do.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _has_storage
from torch._C._functorch import is_legacy_batchedtensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function
from torch.nn import Parameter

_OTHERS = (type(None), int, str)


def run(operator: Callable[..., Any], body: Callable[..., Any], *args: Any) -> Any:
    """body(*args), through the operator that it implements where something may want to see or replace it.

    Those are the compiler, a trace, tensors of other classes, such as fake ones, dispatch modes, and tensors whose
    memory is not what they stand for. No derivative is recorded either way.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    ):
        return operator(*args)
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is Parameter:
            if not is_plain(arg):
                return operator(*unwrap_dead_wrappers(args))
        elif kind not in _OTHERS:
            return operator(*args)
    return body(*args)


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor's memory is what it stands for; its class does not tell.

    It is not where `torch.func` wraps it, a tensor that outlived its transform included, or `is_grads_batched`, and
    where a bit says that it is negated or all zeros.
    """
    return _has_storage(tensor) and not tensor.is_neg() and not tensor._is_zerotensor()


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether a derivative of any kind may be taken through what follows."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return True
    return transformed()


def differentiated_again() -> bool:
    """Within a backward pass, whether a derivative of any kind may be taken through what it does."""
    return torch.is_grad_enabled() or transformed()


def transformed() -> bool:
    """Whether `torch.func` or forward mode is at work, where requires_grad does not tell of derivatives."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


class DirectFunction(Function):
    """A Function with `setup_context` whose arguments are all positional.

    `Function.apply` inspects the signature of `forward` at every call to bind defaults.
    """

    operator: str
    """The operator of `torch.ops.sagan_kernels` with the same arguments, results and derivatives."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """As `Function.apply`, but of every order under `is_grads_batched` too, where that forgets the graph."""
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        for arg in args:
            if isinstance(arg, Tensor) and not _has_storage(arg):
                args = unwrap_dead_wrappers(args)
                if any(isinstance(arg, Tensor) and is_legacy_batchedtensor(arg) for arg in args):
                    return getattr(torch.ops.sagan_kernels, cls.operator)(*args)
                break
        return super(Function, cls).apply(*args)  # type: ignore[misc]
