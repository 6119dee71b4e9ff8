"""The 1×1 projections of a host's attention layer: their weights, or their results."""

from typing import Any

from torch import Tensor, nn

from sagan_kernels.swapping.variants import WEIGHT_METHODS

_PLAIN = (nn.Conv2d, nn.Conv1d, nn.Linear)
_PLAIN_FORWARDS = tuple(kind.forward for kind in _PLAIN)


def has_weight(layer: nn.Module, path: str) -> bool:
    """Whether the projection at `path` is its weight and bias alone.

    False where it must be called: somebody watches it with hooks, or its forward is not a 1×1 product.
    """
    parts = _parts(layer, path)
    if any(_watched(part) for part in parts) or not is_pointwise(parts[-1]):
        return False
    return weight_method(parts[-1]) is not None or type(parts[-1]).forward in _PLAIN_FORWARDS


def weight_and_bias(layer: nn.Module, path: str) -> tuple[Tensor, Tensor | None]:
    """The weight that a call of the projection at `path` would use, and its bias.

    Computing it does what a call does, as often: hooks of spectral norm run, and so do the hosts' own methods.
    """
    part = _parts(layer, path)[-1]
    method = weight_method(part)
    if method is not None:
        return getattr(part, method)(), part.bias  # type: ignore[return-value]
    for hook in part._forward_pre_hooks.values():
        hook(part, ())
    return part.weight, part.bias  # type: ignore[return-value]


def call(layer: nn.Module, path: str, x: Tensor) -> Tensor:
    """The projection at `path` called as its host calls it: x (B, C, H, W) -> (B, E, H, W), or smaller if it pools."""
    part = getattr(layer, path.partition(".")[0])
    for inner in part.modules():
        if isinstance(inner, nn.Conv2d):
            break
        if isinstance(inner, nn.Conv1d):
            return part(x.flatten(2)).unflatten(2, x.shape[2:])
        if isinstance(inner, nn.Linear):
            return part(x.flatten(2).mT).mT.unflatten(2, x.shape[2:])
    return part(x)


def is_pointwise(part: nn.Module) -> bool:
    """Whether `part` is a convolution of kernel size 1, or a linear layer."""
    if isinstance(part, nn.Conv1d | nn.Conv2d):
        sides = (*part.kernel_size, *part.stride, part.groups)
        return set(sides) == {1} and part.padding not in ("same", "valid") and not any(map(int, part.padding))
    return isinstance(part, nn.Linear)


def weight_method(part: nn.Module) -> str | None:
    """The name of the method by which a host's own layer computes its weight; None if there is none."""
    return next((name for name in WEIGHT_METHODS if hasattr(type(part), name)), None)


def is_weight_hook(hook: Any) -> bool:
    """Whether a forward pre-hook only computes the module's weight, as torch.nn.utils and hosts' spectral norms do."""
    return type(hook).__module__.startswith("torch.nn.utils") or hasattr(type(hook), "compute_weight")


def _parts(layer: nn.Module, path: str) -> list[nn.Module]:
    """The modules along the path, the projection last."""
    parts = [layer]
    for name in path.split("."):
        parts.append(getattr(parts[-1], name))
    return parts[1:]


def _watched(part: nn.Module) -> bool:
    if part._forward_hooks or part._backward_hooks or part._backward_pre_hooks or "forward" in part.__dict__:
        return True
    return not all(is_weight_hook(hook) for hook in part._forward_pre_hooks.values())
