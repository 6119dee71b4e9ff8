"""One power iteration for all spectral-normed layers of a model, in a constant number of launches."""

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm as SpectralNormHook
from torch.optim.optimizer import register_optimizer_step_post_hook

from sagan_kernels.nn.spectral_norm import (
    SHARDED,
    Found,
    SpectralNorm,
    find_spectral_norms,
    in_backward,
    is_sharded,
    spectral_norms,
)
from sagan_kernels.ops.dispatch import Impl
from sagan_kernels.ops.spectral_norm import normalize_again, normalize_one, spectral_normalize
from sagan_kernels.ops.spectral_norm_launch import Plans
from sagan_kernels.ops.spectral_norm_layout import Rule

Every = Literal["forward", "step"]
"""When a group iterates: at every training forward of the model, or at the first after weights have changed."""

_AUTOCAST = (nn.Linear, nn.modules.conv._ConvNd)
"""Layers whose weight autocast converts."""


def group_spectral_norm(
    model: nn.Module, *, every: Every = "forward", overlap: bool | None = None, impl: Impl | None = None
) -> "SpectralNormGroup":
    """Normalize all spectral-normed weights of `model` together, whenever `model` is called.

    Same as `SpectralNormGroup(model, ...)`, which has the arguments.
    """
    return SpectralNormGroup(model, every=every, overlap=overlap, impl=impl)


def ungroup_spectral_norm(model: nn.Module) -> nn.Module:
    """Undo every group whose layers lie in `model`, as `SpectralNormGroup.ungroup` does, and return `model`."""
    for group in groups_in(model):
        group.ungroup()
    for found in find_spectral_norms(model):  # a part of a grouped model, or a copy of one
        _leave(found.step)
    return model


