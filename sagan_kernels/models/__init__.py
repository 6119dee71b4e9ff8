"""SAGAN's generator and discriminator."""

import difflib
import inspect
from typing import Any

import torch

from sagan_kernels import zoo
from sagan_kernels.models.sagan import Discriminator, Generator

__all__ = ["Discriminator", "Generator", "create_model"]

_PARTS: dict[str, type[Generator] | type[Discriminator]] = {
    cls.part: cls for cls in (Generator, Discriminator)
}


def create_model(
    name: str, *, pretrained: bool = False, part: str = "generator", **overrides: Any
) -> Generator | Discriminator:
    """A network of the zoo.

    Args:
        name: a zoo entry, one of `list_models()`.
        pretrained: with its trained weights, in eval mode; otherwise freshly initialized, in training mode.
        part: "generator" or "discriminator".
        overrides: keyword arguments of the network that replace the entry's.

    Raises:
        ValueError: no such entry or part (with the nearest names), no weights where they are asked for, or an
            override that the weights do not fit.
        TypeError: an override is no keyword argument of the network.
    """
    if part not in _PARTS:
        raise ValueError(f"create_model: part must be one of {', '.join(_PARTS)}, got {part!r}")
    cls, entry = _PARTS[part], zoo.entry(name)
    known = list(inspect.signature(cls).parameters)
    for key in overrides.keys() - set(known):
        close = difflib.get_close_matches(key, known, n=1)
        advice = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
        raise TypeError(f"create_model: overrides must be arguments of {cls.__name__}, got {key!r}; {advice}")
    if not pretrained:
        return cls(**(getattr(entry, part) | overrides))
    model = cls.from_pretrained(name)
    with torch.random.fork_rng(devices=[]):
        meant = cls(**(model.config | overrides)).config if overrides else {}
    for key in overrides:
        if meant[key] != model.config[key]:
            raise ValueError(
                f"create_model: {key} must be {model.config[key]!r} with {name}'s weights, got {meant[key]!r}; "
                "leave it out, or take pretrained=False"
            )
    return model
