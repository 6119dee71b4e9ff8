"""Swap the layers of a model of another project for ours, in place, and back."""

import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map

from sagan_kernels.nn import PaperSelfAttention2d, SelfAttention2d
from sagan_kernels.ops.attention_tiles import stores_map
from sagan_kernels.swapping import recognize
from sagan_kernels.swapping.attention import SwappedAttention
from sagan_kernels.swapping.check import (
    REPLACED,
    TOLERANCE,
    NotComparable,
    Recording,
    float64_copy,
    remove_watchers,
    returns_map,
    safe_copy,
)
from sagan_kernels.swapping.report import Row, SwapReport
from sagan_kernels.swapping.spectral_norm import fix_spectral_norm
from sagan_kernels.swapping.spectral_norm_group import group_spectral_norms, ungroup_spectral_norms
from sagan_kernels.swapping.subclass import swap_class, unswap_class
from sagan_kernels.swapping.variants import Variant

ASSUMED_SIZE = (64, 64)
"""Height and width of the feature map for which the report states memory where no inputs are given."""


def swap_layers(
    model: nn.Module,
    *,
    attention: bool = True,
    spectral_norm: bool = True,
    verify: bool = True,
    strict: bool = False,
    faithful: bool = False,
    inputs: Sequence[Any] | None = None,
) -> SwapReport:
    """Make the layers of another project's GAN run our operators, in place, on their own parameters.

    A layer is recognized by names and structure, its project is not imported. Only its class changes, to a subclass of
    its own: parameters, state-dict keys, hooks, optimizers, `isinstance`, `nn.DataParallel`, DDP, deep copies, pickles
    and `torch.compile` go on as before. `unswap_layers` is the way back. A second call finds nothing more to do.

    Args:
        model: a network, or one layer. Anything around it, as DDP, may stay.
        attention: swap attention layers.
        spectral_norm: swap spectral norms.
        verify: run each layer and its swapped copy once in float64, on copies: outputs, gradients to the input and to
            every parameter, and the state afterwards, in training and eval mode, with every zero parameter made
            non-zero. A layer that differs stays as it was. Without it only layers known by name are swapped.
        strict: raise where anything that looks swappable is not, or nothing is; the model is then as it was.
        faithful: keep the bugs of a host's spectral norm, for a run that is to repeat old numbers.
        inputs: arguments of the model's forward. A copy of the model runs on them once, without gradients, to learn
            the sizes of the feature maps for which the report states memory; with `verify`, copies of the whole model
            are compared in float64 as well before spectral norms are grouped. None: memory at 64×64.

    Returns:
        What was swapped, what was not and why, errors and expected memory.

    Raises:
        TypeError: model is not a module.
        ValueError: with `strict`; or the model does not run on `inputs`.

    Warns:
        UserWarning: nothing in the model can be swapped.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"swap_layers: model must be a torch.nn.Module, got {type(model).__name__}; swap each network by itself"
        )
    sizes = _map_sizes(model, inputs) if inputs is not None else {}
    rows = list(_swap_attention(model, verify, sizes)) if attention else []
    if spectral_norm:
        rows += fix_spectral_norm(model, verify=verify, faithful=faithful)
    if strict and (skipped := [row for row in rows if row.status in ("refused", "unknown")]):
        _undo(model, rows)
        told = "; ".join(f"{row.path or '(the model)'}: {row.reason}" for row in skipped)
        raise ValueError(
            f"swap_layers: all that looks swappable must be swapped, got {told}; leave out strict to swap the rest"
        )
    if spectral_norm:
        rows += group_spectral_norms(model, verify=verify, inputs=inputs)
    report = SwapReport(type(model).__name__, tuple(rows))
    if not rows:
        if strict:
            raise ValueError(f"swap_layers: there must be something to swap, got {report}; leave out strict")
        warnings.warn(f"swap_layers: {report}", stacklevel=2)
    return report


def unswap_layers(model: nn.Module) -> nn.Module:
    """Undo `swap_layers`, exactly, and return the model.

    Raises:
        TypeError: model is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unswap_layers: model must be a torch.nn.Module, got {type(model).__name__}")
    ungroup_spectral_norms(model)
    for part in model.modules():
        _unswap(part)
    return model


