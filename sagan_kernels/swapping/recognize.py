"""Which modules look like attention, and the forms they may have: by name from the table, or by structure."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn

from sagan_kernels.ops.attention import Positions
from sagan_kernels.swapping.projections import is_pointwise
from sagan_kernels.swapping.variants import NOT_OURS, VARIANTS, Variant

_CALLED_ATTENTION = re.compile(r"[Aa]tte?n(?:tion)?(?![a-z])|[Nn][Oo][Nn]_?[Ll]ocal")


class Projection(NamedTuple):
    """A child of a layer that maps channels: its name, and how many come in and go out."""

    name: str
    width_in: int
    width: int


def known_forms(layer: nn.Module) -> list[Variant]:
    """Rows of the table whose names the layer has; those that name its class come first.

    What a class does with further arguments is known of that class only.
    """
    fitting = [variant for variant in VARIANTS if _fits(layer, variant)]
    named = [variant for variant in fitting if is_named(layer, variant)]
    return named + [replace(variant, ignores_rest=False) for variant in fitting if variant not in named]


def is_named(layer: nn.Module, variant: Variant) -> bool:
    """Whether the table names the layer's class for this variant."""
    return type(layer).__name__ in variant.classes


def possible_forms(layer: nn.Module) -> Iterator[Variant]:
    """Every form of the layer that its children's widths allow, whatever their names are.

    There must be three or four projections, and at most one parameter of one element. Nothing here says that the
    layer computes any of the forms: numbers have to prove it.
    """
    found = projections(layer)
    gains = [name for name, p in layer.named_parameters(recurse=False) if p.numel() == 1]
    if not 3 <= len(found) <= 4 or len(gains) > 1:
        return
    gamma = gains[0] if gains else None
    normalizations: tuple[Positions, ...] = ("keys", "queries")
    for outs in [None] if len(found) == 3 else found:
        inner = [p for p in found if p is not outs]
        for query, key, value in itertools.permutations(inner):
            C = query.width_in
            closes = value.width == C if outs is None else (outs.width_in, outs.width) == (value.width, C)
            if {key.width_in, value.width_in} != {C} or query.width != key.width or not closes:
                continue
            names = f"query={query.name}, key={key.name}, value={value.name}"
            for normalize, pool, scale, returns_map in itertools.product(
                normalizations,
                (False, True),
                dict.fromkeys((1.0, query.width**-0.5, C**-0.5)),
                (False, True),
            ):
                told = [names, *(["pooled"] if pool else []), *(["scaled"] if scale != 1 else [])]
                told += ["over queries"] if normalize == "queries" else []
                yield Variant(
                    f"by structure: {', '.join(told)}", (), query.name, key.name, value.name,
                    out=outs.name if outs else None, gamma=gamma, pool=pool, normalize=normalize, scale=scale,
                    returns_map=returns_map,
                )  # fmt: skip


def projections(layer: nn.Module) -> list[Projection]:
    """The children of `layer` whose only convolutions and linear layers are 1×1."""
    found = []
    for name, child in layer._modules.items():  # named_children leaves out one that is there twice
        if child is None:
            continue
        maps = [part for part in child.modules() if isinstance(part, _MAPS)]
        if maps and all(is_pointwise(part) for part in maps):
            found.append(Projection(name, _widths(maps[0])[0], _widths(maps[-1])[1]))
    return found


def not_ours(layer: nn.Module) -> str | None:
    """The reason why a module that is called attention is none of SAGAN's, where it is known."""
    for entry in NOT_OURS:
        if type(layer).__name__ in entry.classes and all(hasattr(layer, name) for name in entry.attributes):
            return entry.reason
    return None


def has_softmax(layer: nn.Module) -> bool:
    """Whether one of the layer's children is a softmax."""
    return any(isinstance(child, nn.Softmax | nn.Softmax2d) for child in layer.children())


def called_attention(layer: nn.Module) -> bool:
    """Whether the name of the module's class says attention."""
    name = getattr(layer, "original_name", type(layer).__name__)  # that of a scripted module is its own
    return _CALLED_ATTENTION.search(name) is not None


_MAPS = (nn.modules.conv._ConvNd, nn.Linear)


def _fits(layer: nn.Module, variant: Variant) -> bool:
    maps = {p.name for p in projections(layer)}
    paths = [path for path in (variant.query, variant.key, variant.value, variant.out) if path is not None]
    if any(path.partition(".")[0] not in maps for path in paths):
        return False
    for path in [*paths, *([variant.after] if variant.after else [])]:
        part: object = layer
        for name in path.split("."):
            part = getattr(part, name, None)
        if not isinstance(part, nn.Module):
            return False
    if isinstance(variant.scale, str) and not isinstance(getattr(layer, variant.scale, None), float):
        return False
    gamma = None if variant.gamma is None else getattr(layer, variant.gamma, None)
    return variant.gamma is None or (isinstance(gamma, Tensor) and gamma.numel() == 1)


def _widths(part: nn.Module) -> tuple[int, int]:
    if isinstance(part, nn.Linear):
        return part.in_features, part.out_features
    return part.in_channels, part.out_channels  # type: ignore[return-value]
