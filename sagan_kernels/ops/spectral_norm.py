"""W/σ for the weights of many layers at once, as a differentiable operator."""

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from sagan_kernels.ops.direct import is_plain
from sagan_kernels.ops.dispatch import Impl, choose
from sagan_kernels.ops.spectral_norm_layout import (
    Item,
    Layout,
    Rule,
    as_matrix,
    divisor,
    gradient_on_cpu,
    iterate_on_cpu,
    layout,
    to_stored_order,
)

if TYPE_CHECKING:
    from sagan_kernels.ops.spectral_norm_launch import Plans


_OWN_SUMS = (torch.float32, torch.float64)  # others are summed in float32


def spectral_normalize(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    rules: Sequence[Rule],
    *,
    iterate: bool,
    store: bool | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    deferred: bool = False,
    impl: Impl | None = None,
    plans: "Plans | None" = None,
) -> list[Any]:
    """W/σ of every weight, where σ = uᵀWv estimates the largest singular value of the weight as a matrix (R, C).

    Args:
        weights: any shape of two dimensions or more.
        us: (R,) each, unit vectors; updated in place with `store`.
        vs: (C,) each, unit vectors, in the order of `weight.movedim(dim, 0).flatten(1)`; updated in place with `store`.
        rules: one for each weight.
        iterate: do the power iterations first; otherwise u and v are used as they are.
        store: keep the new u and v in `us` and `vs`. By default where `iterate`.
        dtypes: of the results; by default those of the weights.
        deferred: give, in place of each result, a function that returns it and only then gives it its place in the
            graph. PyTorch runs the backward of what came last first: with it, each weight's gradient is there as soon
            as its layer's, without it there is one backward for all, after everything else.
        impl: "triton", three launches forward and two backward for all weights of one device and dtype; "torch",
            lean on a CPU; "reference", the formula in PyTorch's operators; None to choose by device. Inside
            `torch.compile` and the transforms of `torch.func` it is always the formula.
        plans: what Triton's launches keep between calls with the same weights.

    Returns:
        W/σ with the shape and strides of each weight. A zero weight stays zero, divided by 1. A vector is left as it
        was where its product vanishes; every other one is normalized, however small it is.

    Gradients: of every order, u and v constant: (G - <G, W/σ> u vᵀ)/σ. Forward mode under `torch.func` only.

    Reference: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", arXiv:1802.05957.
    """
    store = iterate if store is None else store
    dtypes = dtypes or [weight.dtype for weight in weights]
    results: list[Any] = list(weights)
    launched: dict[Any, list[tuple[int, Item]]] = {}
    fastest: dict[Any, Impl] = {}
    for i, (weight, u, v, rule, dtype) in enumerate(zip(weights, us, vs, rules, dtypes, strict=True)):
        kind = (weight.device, weight.dtype)
        chosen = fastest.get(kind) or fastest.setdefault(kind, _choose(weight, impl))
        lies = _layout(weight, u, v, rule) if chosen != "reference" else None
        if lies is None:
            sigma = _settled(weight, u, v, rule, iterate, store)
            results[i] = functools.partial(_by_formula, weight, *sigma, rule, dtype)
            continue
        key = "cpu" if chosen == "torch" else (weight.device, weight.dtype, dtype, rule.n_power_iterations)
        launched.setdefault(key, []).append((i, Item(weight, u, v, rule, dtype, lies)))
    for key, part in launched.items():
        items = [item for _, item in part]
        keep = deferred or torch.is_grad_enabled()
        with torch.no_grad():
            if key == "cpu":
                state, outs = _on_cpu(items, iterate, store, keep)
            else:
                state, outs = _on_gpu(items, iterate, store, plans)
        attached = _attach(state, outs, [item.weight for item in items], deferred)
        for (i, _), out in zip(part, attached, strict=True):
            results[i] = out
    return results if deferred else [result() if callable(result) else result for result in results]


def normalize_one(weight: Tensor, u: Tensor, v: Tensor, rule: Rule, iterate: bool) -> Tensor:
    """`spectral_normalize` of one weight, with less around it: a small layer's products take microseconds."""
    keep = torch.is_grad_enabled() and weight.requires_grad
    on_cpu = weight.device.type == "cpu" and not _traced()
    if (
        on_cpu
        and not (iterate or keep)
        and u.dtype == weight.dtype in _OWN_SUMS
        and not torch.is_autocast_enabled("cpu")
    ):
        sigma = torch.dot(u, torch.mv(as_matrix(weight, rule.dim), v))
        return weight / sigma if sigma.item() and not rule.cap else weight / divisor(sigma.item(), rule.cap)
    lies = _layout(weight, u, v, rule) if on_cpu and choose(None, weight) == "torch" else None
    if lies is None:
        return spectral_normalize([weight], [u], [v], [rule], iterate=iterate)[0]
    with torch.no_grad():
        state, outs = _on_cpu([Item(weight, u, v, rule, weight.dtype, lies)], iterate, iterate, keep)
    return _Normalized.apply(state, outs, weight)[0] if keep else outs[0]


