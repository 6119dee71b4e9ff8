"""Spectral normalization: a weight divided by its largest singular value."""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm as SpectralNormHook

from sagan_kernels.ops.spectral_norm import normalize_one, power_iteration
from sagan_kernels.ops.spectral_norm_layout import Rule, as_matrix

WARM_START = 15
"""Power iterations at creation, as torch does."""


def spectral_norm(
    module: nn.Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    num_svs: int = 1,
    cap: bool = False,
) -> nn.Module:
    """Divide `module`'s parameter `name` by its spectral norm, estimated by power iterations in training.

    A drop-in for `torch.nn.utils.parametrizations.spectral_norm`: the same state-dict keys, u and v that move alike,
    the same results in evaluation. Loads checkpoints of `torch.nn.utils.spectral_norm` too (`weight_orig`, `weight_u`,
    `weight_v`). Faster on a CPU; for a GPU, see `group_spectral_norm`. Unlike torch's, a zero weight stays zero instead
    of NaN, weights of any scale are normalized, and an activation checkpoint's second forward does not iterate again.

    Args:
        module: a layer, changed in place. Linear, convolutions, transposed convolutions, Embedding, or any other.
        name: of the parameter. One of one dimension is divided by its length.
        n_power_iterations: at every access to the weight in training.
        eps: accepted as torch accepts it, and kept. Torch divides a vector shorter than eps by eps, so that weights of
            that scale become NaN; here it is normalized all the same, and eps matters for one dimension only.
        dim: the dimension that counts outputs. By default 1 for transposed convolutions and 0 for others.
        num_svs: singular values to follow, for `spectral_norms`. The weight is divided by the first. More than one adds
            buffers `_u1`, `_v1`, ... to the state dict.
        cap: divide by max(1, σ), as tf-gan does: weights that are small enough stay as they are.

    Returns:
        The same `module`.

    Raises:
        ValueError: no such parameter, a normalized one, one without values yet, or an argument out of range.
        TypeError: a sharded parameter (DTensor).

    Gradients: of every order, through W/σ; u and v are constants.

    Reference: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", arXiv:1802.05957; several
    singular values as BigGAN, arXiv:1809.11096.
    """
    where = f"spectral_norm: {type(module).__name__}.{name}"
    weight = _checked(module, name, where)
    if dim is None:
        dim = 1 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 0
    step = SpectralNorm(weight, n_power_iterations, dim, eps, num_svs, cap)
    parametrize.register_parametrization(module, name, step)
    module.register_load_state_dict_pre_hook(LegacyKeys(name))
    return module


