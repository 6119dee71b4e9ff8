"""Hosts' own spectral norms: which there are, and subclasses without their bugs.

A host's σ, its epsilons and the matrix it takes are kept as they are: they are part of the network. Two things are bugs
and are not kept: vectors that move in eval mode, where a forward is to change nothing, and gradients of an earlier
forward computed with the vectors of a later one. In training mode, with each forward followed by its backward, the
numbers are the host's; in eval mode they are those of the host's first forward.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sagan_kernels.nn.spectral_norm import in_backward
from sagan_kernels.swapping.check import (
    REPLACED,
    TOLERANCE,
    NotComparable,
    difference,
    float64_copy,
    gradients,
    safe_copy,
    told,
)
from sagan_kernels.swapping.report import Row
from sagan_kernels.swapping.subclass import Swapped, swap_class


@dataclass(frozen=True)
class WrapperForm:
    """Where a wrapper around a module keeps its tensors: W, u and v, as paths from the wrapper. Data only.

    `{name}` is the wrapper's attribute `name`, the name of the weight.
    """

    name: str
    weight: str
    u: str
    v: str


WRAPPERS = (
    WrapperForm("wrapper", "module.{name}_bar", "module.{name}_u", "module.{name}_v"),
    WrapperForm("torchgan's wrapper", "w_bar", "u", "v"),
)

HOOK = "hook of its own"
EVAL_BUG = "u moved in eval mode; it no longer does"
WRAPPER_BUGS = (
    "u and v moved in eval mode, and two forwards before a backward gave wrong gradients; neither is so now"
)


class FixedWrapper(Swapped):
    """Mixed into a host's wrapper in front of it: σ from vectors of this very forward, stored in training mode only.

    Gradients: of every order, through W/σ; u and v are constants.
    """

    __slots__ = ()
    swapped_form: ClassVar[WrapperForm]
    module: nn.Module
    name: str
    power_iterations: int
    training: bool

    def forward(self, *args: Any) -> Any:
        module, name = self.module, self.name
        weight = self._normalized()
        setattr(module, name, weight)
        try:
            return module.forward(*args)
        finally:
            setattr(module, name, weight.detach())  # a result of the graph left here would forbid deep copies

    def _normalized(self) -> Tensor:
        form = self.swapped_form
        weight, u, v = (_tensor(self, path) for path in (form.weight, form.u, form.v))
        matrix = weight.flatten(1)
        # an activation checkpoint computes its forward again in the backward pass: u and v are those of the first time
        iterations = 0 if in_backward() else self.power_iterations
        with torch.no_grad():
            new_u, new_v = u.clone(), v.clone()
            for _ in range(iterations):
                new_v = _unit(
                    matrix.mT.mv(new_u)
                )  # mv as the host has it: autocast treats it otherwise than matmul
                new_u = _unit(matrix.mv(new_v))
            if self.training and iterations:
                u.copy_(new_u)
                v.copy_(new_v)
        return weight / (new_u.dot(matrix.mv(new_v))).expand_as(weight)


class FixedHook(Swapped):
    """Mixed into the class of a host's forward pre-hook in front of it: u is stored in training mode only."""

    __slots__ = ()
    name: str
    compute_weight: Callable[[nn.Module], tuple[Tensor, Tensor]]

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        weight, u = self.compute_weight(module)
        setattr(module, self.name, weight)
        if module.training:
            setattr(module, f"{self.name}_u", u)


def fix_spectral_norm(model: nn.Module, *, verify: bool, faithful: bool) -> Iterator[Row]:
    """Recognize the spectral norms that hosts have written, and fix those that have bugs unless `faithful`."""
    for path, part in list(model.named_modules()):
        if isinstance(part, torch.jit.ScriptModule):
            continue
        row = partial(Row, path, type(part).__name__, "spectral norm")
        form = _wrapper_form(part)
        hook = _own_hook(part)
        if isinstance(part, FixedWrapper) or isinstance(hook, FixedHook):
            why = "fixed by an earlier swap; call unswap_layers first to keep the bugs" if faithful else ""
            yield row(form.name if form else HOOK, "already swapped", why)
        elif form is not None and "forward" in part.__dict__:
            yield row(form.name, "refused", REPLACED)
        elif form is not None:
            yield row(form.name, *_fix_wrapper(part, form, verify, faithful))
        elif hook is not None:
            yield row(HOOK, *_fix_hook(part, hook, verify, faithful))


