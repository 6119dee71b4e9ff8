"""The spectral norms of a network that have no bugs, normalized together: torch's, ours, and hosts' methods."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sagan_kernels.nn import SpectralNormGroup
from sagan_kernels.nn.spectral_norm import Found, find_spectral_norms, in_backward
from sagan_kernels.nn.spectral_norm_group import Grouped, groups_in, take
from sagan_kernels.ops.spectral_norm import spectral_normalize
from sagan_kernels.ops.spectral_norm_layout import Rule
from sagan_kernels.swapping.check import (
    NETWORK_TOLERANCE,
    TOLERANCE,
    NotComparable,
    difference,
    float64_copy,
    gradients,
    network_difference,
)
from sagan_kernels.swapping.projections import weight_method
from sagan_kernels.swapping.report import Row, Status
from sagan_kernels.swapping.subclass import Swapped, swap_class, unswap_class

GROUPED = "normalized with the others of its network, once at the start of a forward"


@dataclass(frozen=True)
class MethodForm:
    """How a host's layer normalizes its own weight, in a method that returns W/σ. Data only.

    One power iteration, v before u, from a buffer u (1, R); in eval mode too, and then it is forgotten. The last σ is
    kept in a buffer that nothing reads.
    """

    method: str
    u: str
    sigma: str
    ones: tuple[str, ...]
    """Attributes that must be 1, where they are there."""


METHODS = (
    MethodForm("W_", "u0", "sv0", ("num_svs", "num_itrs")),
    MethodForm("sn_weights", "sn_u", "sn_sigma", ("num_iters",)),
)
"""BigGAN-PyTorch's and mimicry's. mmgeneration's `sn_weight` takes σ for a constant, and is left as it is."""


class GroupedMethod(Swapped, Grouped):
    """Mixed into a host's layer that normalizes its own weight: takes the group's W/σ, else the host's."""

    swapped_form: ClassVar[MethodForm]


class _GroupedW(GroupedMethod):
    def W_(self) -> Tensor:
        return _given(self)


class _GroupedSn(GroupedMethod):
    def sn_weights(self) -> Tensor:
        return _given(self)


_MIXINS: dict[str, type[GroupedMethod]] = {"W_": _GroupedW, "sn_weights": _GroupedSn}


class FoundMethod(Found):
    """A layer that normalizes its own weight."""

    @property
    def form(self) -> MethodForm:
        """How it does."""
        method = weight_method(self.module)
        return next(form for form in METHODS if form.method == method)

    @property
    def hooked(self) -> bool:
        return False

    @property
    def attached(self) -> bool:
        return True

    @property
    def weight(self) -> Tensor:
        return self.module.weight  # type: ignore[return-value]

    @property
    def u(self) -> Tensor:
        return self.module._buffers[self.form.u][0]  # type: ignore[index]

    @property
    def v(self) -> Tensor:
        """Scratch: the host keeps none, and computes it from u."""
        weight, kept = self.weight, self.step.__dict__.get("swapped_v")
        columns = weight.numel() // weight.shape[0]
        if kept is None or kept.device != weight.device or kept.dtype != self.u.dtype:
            kept = torch.full((columns,), columns**-0.5, dtype=self.u.dtype, device=weight.device)
            self.step.__dict__["swapped_v"] = kept
        return kept

    @property
    def rule(self) -> Rule:
        return Rule(0, "vu")

    @property
    def training(self) -> bool:
        return self.module.training

    @property
    def transient(self) -> bool:
        return True


class SwappedGroup(SpectralNormGroup):
    """A group that `unswap_layers` undoes; those that somebody made stay."""

    def ungroup(self) -> nn.Module:
        steps = [member.step for member in self._members]
        model = super().ungroup()
        for step in steps:
            _leave(step)
        return model


def group_spectral_norms(model: nn.Module, *, verify: bool, inputs: Sequence[Any] | None) -> Iterator[Row]:
    """Group the spectral norms that have no bugs, network by network.

    With `verify` a copy of one layer of each class with a method is compared first, and with `inputs` of the model's
    forward, copies of the whole model.
    """
    error, not_compared = (
        None,
        "; the whole model is compared when inputs are given" if inputs is None else "",
    )
    if verify and inputs is not None and any(_norms(network) for _, network in networks(model)):
        try:
            error = network_difference(model, lambda twin: list(_group(twin, verify=False)), inputs)
        except NotComparable as refusal:
            not_compared = f"; not compared: {refusal}"
    if error is not None and not error <= NETWORK_TOLERANCE:
        reason = (
            f"grouped, the whole model's numbers differ by {error:.0e}; is a layer used twice in a forward?"
        )
        for stem, network in networks(model):
            for found in _norms(network):
                yield _row(stem, found, "kept", reason)
        return
    for row in _group(model, verify):
        swapped = row.status == "swapped"
        yield replace(row, error=error, reason=row.reason + not_compared) if swapped else row


