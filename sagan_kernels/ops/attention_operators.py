"""The attention operators as PyTorch sees them: schemas, fake results, and gradients to the second order.

Two roads lead to the same formulas. Eager code and `torch.func` go through nested `autograd.Function`s, which have
rules for `vmap` and forward mode; `torch.compile` and `torch.export` see the operators below and the formulas
registered on them, because a `Function` with a `jvp` cannot be traced.

With f = <out, grad>, backward is the gradient of f, and its own gradient in the direction (a, b, c) is the product
of f's symmetric Hessian with it. So one double-backward operator serves reverse over reverse, forward over reverse
and reverse over forward. Third order raises.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sagan_kernels.ops import attention_launch, attention_tiles

_ops = torch.ops.sagan_kernels


def _run(kernel: Callable[..., Any], tiles: Callable[..., Any]) -> Callable[..., Any]:
    """An operator's body: the launch or the tiles, by its last argument."""

    def run(*args: Any) -> Any:
        *tensors, impl = args
        if impl == "triton":
            return kernel(*tensors)
        with torch.autocast(tensors[0].device.type, enabled=False):
            return tiles(*tensors)

    return run


def _forward_tiles(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return attention_tiles.forward(query, key, value), query.new_empty(query.shape[0], 0)


def _backward_tiles(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    return attention_tiles.backward(query, key, value, grad)


def _double_backward_tiles(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad: Tensor, grad_query: Tensor,
    a: Tensor, b: Tensor, c: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    return attention_tiles.double_backward(query, key, value, grad, a, b, c)


def _tangent_tiles(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, a: Tensor, b: Tensor, c: Tensor
) -> Tensor:
    return attention_tiles.tangent(query, key, value, a, b, c)


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    (B, L, _), Ev = query.shape, value.shape[2]
    if impl != "triton":
        return value.new_empty(B, L, Ev), query.new_empty(B, 0)
    lse = torch.float64 if query.dtype == torch.float64 else torch.float32
    return attention_launch.empty_like_rows(query, value), query.new_empty(B, 2, L, dtype=lse)


def _fake_over_queries(query: Tensor, key: Tensor, value: Tensor, impl: str) -> Tensor:
    return _fake_forward(query, key, value, impl)[0]


def _fake_backward(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_like(query, impl), _fake_like(key, impl), _fake_like(value, impl)


def _fake_double_backward(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad: Tensor, grad_query: Tensor,
    a: Tensor, b: Tensor, c: Tensor, impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows = _fake_forward(query, key, value, impl)[0]
    return _fake_like(query, impl), _fake_like(key, impl), _fake_like(value, impl), rows


def _fake_tangent(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, a: Tensor, b: Tensor, c: Tensor, impl: str
) -> Tensor:  # fmt: skip
    return _fake_forward(query, key, value, impl)[0]


def _fake_like(tensor: Tensor, impl: str) -> Tensor:
    return torch.empty_like(tensor) if impl == "triton" else tensor.new_empty(tensor.shape)


# Each takes what its operator saved and the incoming gradients, and calls `backward` or `double_backward`, which are
# either operators (traced) or Functions (eager).


def save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep inputs and outputs for `grad_forward`."""
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors, *output)


def save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep inputs and the gradient of query for `grad_backward`."""
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors, output[0])


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep the inputs."""
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def grad_forward(backward: Callable[..., Any], ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of `attention_forward`'s inputs."""
    *inputs, out, lse = ctx.saved_tensors
    # with its graph, out would have the second order come here once more, to find the gradients of nothing
    return (*backward(*inputs, out.detach(), lse, grad, ctx.impl), None)


def grad_backward(
    double_backward: Callable[..., Any], ctx: Any, a: Tensor, b: Tensor, c: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of `attention_backward`'s inputs."""
    query2, key2, value2, grad2 = double_backward(*ctx.saved_tensors, a, b, c, ctx.impl)
    # out and lse are functions of query, key and value, and what they contribute is in the formula
    return query2, key2, value2, None, None, grad2, None


def grad_tangent(
    backward: Callable[..., Any], double_backward: Callable[..., Any], ctx: Any, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of `attention_tangent`'s inputs."""
    *primals, a, b, c = ctx.saved_tensors
    grad_a, grad_b, grad_c = backward(*primals, grad, ctx.impl)
    query2, key2, value2, _ = double_backward(*primals, grad, grad_a, a, b, c, ctx.impl)
    return query2, key2, value2, None, None, grad_a, grad_b, grad_c, None


def grad_over_queries(
    forward: Callable[..., Any], backward: Callable[..., Any], ctx: Any, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of `attention_over_queries`' inputs."""
    # <Pᵀ value, grad> = <P grad, value>, and P grad is ordinary attention of key over query, with grad for values
    query, key, value = ctx.saved_tensors
    grad_value, lse = forward(key, query, grad, ctx.impl)
    grad_key, grad_query, _ = backward(key, query, grad, grad_value, lse, value, ctx.impl)
    return grad_query, grad_key, grad_value, None


def third_order(ctx: Any, *grads: Tensor) -> None:
    """Refuse."""
    raise NotImplementedError(
        "attention: gradients of third order, and reverse mode over the forward mode of normalize='queries', are not"
        " implemented; impl='reference' has every order"
    )


_qkv = "Tensor query, Tensor key, Tensor value"
_saved = f"{_qkv}, Tensor out, Tensor lse"
_library = torch.library.Library("sagan_kernels", "FRAGMENT")
BODIES: dict[str, Callable[..., Any]] = {}
"""What each operator does."""


def _define(
    name: str, schema: str, body: Callable[..., Any], fake: Callable[..., Any], grad: Any, save: Any
) -> None:
    BODIES[name] = body
    _library.define(f"{name}{schema}")
    _library.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sagan_kernels::{name}", fake, lib=_library)
    torch.library.register_autograd(f"sagan_kernels::{name}", grad, setup_context=save, lib=_library)


_define(
    "attention_forward",
    f"({_qkv}, str impl) -> (Tensor, Tensor)",
    _run(attention_launch.forward, _forward_tiles),
    _fake_forward,
    lambda ctx, grad, _: grad_forward(_ops.attention_backward, ctx, grad),
    save_forward,
)
_define(
    "attention_backward",
    f"({_saved}, Tensor grad, str impl) -> (Tensor, Tensor, Tensor)",
    _run(attention_launch.backward, _backward_tiles),
    _fake_backward,
    lambda ctx, a, b, c: grad_backward(_ops.attention_double_backward, ctx, a, b, c),
    save_backward,
)
_define(
    "attention_double_backward",
    f"({_saved}, Tensor grad, Tensor grad_query, Tensor a, Tensor b, Tensor c, str impl)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _run(attention_launch.double_backward, _double_backward_tiles),
    _fake_double_backward,
    third_order,
    lambda ctx, inputs, output: None,
)
_define(
    "attention_tangent",
    f"({_saved}, Tensor a, Tensor b, Tensor c, str impl) -> Tensor",
    _run(attention_launch.tangent, _tangent_tiles),
    _fake_tangent,
    lambda ctx, grad: grad_tangent(_ops.attention_backward, _ops.attention_double_backward, ctx, grad),
    save_inputs,
)
_define(
    "attention_over_queries",
    f"({_qkv}, str impl) -> Tensor",
    _run(attention_launch.over_queries, attention_tiles.over_queries),
    _fake_over_queries,
    lambda ctx, grad: grad_over_queries(_ops.attention_forward, _ops.attention_backward, ctx, grad),
    save_inputs,
)