def _fix_wrapper(part: nn.Module, form: WrapperForm, verify: bool, faithful: bool) -> tuple[Any, ...]:
    """Status, reason and error."""
    if faithful:
        return "kept", f"faithful: {WRAPPER_BUGS.partition(';')[0]}"
    error = None
    if verify:
        try:
            error = _wrapper_difference(part, form)
        except NotComparable as refusal:
            return "refused", str(refusal)
        if not error <= TOLERANCE:
            return "refused", f"numbers differ by {error:.0e}", error
    swap_class(part, FixedWrapper, form)
    return "swapped", WRAPPER_BUGS, error


def _fix_hook(part: nn.Module, hook: Any, verify: bool, faithful: bool) -> tuple[Any, ...]:
    """Status, reason and error."""
    if faithful:
        return "kept", f"faithful: {EVAL_BUG.partition(';')[0]}"
    error = None
    if verify:
        try:
            error = _hook_difference(part)
        except NotComparable as refusal:
            return "refused", str(refusal)
        if not error <= TOLERANCE:
            return "refused", f"numbers differ by {error:.0e}", error
    swap_class(hook, FixedHook, None)
    return "swapped", EVAL_BUG, error


def _wrapper_difference(part: nn.Module, form: WrapperForm) -> float:
    """The largest difference of a fixed wrapper to its host where the host is right.

    That is one forward and backward in training mode with the vectors after it, and one forward in eval mode.
    """
    host = float64_copy(part)
    x = _input_of(host.module)
    largest = 0.0
    for training in (True, False):
        found = []
        for fixed in (False, True):
            twin = safe_copy(host).train(training)
            if fixed:
                swap_class(twin, FixedWrapper, form)
            with torch.enable_grad(), torch.autocast("cpu", enabled=False):
                try:
                    y = twin(x)
                except Exception as error:
                    raise NotComparable(
                        f"it does not run on a {tuple(x.shape)} input ({told(error)})"
                    ) from error
                (grad,) = gradients([y], [_tensor(twin, form.weight)])
            state = [_tensor(twin, path) for path in (form.u, form.v)] if training else []
            found.append([t.detach().clone() for t in (y, grad, *state) if t is not None])
        largest = max(largest, difference(*found))
    return largest


def _hook_difference(part: nn.Module) -> float:
    """The largest difference in the weight and u that a fixed hook leaves in training mode."""
    host = float64_copy(part).train()
    found = []
    for fixed in (False, True):
        twin = safe_copy(host)
        hook = _own_hook(twin)
        if fixed:
            swap_class(hook, FixedHook, None)
        hook(twin, ())
        found.append([getattr(twin, name).detach() for name in (hook.name, f"{hook.name}_u")])
    return difference(*found)


def _input_of(module: nn.Module) -> Tensor:
    """A random input for the module that is wrapped."""
    generator = torch.Generator("cpu").manual_seed(2)
    if isinstance(module, nn.Embedding):
        return torch.arange(min(3, module.num_embeddings), device="cpu")
    if isinstance(module, nn.Linear):
        shape: tuple[int, ...] = (3, module.in_features)
    elif isinstance(module, nn.modules.conv._ConvNd):
        sides = (k * d + 1 for k, d in zip(module.kernel_size, module.dilation, strict=True))
        shape = (2, module.in_channels, *sides)
    else:
        raise NotComparable(f"it wraps a {type(module).__name__}: no convolution, linear layer or embedding")
    return torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu")


def _wrapper_form(part: nn.Module) -> WrapperForm | None:
    if not isinstance(getattr(part, "module", None), nn.Module) or not isinstance(
        getattr(part, "name", None), str
    ):
        return None
    if not isinstance(getattr(part, "power_iterations", None), int):
        return None
    for form in WRAPPERS:
        try:
            tensors = [_tensor(part, path) for path in (form.weight, form.u, form.v)]
        except AttributeError:
            continue
        if all(isinstance(t, nn.Parameter) for t in tensors):
            return form
    return None


def _own_hook(part: nn.Module) -> Any:
    """A host's own forward pre-hook that normalizes by a vector u and keeps no v."""
    for hook in part._forward_pre_hooks.values():
        name = getattr(hook, "name", None)
        if (
            not type(hook).__module__.startswith("torch.")
            and isinstance(name, str)
            and hasattr(type(hook), "compute_weight")
            and all(hasattr(part, f"{name}_{end}") for end in ("orig", "u"))
            and not hasattr(part, f"{name}_v")
        ):
            return hook
    return None


def _tensor(part: Any, path: str) -> Tensor:
    found: Any = part
    for name in path.format(name=part.name).split("."):
        found = getattr(found, name)
    return found


def _unit(vector: Tensor) -> Tensor:
    return vector / (vector.norm() + 1e-12)