class SpectralNormGroup:
    """The spectral-normed layers of a model, normalized together at the start of its forward.

    Layers are those of `sagan_kernels.nn.spectral_norm`, `torch.nn.utils.parametrizations.spectral_norm` and
    `torch.nn.utils.spectral_norm`. Parameters, buffers, state-dict keys, hooks and optimizers stay as they are. On a
    GPU it takes three launches forward and two backward, whatever the number of layers, for those that share device,
    dtype, dtype of the result, number of iterations and mode (training or evaluation); on a CPU it saves passes over
    the weights. Under autocast, linear and convolution layers get W/σ in autocast's dtype at once.

    **How often it iterates.** Once in a training forward of the model, however often a layer is used in it; once for
    each weight on its own, at the first use of a layer outside a forward of the model after that weight has changed;
    never in a backward pass, where activation checkpoints compute a forward again. With every="forward", D(real)
    followed by D(fake) iterates twice, as StudioGAN and mimicry do; with every="step" it iterates when a weight has
    changed, so once for an optimizer step, as BigGAN and the official code do. Two forwards before one backward give
    the right gradients in both cases. Activation checkpoints are the exception, as with torch's layers: a repeated
    forward takes the vectors of the last one, so with two before a backward let only one iterate.

    **The older hook** leaves the weight of a forward on the layer. After a grouped forward that weight has no graph, so
    that the model can be copied: a regularizer of `layer.weight` belongs inside the forward.

    **DistributedDataParallel** sends gradients while others are computed. With one backward for all layers, which runs
    after those of all others, there is nothing to hide the sending behind; `overlap` gives each layer its own, at the
    layer's turn.

    Args:
        model: the module that is called; group D and G apart. Changed in place; hooks are added to it.
        every: "forward" or "step". A weight has changed after the step of an optimizer that holds it, or where
            PyTorch has counted a change in place; `weight.data.mul_(2)` by hand goes unseen until the next of these.
        overlap: one backward for each layer. None chooses it where `torch.distributed` is initialized.
        impl: "triton", "torch" or "reference" as in `spectral_normalize`; None to choose by device.
        further: layers of other kinds. Their `step` is `Grouped`, and uses `given` where it is there.

    Raises:
        ValueError: nothing to group, a layer that is in a group already, or an unknown word.
        TypeError: sharded parameters (DTensor, FSDP).

    `copy.deepcopy`, `.to()`, `.half()`, `load_state_dict`, also with assign=True, and `.data =` are seen at the next
    forward: addresses are compared at every call. `nn.DataParallel` replicas normalize each layer by itself. Inside
    `torch.compile` the layers are normalized by PyTorch's operators, which its compiler fuses; every="step" breaks the
    graph there.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: Every = "forward",
        overlap: bool | None = None,
        impl: Impl | None = None,
        further: Iterable[Found] = (),
    ) -> None:
        if every not in get_args(Every):
            raise ValueError(
                f"group_spectral_norm: every must be one of {', '.join(get_args(Every))}, got {every!r}"
            )
        if impl is not None and impl not in get_args(Impl):
            raise ValueError(
                f"group_spectral_norm: impl must be one of {', '.join(get_args(Impl))}, got {impl!r}"
            )
        self.every = every
        self.overlap = overlap
        self.impl = impl
        self._model = model
        self._plans = Plans()
        own = list(_groupable(model))
        self._members = [*own, *further]
        if not self._members:
            raise ValueError(
                f"group_spectral_norm: the model must have spectral-normed layers, got none in {type(model).__name__}; "
                "add them with sagan_kernels.nn.spectral_norm"
            )
        _refuse_sharded(model, self._members)
        for member in own:
            if isinstance(member.step, Grouped):
                raise ValueError(
                    f"group_spectral_norm: layers must be in one group, got {member.path} in another; "
                    "call ungroup_spectral_norm first"
                )
        for member in self._members:
            _check_sizes(member, member.weight, member.u, member.v, member.rule)
        for member in self._members:
            member.step.__class__ = _GROUPED.get(type(member.step), type(member.step))
        _listen()
        model.register_forward_pre_hook(self._begin, prepend=True)
        model.register_forward_hook(self._end, always_call=True)

    def __len__(self) -> int:
        """Layers in the group."""
        return len(self._members)

    def __repr__(self) -> str:
        return f"SpectralNormGroup({len(self)} layers of {type(self._model).__name__}, every={self.every!r})"

    def sigma(self) -> dict[str, Tensor]:
        """Estimates of each weight's spectral norm, as `spectral_norms` gives them."""
        return spectral_norms(self._model)

    def ungroup(self) -> nn.Module:
        """Undo the grouping: every layer is as before, with u and v where the group has brought them."""
        self._end(self._model)
        for hooks, call in (
            (self._model._forward_pre_hooks, self._begin),
            (self._model._forward_hooks, self._end),
        ):
            for key in [key for key, hook in hooks.items() if hook == call]:
                del hooks[key]
        self._model._forward_hooks_always_called = type(self._model._forward_hooks_always_called)(
            (key, value)
            for key, value in self._model._forward_hooks_always_called.items()
            if key in self._model._forward_hooks
        )
        for member in self._members:
            _leave(member.step)
        self._members = []
        return self._model

    def _begin(self, model: nn.Module, _args: Any) -> None:
        if _is_replica(model):
            return
        if not torch.compiler.is_compiling():
            _listen()
            _GROUPS.add(self)  # here, so that copies and unpickled groups are among them
        self._members = [m for m in self._members if isinstance(m.step, Grouped) and m.attached]
        for member in self._members:
            member.step.__dict__["given"] = (
                None  # an interrupt may have kept the last forward from clearing it
            )
        again = in_backward()
        parts: dict[tuple[bool, bool], list[Found]] = {}
        for member in self._members:
            store = member.training and not again
            if store and self.every == "step":
                store = _changed(member.step, member.weight)
            parts.setdefault((store or member.transient, store), []).append(member)
        for (iterate, store), members in parts.items():
            cheap = not torch.is_grad_enabled() and members[0].weight.device.type == "cpu"
            if not iterate and (cheap or torch._C._is_tracing()):
                continue  # nothing is shared between layers: each does its own when it is used, as it would alone
            self._normalize(members, iterate, store)

    def _normalize(self, members: Sequence[Found], iterate: bool, store: bool) -> None:
        weights, us, vs, rules = zip(*((m.weight, m.u, m.v, m.rule) for m in members), strict=True)
        if not torch.compiler.is_compiling():
            for entry in zip(members, weights, us, vs, rules, strict=True):
                _check_sizes(*entry)
        # a part of the forward may ask for gradients within a forward without any
        later = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        results = spectral_normalize(
            weights,
            us,
            vs,
            rules,
            iterate=iterate,
            store=store,
            dtypes=[_dtype(member.module, weight) for member, weight in zip(members, weights, strict=True)],
            deferred=later or (_distributed() if self.overlap is None else self.overlap),
            impl=self.impl,
            plans=self._plans,
        )
        for member, weight, result in zip(members, weights, results, strict=True):
            if store:
                if self.every == "step" or not torch.compiler.is_compiling():
                    _note(member.step, weight)
                if isinstance(member.step, SpectralNorm):
                    member.step.iterate_others(weight)
            member.step.__dict__["converted"] = _dtype(member.module, weight) != weight.dtype
            member.step.__dict__["given"] = result  # nn.Module looks at every attribute it is given

    def _forget(self, stepped: set[int]) -> None:
        for member in self._members:
            if member.attached and id(member.weight) in stepped:
                member.step.__dict__["seen"] = None

    def _end(self, model: nn.Module, *_: Any) -> None:
        if _is_replica(model):
            return
        for member in self._members:
            member.step.__dict__["given"] = None
            if member.hooked and isinstance(weight := member.module.__dict__.get(member.name), Tensor):
                setattr(
                    member.module, member.name, weight.detach()
                )  # a deepcopy refuses tensors with a graph