class SpectralNorm(nn.Module):
    """The parametrization that `spectral_norm` registers: weight to weight / σ.

    Buffers: `_u` (R,) and `_v` (C,), estimates of the singular vectors of the weight as a matrix (R, C).
    """

    _u: Tensor
    _v: Tensor

    def __init__(
        self,
        weight: Tensor,
        n_power_iterations: int = 1,
        dim: int = 0,
        eps: float = 1e-12,
        num_svs: int = 1,
        cap: bool = False,
    ) -> None:
        super().__init__()
        _check("spectral_norm: n_power_iterations", "a whole number of at least 1", n_power_iterations, 1)
        _check("spectral_norm: num_svs", "a whole number of at least 1", num_svs, 1)
        if not (isinstance(eps, int | float) and math.isfinite(eps) and eps > 0):
            raise ValueError(f"spectral_norm: eps must be above 0, got {eps!r}; leave it at 1e-12")
        if isinstance(dim, bool) or not isinstance(dim, int) or not -weight.ndim <= dim < weight.ndim:
            raise ValueError(
                f"spectral_norm: dim must be one of the weight's {weight.ndim} dimensions, got {dim!r}; "
                "leave it at None to choose by the layer"
            )
        self.n_power_iterations = n_power_iterations
        self.dim = dim % weight.ndim
        self.eps = eps
        self.num_svs = num_svs
        self.cap = cap
        if weight.ndim == 1:
            if num_svs > 1 or cap:
                asked = f"num_svs={num_svs}" if num_svs > 1 else "cap=True"
                raise ValueError(f"spectral_norm: {asked} needs a matrix, got a weight of one dimension")
            return
        rows, columns = as_matrix(weight.detach(), self.dim).shape
        if num_svs > min(rows, columns):
            raise ValueError(
                f"spectral_norm: num_svs must be at most {min(rows, columns)} for a matrix ({rows}, {columns}), "
                f"got {num_svs}"
            )
        for i in range(num_svs):
            for letter, length in (("u", rows), ("v", columns)):
                vector = F.normalize(weight.detach().new_empty(length).normal_(0, 1), dim=0, eps=1e-30)
                self.register_buffer(_buffer(letter, i), vector)
        for _ in range(WARM_START):
            u, v = power_iteration(weight, self._u, self._v, Rule(self.dim))
            self._u.copy_(u)
            self._v.copy_(v)
            self.iterate_others(weight)

    @property
    def rule(self) -> Rule:
        """How the weight is normalized."""
        return Rule(self.dim, "uv", self.n_power_iterations, self.cap)

    def forward(self, weight: Tensor) -> Tensor:
        """Weight / σ. In training the power iterations come first, and move the buffers."""
        if weight.ndim == 1:
            return F.normalize(weight, dim=0, eps=self.eps)
        return self.normalized(weight, self.training and not in_backward())

    def right_inverse(self, value: Tensor) -> Tensor:
        """What is kept when the weight is assigned: the value itself, as torch does."""
        return value

    def normalized(self, weight: Tensor, iterate: bool) -> Tensor:
        """Weight / σ after power iterations or without any."""
        result = normalize_one(weight, self._u, self._v, self.rule, iterate)
        if iterate:
            self.iterate_others(weight)
        return result

    @torch.no_grad()
    def iterate_others(self, weight: Tensor) -> None:
        """One step for the second singular value and those after it, orthogonal to the ones before."""
        if self.num_svs == 1:
            return
        matrix = as_matrix(weight, self.dim).to(torch.promote_types(weight.dtype, torch.float32))
        us, vs = ([self._singular(letter, 0).to(matrix.dtype)] for letter in "uv")
        for i in range(1, self.num_svs):
            us.append(_orthogonal(torch.mv(matrix, self._singular("v", i).to(matrix.dtype)), us))
            vs.append(_orthogonal(torch.mv(matrix.t(), us[-1]), vs))
            self._singular("u", i).copy_(us[-1])
            self._singular("v", i).copy_(vs[-1])

    @torch.no_grad()
    def sigma(self, weight: Tensor) -> Tensor:
        """Estimates of the `num_svs` largest singular values of `weight`, float32 or wider, largest first."""
        if weight.ndim == 1:
            return torch.linalg.vector_norm(weight, keepdim=True)
        pairs = [(self._singular("u", i), self._singular("v", i)) for i in range(self.num_svs)]
        return torch.stack([bilinear(weight, self.dim, u, v) for u, v in pairs])

    def extra_repr(self) -> str:
        shown = [f"dim={self.dim}", f"n_power_iterations={self.n_power_iterations}"]
        shown += [f"num_svs={self.num_svs}"] * (self.num_svs > 1) + ["cap=True"] * self.cap
        return ", ".join(shown)

    def _singular(self, letter: str, i: int) -> Tensor:
        return self.get_buffer(_buffer(letter, i))


@dataclass(frozen=True, eq=False)
class Found:
    """One spectral-normed parameter of a model.

    Attributes:
        path: of the parameter, such as "blocks.0.conv.weight".
        module: the layer.
        name: of the parameter in the layer.
        step: what normalizes it: a parametrization, ours or torch's, or the hook of `torch.nn.utils.spectral_norm`.
    """

    path: str
    module: nn.Module
    name: str
    step: Any

    @property
    def hooked(self) -> bool:
        """Whether it is of `torch.nn.utils.spectral_norm`, the older form."""
        return isinstance(self.step, SpectralNormHook)

    @property
    def attached(self) -> bool:
        """Whether the layer still has the normalizer: torch's functions may have removed it."""
        if self.hooked:
            return f"{self.name}_orig" in self.module._parameters
        return parametrize.is_parametrized(self.module, self.name)

    @property
    def weight(self) -> Tensor:
        """The parameter before normalization."""
        if self.hooked:
            return getattr(self.module, f"{self.name}_orig")  # no parameter in a replica
        return self.module._modules["parametrizations"]._modules[self.name]._parameters["original"]  # type: ignore[return-value,union-attr]

    @property
    def u(self) -> Tensor:
        """(R,), kept in the state dict."""
        return self.module._buffers[f"{self.name}_u"] if self.hooked else self.step._buffers["_u"]  # type: ignore[return-value]

    @property
    def v(self) -> Tensor:
        """(C,), kept in the state dict."""
        return self.module._buffers[f"{self.name}_v"] if self.hooked else self.step._buffers["_v"]  # type: ignore[return-value]

    @property
    def rule(self) -> Rule:
        """How it is normalized."""
        step = self.step
        if self.hooked:
            return Rule(step.dim, "vu", step.n_power_iterations)
        return Rule(step.dim, "uv", step.n_power_iterations, getattr(step, "cap", False))

    @property
    def training(self) -> bool:
        """Whether a forward moves u and v."""
        return self.module.training if self.hooked else self.step.training

    @property
    def transient(self) -> bool:
        """Whether evaluation iterates too, from u and v that stay as they are."""
        return False


