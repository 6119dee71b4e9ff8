"""Spectral-normed layers to plain ones, and back."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, remove_spectral_norm
from torch.nn.utils import spectral_norm as hooked_spectral_norm
from torch.nn.utils.spectral_norm import SpectralNormLoadStateDictPreHook

from sagan_kernels.nn.spectral_norm import (
    Found,
    LegacyKeys,
    SpectralNorm,
    bilinear,
    find_spectral_norms,
    spectral_norm,
    spectral_norms_of,
)
from sagan_kernels.nn.spectral_norm_group import ungroup_spectral_norm

_FOLDED = "_folded_spectral_norms"  # attribute of a folded layer: name of the parameter to _Settings


def fold_spectral_norm(model: nn.Module, *, reversible: bool = False) -> nn.Module:
    """Bake W/σ into the weights of every spectral-normed layer of `model`, in place, and return it.

    Uses the stored u and v, so outputs equal the eval-mode model's to rounding. Groups are undone first. Optimizers
    still hold the parameters of before: fold a copy of a model in training.

    Args:
        model: with layers of `spectral_norm`, torch's parametrization or its older hook; others are left alone.
        reversible: keep what `unfold_spectral_norm` needs, as buffers `weight_sigma` (what W was divided by),
            `weight_u`, `weight_v` of each layer, which are saved with the state dict. Without it, the state dict is
            that of a network that never had spectral normalization.
    """
    ungroup_spectral_norm(model)
    for found in list(find_spectral_norms(model)):
        _fold(found, reversible)
    return model


def unfold_spectral_norm(model: nn.Module) -> nn.Module:
    """Undo `fold_spectral_norm(model, reversible=True)` in place, and return the model.

    Layers get back the kind of spectral normalization they had, with u, v and settings, and W to rounding. A folded
    checkpoint is loaded into a model that was folded alike, then unfolded.

    Raises:
        ValueError: nothing to unfold.
    """
    layers = [module for module in model.modules() if module.__dict__.get(_FOLDED)]
    if not layers:
        raise ValueError(
            f"unfold_spectral_norm: the model must have been folded with reversible=True, got {type(model).__name__} "
            "without such layers; load the weights of before folding"
        )
    for module in layers:
        for name, settings in module.__dict__.pop(_FOLDED).items():
            _unfold(module, name, settings)
    return model


class _Settings(NamedTuple):
    kind: str  # "own", "parametrization" or "hook"
    n_power_iterations: int
    eps: float
    dim: int
    num_svs: int = 1
    cap: bool = False


@torch.no_grad()
def _fold(found: Found, reversible: bool) -> None:
    module, name, rule, step = found.module, found.name, found.rule, found.step
    original, u, v = found.weight, found.u.clone(), found.v.clone()
    sigma = bilinear(original, rule.dim, u, v)
    divisor = sigma.clamp(min=1) if rule.cap else torch.where(sigma == 0, 1, sigma)
    weight = nn.Parameter((original / divisor).to(original.dtype), requires_grad=original.requires_grad)
    settings = _Settings("hook", rule.n_power_iterations, step.eps, rule.dim)
    if found.hooked:
        remove_spectral_norm(module, name)
        _remove_key_hooks(module, name)
    else:
        settings = settings._replace(kind="parametrization")
        if isinstance(step, SpectralNorm):
            settings = settings._replace(kind="own", num_svs=step.num_svs, cap=step.cap)
        _remove_parametrization(module, name)
    module.register_parameter(name, weight)
    if reversible:
        module.__dict__.setdefault(_FOLDED, {})[name] = settings
        for suffix, value in (("sigma", divisor), ("u", u), ("v", v)):
            module.register_buffer(f"{name}_{suffix}", value)


@torch.no_grad()
def _unfold(module: nn.Module, name: str, settings: _Settings) -> None:
    divisor, u, v = (module._buffers.pop(f"{name}_{suffix}") for suffix in ("sigma", "u", "v"))
    weight: Tensor = getattr(module, name)
    weight.mul_(divisor)  # type: ignore[arg-type]
    common: dict[str, Any] = {key: getattr(settings, key) for key in ("n_power_iterations", "eps", "dim")}
    with torch.random.fork_rng():  # the vectors that are drawn are replaced below
        if settings.kind == "own":
            spectral_norm(module, name, **common, num_svs=settings.num_svs, cap=settings.cap)
        else:
            make = hooked_spectral_norm if settings.kind == "hook" else parametrizations.spectral_norm
            make(module, name, **common)
    (found,) = (found for found in spectral_norms_of(module) if found.name == name)
    found.u.copy_(u)  # type: ignore[arg-type]
    found.v.copy_(v)  # type: ignore[arg-type]


def _remove_parametrization(module: nn.Module, name: str) -> None:
    """Take the parametrization of `name` off, and leave copies of the module as they are.

    torch.nn.utils.parametrize.remove_parametrizations deletes the property from a class that deep copies share, which
    breaks every one of them: this gives the module a class of its own.
    """
    _remove_key_hooks(module, name)
    del module.parametrizations[name]  # type: ignore[operator,union-attr]
    kind = type(module)
    if not parametrize.is_parametrized(module):
        del module.parametrizations
        module.__class__ = kind.__bases__[0]
        return
    kept = {key: value for key, value in vars(kind).items() if key not in (name, "__dict__", "__weakref__")}
    module.__class__ = type(kind.__name__, kind.__bases__, kept)


def _remove_key_hooks(module: nn.Module, name: str) -> None:
    """Take off what changes the keys of a state dict that is loaded; torch's `remove_spectral_norm` leaves its own."""
    for key, wrapped in list(module._load_state_dict_pre_hooks.items()):
        hook = getattr(wrapped, "hook", wrapped)
        ours = isinstance(hook, LegacyKeys) and hook.name == name
        if ours or (isinstance(hook, SpectralNormLoadStateDictPreHook) and hook.fn.name == name):
            del module._load_state_dict_pre_hooks[key]