_GROUPS: weakref.WeakSet[SpectralNormGroup] = weakref.WeakSet()


@functools.cache
def _listen() -> None:
    """Hear of every optimizer's steps: some write through `.data`, which PyTorch does not count as a change."""
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: torch.optim.Optimizer, _args: Any, _keywords: Any) -> None:
    stepped = {id(parameter) for part in optimizer.param_groups for parameter in part["params"]}
    for group in list(_GROUPS):
        group._forget(stepped)


def groups_in(model: nn.Module) -> list[SpectralNormGroup]:
    """The groups of `model` and of the modules in it."""
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    owners = [getattr(hook, "__self__", None) for hook in hooks]
    return [owner for owner in owners if isinstance(owner, SpectralNormGroup)]


class Grouped:
    """What normalizes one weight, when a group may have done it already."""

    given: Tensor | Callable[[], Tensor] | None = None  # W/σ, while the group's model runs
    seen: tuple[int, int] | None = None  # the weight at the last iteration, see _stamp
    converted = False  # `given` is in autocast's dtype


def take(step: Grouped, module: nn.Module) -> Tensor | None:
    """W/σ of the group. None outside a forward of its model, in a copy of `module` on another device, and where
    autocast is off in a part of a forward under it: the layer then does its own, in full precision.
    """
    given = step.given
    if given is None or _is_replica(module):
        return None
    if callable(given) and not isinstance(given, Tensor):
        given = given()
        if given.requires_grad:
            step.__dict__["given"] = given  # one backward, however often the layer is used
    if step.converted and not torch.is_autocast_enabled(given.device.type):
        return None
    return given


class _GroupedOwn(Grouped, SpectralNorm):
    def forward(self, weight: Tensor) -> Tensor:
        if (result := take(self, self)) is not None:
            return result
        if in_backward():
            return normalize_again(weight, self._u, self._v, self.rule)
        if iterate := self.training and _changed(self, weight):
            _note(self, weight)
        return self.normalized(weight, iterate)


