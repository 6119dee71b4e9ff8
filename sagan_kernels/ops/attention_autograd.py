"""The attention operators for eager code and `torch.func`: nested Functions over `attention_operators`.

A `Function` has rules for `vmap` and forward mode, which a registered formula lacks; one with a `jvp` cannot be
traced, so compiled and exported code calls the operators, whose registered formulas are the same.
"""

from typing import Any

import torch
from torch import Tensor

from sagan_kernels.ops.attention_operators import (
    BODIES,
    grad_backward,
    grad_forward,
    grad_over_queries,
    grad_tangent,
    save_backward,
    save_forward,
    save_inputs,
    third_order,
)
from sagan_kernels.ops.direct import DirectFunction, differentiated, differentiated_again, run

_ops = torch.ops.sagan_kernels


def attention_and_lse(query: Tensor, key: Tensor, value: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """Out (B, L, Ev) of softmax(query keyᵀ) value, and its base-2 log-sum-exp, which has no gradient.

    lse is (B, 2, L), two numbers to be added, or (B, 0) where `impl` is "torch", which finds the softmax anew
    instead. Do not modify out in place: backward reads it.
    """
    if torch.compiler.is_compiling():
        return _ops.attention_forward(query, key, value, impl)
    if not differentiated(query, key, value):
        return _call("attention_forward", query, key, value, impl)
    return _Forward.apply(query, key, value, impl)


def attention_backward(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of <out, grad> for query, key and value; differentiable once more, for these three and grad."""
    if torch.compiler.is_compiling():
        return _ops.attention_backward(query, key, value, out, lse, grad, impl)
    return _Backward.apply(query, key, value, out, lse, grad, impl)


def attention_over_queries(query: Tensor, key: Tensor, value: Tensor, impl: str) -> Tensor:
    """softmax(key queryᵀ)ᵀ value: attention normalized over queries; (B, L, Ev). Differentiable twice."""
    if torch.compiler.is_compiling():
        return _ops.attention_over_queries(query, key, value, impl)
    return _OverQueries.apply(query, key, value, impl)


def _call(name: str, *args: Any) -> Any:
    return run(getattr(_ops, name), BODIES[name], *args)


def _backward(*args: Any) -> Any:
    return _call("attention_backward", *args)


def _double_backward(*args: Any) -> Any:
    return _call("attention_double_backward", *args)


class _Forward(DirectFunction):
    operator = "attention_forward"

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, impl: str) -> tuple[Tensor, Tensor]:
        return _call("attention_forward", query, key, value, impl)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        save_forward(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:3], *output)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad is None:  # within `grad_over_queries`, of a value that nothing further on depends on
            return None, None, None, None
        return grad_forward(_Backward.apply if differentiated_again() else _backward, ctx, grad)

    @staticmethod
    def jvp(ctx: Any, a: Tensor | None, b: Tensor | None, c: Tensor | None, _: None) -> tuple[Tensor, None]:
        query, key, value, out, lse = ctx.saved_tensors
        directions = _zeros_for_none((a, b, c), (query, key, value))
        return _Tangent.apply(query, key, value, out.detach(), lse, *directions, ctx.impl), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return _vmap(_Forward, info, in_dims, args)


class _Backward(DirectFunction):
    operator = "attention_backward"

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad: Tensor, impl: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _call("attention_backward", query, key, value, out, lse, grad, impl)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        save_backward(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:6], output[0])

    @staticmethod
    def backward(ctx: Any, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor | None, ...]:
        again = differentiated_again()
        return grad_backward(_DoubleBackward.apply if again else _double_backward, ctx, a, b, c)

    @staticmethod
    def jvp(
        ctx: Any, a: Tensor | None, b: Tensor | None, c: Tensor | None, _out: Any, _lse: Any,
        grad_direction: Tensor | None, _impl: None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        query, key, value, out, lse, grad, grad_query = ctx.saved_tensors
        directions = _zeros_for_none((a, b, c), (query, key, value))
        moved = _DoubleBackward.apply(
            query, key, value, out, lse, grad, grad_query, *directions, ctx.impl
        )[:3]  # fmt: skip
        if grad_direction is None:
            return tuple(moved)
        linear = _Backward.apply(query, key, value, out, lse, grad_direction, ctx.impl)
        return tuple(m + n for m, n in zip(moved, linear, strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return _vmap(_Backward, info, in_dims, args)


class _DoubleBackward(DirectFunction):
    # a Function that raises: @once_differentiable stays silent where the incoming gradient needs none itself
    operator = "attention_double_backward"

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad: Tensor, grad_query: Tensor,
        a: Tensor, b: Tensor, c: Tensor, impl: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        return _call("attention_double_backward", query, key, value, out, lse, grad, grad_query, a, b, c, impl
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    backward = staticmethod(third_order)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        third_order(ctx)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return _vmap(_DoubleBackward, info, in_dims, args)


class _Tangent(DirectFunction):
    operator = "attention_tangent"

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, a: Tensor, b: Tensor, c: Tensor,
        impl: str,
    ) -> Tensor:  # fmt: skip
        return _call("attention_tangent", query, key, value, out, lse, a, b, c, impl)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        save_inputs(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad_tangent(_Backward.apply, _DoubleBackward.apply, ctx, grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise NotImplementedError(
            "attention: forward mode over forward mode is not implemented; impl='reference' has it"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return _vmap(_Tangent, info, in_dims, args)


class _OverQueries(DirectFunction):
    operator = "attention_over_queries"

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, impl: str) -> Tensor:
        return _call("attention_over_queries", query, key, value, impl)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        save_inputs(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad_over_queries(_Forward.apply, _Backward.apply, ctx, grad)

    @staticmethod
    def jvp(ctx: Any, a: Tensor | None, b: Tensor | None, c: Tensor | None, _: None) -> Tensor:
        # out is the gradient of <attention(key, query, z), value> for z, at any z; its tangent is that of a gradient
        query, key, value = ctx.saved_tensors
        a, b, c = _zeros_for_none((a, b, c), (query, key, value))
        z = torch.zeros_like(query[..., :1]).expand(*query.shape[:2], value.shape[2])
        out, lse = _Forward.apply(key, query, z, ctx.impl)
        grads = _Backward.apply(key, query, z, out, lse, value, ctx.impl)
        moved = _DoubleBackward.apply(
            key, query, z, out, lse, value, grads[0], b, a, torch.zeros_like(z), ctx.impl
        )[2]  # fmt: skip
        return moved + _OverQueries.apply(query, key, c, ctx.impl)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return _vmap(_OverQueries, info, in_dims, args)


def _zeros_for_none(directions: tuple[Tensor | None, ...], primals: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A direction is None where its input does not move."""
    return tuple(torch.zeros_like(p) if d is None else d for d, p in zip(directions, primals, strict=True))


def _vmap(
    function: Any, info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> tuple[Any, Any]:
    """Map over one more dimension by making it part of the batch."""
    *tensors, impl = args
    n = info.batch_size
    folded = [
        (t.expand(n, *t.shape) if dim is None else t.movedim(dim, 0)).flatten(0, 1)
        for t, dim in zip(tensors, in_dims, strict=False)
    ]
    outputs = function.apply(*folded, impl)
    if isinstance(outputs, Tensor):
        return outputs.unflatten(0, (n, -1)), 0
    return tuple(t.unflatten(0, (n, t.shape[0] // n)) for t in outputs), (0,) * len(outputs)