def _undo(model: nn.Module, rows: Sequence[Row]) -> None:
    """Undo what this call has done; what was swapped before stays."""
    for row in rows:
        if row.status == "swapped":
            _unswap(model.get_submodule(row.path))


def _unswap(part: nn.Module) -> None:
    unswap_class(part)
    for hook in part._forward_pre_hooks.values():
        unswap_class(hook)


def _swap_attention(model: nn.Module, verify: bool, sizes: dict[str, tuple[int, int]]) -> Iterator[Row]:
    named: dict[str, Row] = {}  # called attention, and nothing else is known of them
    settled: list[str] = []
    for path, layer in list(model.named_modules()):
        if any(_inside(path, outer) for outer in settled):
            continue
        row = _swap_layer(path, layer, verify, sizes.get(path, ASSUMED_SIZE))
        if row is None:
            continue
        if row.status == "unknown" and not row.variant:
            named[path] = row
        else:
            settled.append(path)
            yield row
    for path, row in named.items():
        # a network named after its attention layers is not one
        if not any(_inside(inner, path) for inner in (*settled, *named)):
            yield row


def _swap_layer(path: str, layer: nn.Module, verify: bool, size: tuple[int, int]) -> Row | None:
    """Swap one module if it is an attention layer; None if it does not look like one."""
    row = partial(Row, path, type(layer).__name__, "attention")
    if isinstance(layer, SwappedAttention):
        return row(layer.swapped_form.name, "already swapped")
    if isinstance(layer, torch.jit.ScriptModule):
        if not recognize.called_attention(layer):
            return None
        return row("", "refused", "it is scripted; swap before torch.jit.script")
    if isinstance(layer, SelfAttention2d | PaperSelfAttention2d):
        return row("sagan_kernels", "kept", "it is ours")
    reason = recognize.not_ours(layer)
    if reason is not None:
        return row("", "not ours", reason)
    known = recognize.known_forms(layer)
    possible = list(recognize.possible_forms(layer))
    named = recognize.called_attention(layer)
    if not known and not possible:
        return row("", "unknown", "called attention, yet of no form known here") if named else None
    if not known and not verify:
        return (
            row("", "unknown", "not known by name; verify=True can prove what it computes") if named else None
        )
    if "forward" in layer.__dict__:
        return row(_name(known), "refused", REPLACED)
    if parametrize.is_parametrized(layer):
        return row(_name(known), "refused", "the layer itself is parametrized; swap before that")
    if not verify:
        return _swap_by_name(layer, known, row, size)
    try:
        variant, error = _proven_form(layer, known, possible)
    except NotComparable as refusal:
        if known:
            return row(_name(known), "refused", str(refusal))
        return row("", "unknown", str(refusal)) if named else None
    if error > TOLERANCE:
        if recognize.is_named(layer, variant):
            return row(variant.name, "refused", f"numbers differ by {error:.0e}", error=error)
        if known or named or recognize.has_softmax(layer):
            reason = f"no known form gives its numbers; they differ by {error:.0e} or more"
            return row("", "unknown", reason, error=error)
        return None  # projections and a gain, of which there are many kinds
    swap_class(layer, SwappedAttention, variant)
    return _swapped(layer, row, size, error)