def networks(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules that are called, with their paths: without what is around them and what only holds several."""
    wrapped = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}
    name = wrapped.get(type(model).__name__)
    if name is not None:
        yield from networks(getattr(model, name), f"{path}.{name}".lstrip("."))
    elif isinstance(model, torch.jit.ScriptModule):
        return
    elif type(model).forward is nn.Module.forward or hasattr(model, "training_step"):
        for name, child in model.named_children():
            yield from networks(child, f"{path}.{name}".lstrip("."))
    else:
        yield path, model


def ungroup_spectral_norms(model: nn.Module) -> None:
    """Undo the groups of `group_spectral_norms` in `model`."""
    _ungroup(group for group in groups_in(model) if isinstance(group, SwappedGroup))
    for part in model.modules():  # a part of a grouped network, or a copy of one
        _leave(part)


def _group(model: nn.Module, verify: bool) -> Iterator[Row]:
    for stem, network in networks(model):
        norms = _norms(network)
        kept = {found.path: why for found in norms if (why := _reason_to_keep(found)) is not None}
        if verify:
            kept |= _wrong_methods([f for f in norms if isinstance(f, FoundMethod) and f.path not in kept])
        before = [isinstance(found.step, Grouped) for found in norms]
        wanted = [found for found in norms if found.path not in kept]
        status: Status = "swapped"
        reason = GROUPED
        if wanted and not all(isinstance(found.step, Grouped) for found in wanted):
            try:
                old = groups_in(network)
                if all(isinstance(group, SwappedGroup) for group in old):
                    _ungroup(old)  # of parts that were swapped by themselves
                _make_group(network, [found for found in wanted if isinstance(found, FoundMethod)])
            except (TypeError, ValueError) as refusal:
                status, reason = "kept", str(refusal)
        for found, already in zip(norms, before, strict=True):
            if already:
                yield _row(stem, found, "already swapped", "")
            elif found.path in kept:
                yield _row(stem, found, "kept", kept[found.path])
            else:
                yield _row(stem, found, status, reason)


def _make_group(network: nn.Module, further: list[FoundMethod]) -> None:
    SwappedGroup(network, further=further)
    for found in further:  # only now: what is `Grouped` before counts as a member of another group
        swap_class(found.module, _MIXINS[found.form.method], found.form)


def _norms(network: nn.Module) -> list[Found]:
    """Every spectral norm of torch, ours, and hosts' methods."""
    found = list(find_spectral_norms(network))
    for path, part in network.named_modules():
        if weight_method(part) is not None and isinstance(getattr(part, "weight", None), nn.Parameter):
            found.append(FoundMethod(f"{path}.weight".lstrip("."), part, "weight", part))
    return found


def _reason_to_keep(found: Found) -> str | None:
    if not isinstance(found, FoundMethod):
        return None
    method = weight_method(found.module)
    form = next((form for form in METHODS if form.method == method), None)
    if form is None:
        return "takes σ for a constant; normalized by itself, as its host does"
    u = found.module._buffers.get(form.u)
    if u is None or u.shape != (1, found.weight.shape[0]) or getattr(found.module, "transpose", False):
        return "its vector has another shape; normalized by itself, as its host does"
    if any(getattr(found.module, name, 1) != 1 for name in form.ones):
        return "several singular values or iterations; normalized by itself, as its host does"
    return None


def _wrong_methods(norms: list[FoundMethod]) -> dict[str, str]:
    """Reasons by path. The smallest layer of a class stands for the others."""
    smallest: dict[type, FoundMethod] = {}
    for found in sorted(
        (f for f in norms if not isinstance(f.step, Grouped)), key=lambda f: f.weight.numel()
    ):
        smallest.setdefault(type(found.module), found)
    reasons: dict[type, str] = {}
    for cls, found in smallest.items():
        try:
            error = _method_difference(found)
        except NotComparable as refusal:
            reasons[cls] = str(refusal)
        else:
            if not error <= TOLERANCE:
                reasons[cls] = f"grouped, its numbers differ by {error:.0e}"
    return {found.path: reasons[type(found.module)] for found in norms if type(found.module) in reasons}


def _method_difference(found: FoundMethod) -> float:
    """The largest difference of the group's W/σ, its gradient and u to the host's, in training and in eval mode."""
    largest = 0.0
    for training in (True, False):
        results = []
        for grouped in (False, True):
            layer = float64_copy(found.module).train(training)
            twin = FoundMethod(found.path, layer, found.name, layer)
            with torch.enable_grad():
                if grouped:
                    (result,) = spectral_normalize(
                        [twin.weight], [twin.u], [twin.v], [twin.rule], iterate=True, store=training
                    )
                else:
                    result = getattr(layer, found.form.method)()
                (grad,) = gradients([result], [twin.weight])
            results.append([result.detach(), *([] if grad is None else [grad]), twin.u.clone()])
        largest = max(largest, difference(*results))
    return largest


def _row(stem: str, found: Found, status: Status, reason: str) -> Row:
    if isinstance(found, FoundMethod):
        style = f"method {weight_method(found.module)}"
    else:
        style = "torch's hook" if found.hooked else "parametrization"
    path = ".".join(filter(None, (stem, found.path.rpartition(".")[0])))
    return Row(path, type(found.module).__name__, "spectral norm", style, status, reason)


def _given(layer: Any) -> Tensor:
    """The group's W/σ, and in training its σ into the host's buffer; without a group, what the host computes."""
    form, result = layer.swapped_form, take(layer, layer)
    if result is None:
        return getattr(layer.swapped_host, form.method)(layer)
    if layer.training and not in_backward():
        with torch.no_grad():
            kept = layer._buffers[form.sigma]
            few = (t.flatten()[:64].to(kept.dtype) for t in (layer.weight, result))
            sigma = torch.div(*(torch.linalg.vector_norm(t) for t in few))
            kept.copy_(torch.where(sigma.isfinite(), sigma, kept))
    return result


def _leave(step: Any) -> None:
    if isinstance(step, GroupedMethod):
        unswap_class(step)
        for name in ("given", "seen", "converted", "swapped_v"):
            step.__dict__.pop(name, None)


def _ungroup(groups: Iterable[SpectralNormGroup]) -> None:
    for group in list(groups):
        group.ungroup()