class _GroupedParametrization(Grouped, parametrizations._SpectralNorm):
    def forward(self, weight: Tensor) -> Tensor:
        if (result := take(self, self)) is not None:
            return result
        found = Found("", self, "", self)
        return _alone(self, weight, found, self._u, self._v)


class _GroupedHook(Grouped, SpectralNormHook):
    def __call__(self, module: nn.Module, inputs: Any) -> None:
        if (result := take(self, module)) is None:
            found = Found("", module, self.name, self)
            result = _alone(self, found.weight, found, found.u, found.v)
        setattr(module, self.name, result)


_GROUPED = {
    SpectralNorm: _GroupedOwn,
    parametrizations._SpectralNorm: _GroupedParametrization,
    SpectralNormHook: _GroupedHook,
}


def _groupable(model: nn.Module) -> Iterator[Found]:
    """The layers whose normalizer is known; a subclass of one may compute something else."""
    for found in find_spectral_norms(model):
        if type(found.step) in _GROUPED or isinstance(found.step, Grouped):
            yield found


def _alone(step: Any, weight: Tensor, found: Found, u: Tensor, v: Tensor) -> Tensor:
    """W/σ of one layer, outside a forward of the group's model."""
    if in_backward():
        return normalize_again(weight, u, v, found.rule)
    if iterate := found.training and _changed(step, weight):
        _note(step, weight)
    return normalize_one(weight, u, v, found.rule, iterate)


def _leave(step: Any) -> None:
    for plain, grouped in _GROUPED.items():
        if type(step) is grouped:
            step.__class__ = plain
            step.__dict__.pop("given", None)
            step.__dict__.pop("seen", None)
            step.__dict__.pop("converted", None)


def _note(step: Any, weight: Tensor) -> None:
    _leave_the_graph()
    step.__dict__["seen"] = _stamp(weight)


def _changed(step: Any, weight: Tensor) -> bool:
    _leave_the_graph()
    return step.seen is None or step.seen != _stamp(weight)


def _leave_the_graph() -> None:
    """Version counters are not known inside `torch.compile`."""
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break()


def _stamp(weight: Tensor) -> tuple[int, int] | None:
    """What differs once an optimizer has changed the weight; None where that cannot be told."""
    if weight.is_inference() or torch._C._are_functorch_transforms_active():
        return None
    return (weight.data_ptr() if weight.device.type != "meta" else 0), weight._version


def _dtype(module: nn.Module, weight: Tensor) -> torch.dtype:
    kind = weight.device.type
    if not (
        weight.dtype == torch.float32
        and isinstance(module, _AUTOCAST)
        and torch.amp.is_autocast_available(kind)
    ):
        return weight.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _check_sizes(member: Found, weight: Tensor, u: Tensor, v: Tensor, rule: Rule) -> None:
    if is_sharded(weight):
        raise TypeError(f"group_spectral_norm: {member.path} {SHARDED}")
    rows, columns = u.numel(), v.numel()
    if rule.dim >= weight.ndim or weight.shape[rule.dim] != rows or weight.numel() != rows * columns:
        raise ValueError(
            f"group_spectral_norm: {member.path} must have as many rows and columns as its u ({rows},) and "
            f"v ({columns},), got a weight {tuple(weight.shape)}; normalize it again after resizing"
        )
    if not weight.device == u.device == v.device:
        raise ValueError(
            f"group_spectral_norm: {member.path} must be on one device with its u and v, got {weight.device}, "
            f"{u.device} and {v.device}; move the layer with .to()"
        )


def _refuse_sharded(model: nn.Module, members: list[Found]) -> None:
    for path, module in model.named_modules():
        if any(kind.__name__ in ("FullyShardedDataParallel", "FSDPModule") for kind in type(module).__mro__):
            raise TypeError(f"group_spectral_norm: {path or 'the model'} {SHARDED}")
    for member in members:
        if is_sharded(member.weight):
            raise TypeError(f"group_spectral_norm: {member.path} {SHARDED}")


def _is_replica(module: nn.Module) -> bool:
    return getattr(module, "_is_replica", False)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