def _swap_by_name(layer: nn.Module, known: list[Variant], row: Any, size: tuple[int, int]) -> Row:
    """Swap a layer of a class in the table. Whether it returns a map is asked of the layer itself."""
    named = [variant for variant in known if recognize.is_named(layer, variant)]
    if not named:
        reason = "its class is not known by name; verify=True can prove what it computes"
        return row(known[0].name, "refused", reason)
    try:
        with_map = returns_map(layer, _width(layer, named[0]))
    except NotComparable as refusal:
        return row(named[0].name, "refused", str(refusal))
    fitting = [variant for variant in named if variant.returns_map == with_map or variant.map_flag]
    if not fitting:
        return row(named[0].name, "refused", "returns something else than the layer of that name")
    swap_class(layer, SwappedAttention, fitting[0])
    return _swapped(layer, row, size, None)


def _proven_form(layer: nn.Module, known: list[Variant], possible: list[Variant]) -> tuple[Variant, float]:
    """The first form that gives the layer's numbers, else the first one and its difference."""
    forms = [*known, *possible]
    twin = float64_copy(layer)
    for variant in known:
        if variant.map_flag is not None:
            setattr(twin, variant.map_flag, False)
    host = Recording(twin, _width(layer, forms[0]))
    errors: dict[Variant, float] = {}
    for variant in forms:
        if variant.returns_map == host.returns_map:
            error = host.difference_to(partial(swap_class, mixin=SwappedAttention, form=variant))
            if error <= TOLERANCE:
                return variant, error
            errors[variant] = error
    return next(iter(errors.items()), (forms[0], float("inf")))


def _swapped(layer: nn.Module, row: Any, size: tuple[int, int], error: float | None) -> Row:
    """The row of a layer that was swapped."""
    variant: Variant = layer.swapped_form  # type: ignore[assignment]
    if variant.map_flag is not None and getattr(layer, variant.map_flag):
        reason = (
            f"asked for its map, it runs the host's code; it saves memory when {variant.map_flag} is False"
        )
        return row(variant.name, "swapped", reason, error)
    paths = (variant.query, variant.key, variant.value)
    if any(isinstance(getattr(layer, path.partition(".")[0]), nn.Sequential) for path in paths):
        return row(variant.name, "swapped", "", error)  # whatever pools in there makes the map smaller
    saved = _saved(layer, variant, size)
    return row(variant.name, "swapped", "", error, size, saved)


def _width(layer: nn.Module, variant: Variant) -> int:
    """Channels of the layer's input."""
    name = variant.query.partition(".")[0]
    return next(p.width_in for p in recognize.projections(layer) if p.name == name)


def _map_sizes(model: nn.Module, inputs: Sequence[Any]) -> dict[str, tuple[int, int]]:
    """Height and width of what every module got, by path."""
    sizes: dict[str, tuple[int, int]] = {}

    def note(path: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].ndim == 4:
            sizes[path] = (args[0].shape[2], args[0].shape[3])

    twin = safe_copy(model).eval()
    remove_watchers(twin)
    for path, part in twin.named_modules():
        if not isinstance(part, torch.jit.ScriptModule):
            part.register_forward_pre_hook(partial(note, path))
    devices = list({p.device for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            twin(*tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, tuple(inputs)))
        except Exception as error:
            told = " ".join(str(error).split())
            raise ValueError(
                f"swap_layers: inputs must be arguments of {type(model).__name__}.forward, got {told}; leave them"
                f" out for memory at {ASSUMED_SIZE[0]}×{ASSUMED_SIZE[1]}"
            ) from error
    return sizes


def _saved(layer: nn.Module, variant: Variant, size: tuple[int, int]) -> int:
    """Bytes per image of the scores and of the map, which the host stores, less what is stored here."""
    H, W = size
    L, S = H * W, (H // 2) * (W // 2) if variant.pool else H * W
    parameter = next(layer.parameters())
    stored = parameter.device.type == "cpu" and stores_map(1, L, S)
    return (1 if stored else 2) * L * S * parameter.element_size()


def _name(known: list[Variant]) -> str:
    return known[0].name if known else ""


def _inside(path: str, outer: str) -> bool:
    return path != outer and (outer == "" or path.startswith(f"{outer}."))