def find_spectral_norms(model: nn.Module) -> Iterator[Found]:
    """Every spectral-normed matrix of `model`: of `spectral_norm`, and of torch's parametrization and older hook."""
    for path, module in model.named_modules():
        yield from spectral_norms_of(module, path)


def spectral_norms_of(module: nn.Module, path: str = "") -> Iterator[Found]:
    """Those of one layer, without its children."""
    stem = f"{path}." if path else ""
    if parametrize.is_parametrized(module):
        for name, steps in module.parametrizations.items():  # type: ignore[operator,union-attr]
            kinds = SpectralNorm | parametrizations._SpectralNorm
            if len(steps) == 1 and isinstance(steps[0], kinds) and "_u" in steps[0]._buffers:
                yield Found(stem + name, module, name, steps[0])
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, SpectralNormHook):
            yield Found(stem + hook.name, module, hook.name, hook)


@torch.no_grad()
def spectral_norms(model: nn.Module) -> dict[str, Tensor]:
    """Estimates of the spectral norm of every spectral-normed parameter of `model`, for logging.

    Returns:
        Path of the parameter to (num_svs,) singular values of the weight before normalization, largest first, float32
        or wider, on the weight's device. From the stored u and v, so nothing moves, and exact once they have settled.
    """
    return {
        found.path: found.step.sigma(found.weight)
        if isinstance(found.step, SpectralNorm)
        else bilinear(found.weight, found.rule.dim, found.u, found.v)[None]
        for found in find_spectral_norms(model)
    }


def bilinear(weight: Tensor, dim: int, u: Tensor, v: Tensor) -> Tensor:
    """UᵀWv, in float32 or wider."""
    matrix = as_matrix(weight, dim).to(torch.promote_types(weight.dtype, torch.float32))
    return torch.dot(u.to(matrix.dtype), torch.mv(matrix, v.to(matrix.dtype)))


def in_backward() -> bool:
    """Whether a backward pass is running: an activation checkpoint computes its forward again there."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class LegacyKeys:
    """Renames the keys of `torch.nn.utils.spectral_norm` in a state dict that is being loaded."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        if not parametrize.is_parametrized(module, self.name):
            return
        stem = f"{prefix}parametrizations.{self.name}"
        renamed = {"orig": f"{stem}.original", "u": f"{stem}.0._u", "v": f"{stem}.0._v"}
        for suffix, key in renamed.items():
            if (old := f"{prefix}{self.name}_{suffix}") in state_dict:
                state_dict[key] = state_dict.pop(old)


def _checked(module: nn.Module, name: str, where: str) -> Tensor:
    if any(found.name == name for found in spectral_norms_of(module)):
        raise ValueError(
            f"{where}: must not be normalized already, got a spectral-normed one; leave it as it is"
        )
    weight = getattr(module, name, None)
    if not parametrize.is_parametrized(module, name) and name not in module._parameters:
        names = ", ".join(module._parameters) or "none"
        raise ValueError(f"{where}: must be a parameter, got none of that name; the layer has {names}")
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"{where}: must have values, got a lazy one; run the model once first")
    if weight is None or not weight.numel() or weight.ndim == 0 or not weight.is_floating_point():
        told = "None" if weight is None else f"shape {tuple(weight.shape)} of {weight.dtype}"
        raise ValueError(
            f"{where}: must be floating point, of one dimension or more and not empty, got {told}"
        )
    if is_sharded(weight):
        raise TypeError(f"{where}: {SHARDED}")
    return weight


SHARDED = (
    "must be a whole tensor, got a sharded one (DTensor or FSDP); the products with W need all of it: "
    "use DistributedDataParallel"
)


def is_sharded(weight: Tensor) -> bool:
    """Whether `weight` is a part of a weight (DTensor)."""
    tensor = sys.modules.get("torch.distributed.tensor")  # whoever has a DTensor has imported it
    return tensor is not None and isinstance(weight, tensor.DTensor)


def _check(where: str, must: str, got: Any, least: int) -> None:
    if isinstance(got, bool) or not isinstance(got, int) or got < least:
        raise ValueError(f"{where} must be {must}, got {got!r}")


def _buffer(letter: str, i: int) -> str:
    return f"_{letter}{i or ''}"


def _orthogonal(vector: Tensor, others: list[Tensor]) -> Tensor:
    """The unit vector along `vector`'s part that is orthogonal to `others`."""
    for other in others:
        vector = vector - torch.dot(other, vector) * other
    return F.normalize(vector, dim=0, eps=1e-30)