def normalize_again(weight: Tensor, u: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """W/σ with u and v as they are, for a forward that an activation checkpoint repeats in the backward pass.

    Saves no tensor where the checkpoint would count it: in the forward before, W/σ came from outside.
    """
    with torch.no_grad():
        out = _by_formula(weight, u, v, rule, weight.dtype)
    return _Again.apply(weight, out, u.clone(), v.clone(), rule) if torch.is_grad_enabled() else out


def power_iteration(weight: Tensor, u: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """New u (R,) and v (C,) of `weight` after the rule's power iterations, by PyTorch's operators."""
    with torch.no_grad(), _without_autocast(weight):
        matrix = _in_sums(as_matrix(weight, rule.dim))
        u, v = u.to(matrix.dtype), v.to(matrix.dtype)
        for _ in range(rule.n_power_iterations):
            if rule.order == "vu":
                v = _unit(torch.mv(matrix.t(), u), v)
                u = _unit(torch.mv(matrix, v), u)
            else:
                u = _unit(torch.mv(matrix, v), u)
                v = _unit(torch.mv(matrix.t(), u), v)
    return u, v


class State(Protocol):
    """What a backward needs beside tensors."""

    rules: list[Rule]
    us: list[Tensor]
    vs: list[Tensor]
    layouts: list[Layout]

    def gradients(
        self, grads: Sequence[Tensor | None], weights: Sequence[Tensor], outs: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """The weights' gradients from those of the results, without a graph."""

    def split(self) -> Sequence["State"]:
        """One for each weight."""


@dataclass
class _CpuState:
    rules: list[Rule]
    us: list[Tensor]
    vs: list[Tensor]  # in memory order
    layouts: list[Layout]
    sigmas: list[float]

    def gradients(
        self, grads: Sequence[Tensor | None], weights: Sequence[Tensor], outs: Sequence[Tensor]
    ) -> list[Tensor | None]:
        return [
            None if grad is None else gradient_on_cpu(grad, out, weight, lies, u, v, sigma, rule.cap)
            for grad, out, weight, lies, u, v, sigma, rule in zip(
                grads, outs, weights, self.layouts, self.us, self.vs, self.sigmas, self.rules, strict=True
            )
        ]

    def split(self) -> list["_CpuState"]:
        return [
            _CpuState([rule], [u], [v], [lies], [sigma])
            for rule, u, v, lies, sigma in zip(
                self.rules, self.us, self.vs, self.layouts, self.sigmas, strict=True
            )
        ]


def _on_cpu(items: Sequence[Item], iterate: bool, store: bool, keep: bool) -> tuple["State", list[Tensor]]:
    """States and results. `keep`: a backward may need the vectors, which the next call may move."""
    state = _CpuState([item.rule for item in items], [], [], [item.lies for item in items], [])
    outs = []
    with _without_autocast(items[0].weight):
        for weight, u, v, rule, dtype, lies in items:
            iterations = iterate * rule.n_power_iterations
            new_u, new_v, sigma = iterate_on_cpu(weight, lies, u, v, rule.order == "vu", iterations)
            if store:
                u.copy_(new_u)
                v.copy_(to_stored_order(new_v, lies))
            out = torch.empty_like(weight, dtype=dtype)
            outs.append(torch.div(weight, divisor(sigma, rule.cap), out=out))
            state.us.append(new_u.clone() if keep and new_u is u else new_u)
            state.vs.append(new_v.clone() if keep and new_v is v else new_v)
            state.sigmas.append(sigma)
    return state, outs


def _on_gpu(
    items: Sequence[Item], iterate: bool, store: bool, plans: "Plans | None"
) -> tuple["State", list[Tensor]]:
    from sagan_kernels.ops.spectral_norm_launch import Plans

    return (plans or Plans()).launch(items, iterate=iterate, store=store)


def _attach(state: "State", outs: list[Tensor], weights: list[Tensor], deferred: bool) -> Sequence[Any]:
    """The results with their place in the graph, or functions that give them one."""
    if deferred:
        parts = zip(state.split(), outs, weights, strict=True)
        return [functools.partial(_attach_one, part, out, weight) for part, out, weight in parts]
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
        return _Normalized.apply(state, outs, *weights)
    return outs


def _attach_one(state: "State", out: Tensor, weight: Tensor) -> Tensor:
    return _attach(state, [out.detach()], [weight], False)[0]


class _Normalized(torch.autograd.Function):
    """Gives results that are there already their backward."""

    @staticmethod
    def forward(ctx: Any, state: State, outs: list[Tensor], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*weights, *outs)
        needed = ctx.needs_input_grad[2:]
        ctx.mark_non_differentiable(*(out for out, need in zip(outs, needed, strict=True) if not need))
        ctx.state = state
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(grads)
        saved = ctx.saved_tensors  # once: activation checkpoints allow no second time
        weights, outs = saved[:count], saved[count:]
        wanted = [
            _dense(grad) if needed and grad is not None else None
            for grad, needed in zip(grads, ctx.needs_input_grad[2:], strict=True)
        ]
        if not torch.is_grad_enabled() and all(grad is None or is_plain(grad) for grad in wanted):
            return None, None, *ctx.state.gradients(wanted, weights, outs)
        state = ctx.state
        vs = [to_stored_order(v, lies) for v, lies in zip(state.vs, state.layouts, strict=True)]
        terms = zip(wanted, weights, state.us, vs, state.rules, strict=True)
        found = [None if grad is None else _gradient_formula(grad, *rest) for grad, *rest in terms]
        return None, None, *found


class _Again(torch.autograd.Function):
    """W/σ that is there already, as `_Normalized`, without saved tensors."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, out: Tensor, u: Tensor, v: Tensor, rule: Rule) -> Tensor:
        ctx.inputs = weight, u, v, rule
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gradient_formula(_dense(grad), *ctx.inputs), None, None, None, None


def _dense(grad: Tensor) -> Tensor:
    """Embeddings may give sparse gradients; that of W is not."""
    return grad.to_dense() if grad.is_sparse else grad


def _gradient_formula(grad: Tensor, weight: Tensor, u: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """The backward in differentiable operators."""
    with _without_autocast(weight):
        matrix = _in_sums(as_matrix(weight, rule.dim))
        # reshape and not flatten, for which is_grads_batched has no rule
        grad_matrix = grad.movedim(rule.dim, 0).reshape(matrix.shape).to(matrix.dtype)
        u, v = u.to(matrix.dtype), v.to(matrix.dtype)
        sigma = torch.dot(u, torch.mv(matrix, v))
        divides = (sigma >= 1) if rule.cap else (sigma != 0)
        divided_by = torch.where(divides, sigma, 1)
        dot = torch.where(divides, (grad_matrix * matrix).sum() / divided_by, 0)
        result = ((grad_matrix - dot * torch.outer(u, v)) / divided_by).to(weight.dtype)
    return result.view(weight.movedim(rule.dim, 0).shape).movedim(0, rule.dim)


def _settled(
    weight: Tensor, u: Tensor, v: Tensor, rule: Rule, iterate: bool, store: bool
) -> tuple[Tensor, Tensor]:
    """The vectors that σ is taken with."""
    new_u, new_v = power_iteration(weight, u, v, rule) if iterate else (u.clone(), v.clone())
    if store:
        with torch.no_grad():
            u.copy_(new_u)
            v.copy_(new_v)
    if store and torch.compiler.is_compiling() and min(u.numel(), v.numel()) <= 4:
        return torch.ops.sagan_kernels.kept(new_u), torch.ops.sagan_kernels.kept(new_v)
    return new_u, new_v


def _by_formula(weight: Tensor, u: Tensor, v: Tensor, rule: Rule, dtype: torch.dtype) -> Tensor:
    """W/σ in PyTorch's own differentiable operators."""
    with _without_autocast(weight):
        matrix = _in_sums(as_matrix(weight, rule.dim))
        sigma = torch.dot(u.to(matrix.dtype), torch.mv(matrix, v.to(matrix.dtype)))
        divided_by = sigma.clamp(min=1) if rule.cap else torch.where(sigma == 0, 1, sigma)
        return (weight / divided_by).to(dtype)


def _choose(weight: Tensor, impl: Impl | None) -> Impl:
    if _traced():
        return "reference"
    chosen = choose(impl, weight)
    return "reference" if chosen == "torch" and weight.device.type != "cpu" else chosen


def _traced() -> bool:
    """Whether tensors stand for others, so that only PyTorch's own operators will do."""
    return (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch._C._is_tracing()
    )


def _layout(weight: Tensor, u: Tensor, v: Tensor, rule: Rule) -> Layout | None:
    """What the fast implementations need to know; None where the formula must do."""
    if not (u.dtype == v.dtype == weight.dtype and u.is_contiguous() and v.is_contiguous()):
        return None
    return layout(weight.size(), weight.stride(), rule.dim)


def _unit(raw: Tensor, old: Tensor) -> Tensor:
    """Raw / ‖raw‖ at any scale, or `old` where it is zero."""
    peak = raw.abs().amax()
    scaled = raw / torch.where(peak == 0, 1, peak)
    return torch.where(peak == 0, old, scaled / torch.linalg.vector_norm(scaled).clamp(min=1))


def _in_sums(matrix: Tensor) -> Tensor:
    return matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix


def _without_autocast(weight: Tensor) -> AbstractContextManager[Any]:
    kind = weight.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


# torch.compile sums four elements or fewer anew in the backward pass (seen up to torch 2.13), and would do so from u
# and v as the forward left them. What comes out of an operator that it does not know, it saves.
_library = torch.library.Library("sagan_kernels", "FRAGMENT")
_library.define("kept(Tensor vector) -> Tensor")
_library.impl("kept", torch.clone, "CompositeExplicitAutograd")
torch.library.register_fake("sagan_kernels::kept", torch.empty_like, lib=_library)
