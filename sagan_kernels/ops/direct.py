"""Short ways through PyTorch for eager code: an operator's body without its dispatcher, a Function without its binding.

At the layers of a GAN both take longer than the kernels do.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import Parameter

_PLAIN = (Tensor, Parameter, type(None), int, str)


def run(operator: Callable[..., Any], body: Callable[..., Any], *args: Any) -> Any:
    """body(*args), through the operator that it implements where something may want to see or replace it.

    Those are the compiler, a trace, tensors of other classes, such as fake ones, and dispatch modes. No derivative is
    recorded either way.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or any(type(arg) not in _PLAIN for arg in args)
    ):
        return operator(*args)
    return body(*args)


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

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """As `Function.apply`."""
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(Function, cls).apply(*args)  # type: ignore[misc]
