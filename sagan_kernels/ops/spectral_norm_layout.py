"""How a weight lies in memory as a matrix, and its normalization on a CPU without copies of it."""

import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Rule(NamedTuple):
    """How one weight is normalized.

    Attributes:
        dim: the dimension of the weight that counts the rows of its matrix; the others are the columns.
        order: "uv", u = n(W v) before v = n(Wᵀ u), as `torch.nn.utils.parametrizations.spectral_norm` does, or "vu",
            as `torch.nn.utils.spectral_norm` and BigGAN-PyTorch do.
        n_power_iterations: power iterations at a time.
        cap: divide by max(1, σ), as tf-gan does, instead of σ.
    """

    dim: int = 0
    order: Literal["uv", "vu"] = "uv"
    n_power_iterations: int = 1
    cap: bool = False


class Layout(NamedTuple):
    """A matrix (R, C) that lies in memory as (A, R, K), C = A·K, without gaps.

    The columns lie in memory as (C / inner, inner); as a vector v is stored they are (inner, C / inner). For
    contiguous weights inner = C, and both are the same.
    """

    A: int
    R: int
    K: int
    inner: int

    @property
    def C(self) -> int:
        """Columns."""
        return self.A * self.K


class Item(NamedTuple):
    """One weight to normalize, its vectors, its rule, and the dtype of the result."""

    weight: Tensor
    u: Tensor
    v: Tensor
    rule: Rule
    dtype: torch.dtype
    lies: Layout


@functools.lru_cache(maxsize=4096)
def layout(size: Sequence[int], stride: Sequence[int], dim: int) -> Layout | None:
    """The layout of a weight whose dimension `dim` counts the rows; None where it has gaps or another order."""
    in_memory = sorted((d for d, n in enumerate(size) if n != 1), key=lambda d: -stride[d])
    step = 1
    for d in reversed(in_memory):
        if stride[d] != step:
            return None
        step *= size[d]
    natural = [d for d, n in enumerate(size) if d != dim and n != 1]
    columns = [d for d in in_memory if d != dim]
    C = math.prod(size[d] for d in natural)
    if columns == natural:
        inner = C
    elif columns == natural[1:] + natural[:1]:  # channels_last
        inner = size[natural[0]]
    else:
        return None
    at = in_memory.index(dim) if dim in in_memory else 0
    A = math.prod(size[d] for d in in_memory[:at])
    return Layout(A, size[dim], C // A, inner)


def as_matrix(weight: Tensor, dim: int) -> Tensor:
    """The matrix (R, C) of `weight` with columns in the order of a stored v."""
    return (weight if dim == 0 else weight.movedim(dim, 0)).flatten(1)


def to_memory_order(v: Tensor, lies: Layout) -> Tensor:
    """A stored v in the order of the columns in memory."""
    return v if lies.inner == lies.C else v.view(lies.inner, -1).t().flatten()


def to_stored_order(v: Tensor, lies: Layout) -> Tensor:
    """The inverse of `to_memory_order`."""
    return v if lies.inner == lies.C else v.view(-1, lies.inner).t().flatten()


def divisor(sigma: float, cap: bool) -> float:
    """What W is divided by: σ; 1 for a zero weight; max(1, σ) with a cap."""
    return max(1.0, sigma) if cap else sigma or 1.0


def iterate_on_cpu(
    weight: Tensor, lies: Layout, u: Tensor, v: Tensor, columns_first: bool, iterations: int
) -> tuple[Tensor, Tensor, float]:
    """New u, new v in memory order, and σ, after `iterations` power iterations; σ of u and v as they are after none.

    The vectors may be those given: who keeps them must copy them. float16 and bfloat16 are computed in float32. Norms
    are float64 where it matters: 1e±20 squared has no float32.
    """
    half = weight.dtype in (torch.float16, torch.bfloat16)
    if half:
        weight, u, v = weight.float(), u.float(), v.float()
    A, R, K, _ = lies
    if A == 1 or K == 1:
        matrix = weight.as_strided((R, A * K), (K, 1) if A == 1 else (1, R))
    else:  # products over (A, R, K) as it lies are slower than this copy
        matrix = weight.as_strided((R, A, K), (K, R * K, 1)).reshape(R, A * K)
    v = to_memory_order(v, lies)
    if not iterations:
        return u, v, torch.dot(u, torch.mv(matrix, v)).item()
    for _ in range(iterations):
        if columns_first:
            v, _ = _unit(torch.mv(matrix.t(), u), v)
            u, sigma = _unit(torch.mv(matrix, v), u)
        else:
            u, _ = _unit(torch.mv(matrix, v), u)
            v, sigma = _unit(torch.mv(matrix.t(), u), v)
    return u, v, sigma


def gradient_on_cpu(
    grad: Tensor, out: Tensor, weight: Tensor, lies: Layout, u: Tensor, v: Tensor, sigma: float, cap: bool
) -> Tensor:
    """The gradient of <W/σ, grad> for W, (grad - <grad, W/σ> u vᵀ)/σ; v in memory order."""
    result = torch.empty_like(weight)
    if grad.stride() != weight.stride():
        grad = torch.empty_like(weight).copy_(grad)
    if sigma == 0 or (cap and sigma < 1):
        return result.copy_(grad)
    sums = torch.float64 if weight.dtype == torch.float64 else torch.float32
    flat, into, out = (t.as_strided((weight.numel(),), (1,)) for t in (grad, result, out))
    flat = flat.to(sums)
    dot = torch.dot(flat, out.to(sums)).item()
    if lies.A == 1 or lies.K == 1:
        left, right = (u, v) if lies.A == 1 else (v, u)
        shape = (left.numel(), right.numel())
        target = into.view(shape) if into.dtype == sums else None
        term = torch.addr(flat.view(shape), left, right, beta=1 / sigma, alpha=-dot / sigma, out=target)
    else:
        term = flat.view(lies.A, lies.R, lies.K) / sigma
        term.addcmul_(u[None, :, None], v.view(lies.A, 1, lies.K), value=-dot / sigma)
        target = None
    if target is None:
        into.copy_(term.view(-1))
    return result


def _unit(raw: Tensor, old: Tensor) -> tuple[Tensor, float]:
    """The product divided by its norm, and the norm; what was there before where the product vanished."""
    square = torch.dot(raw, raw).item()
    # where float32 loses squares, as those of 1e-20, or has none, as those of 1e20
    exact = 1e-24 < square < 1e30
    norm = math.sqrt(square) if exact else torch.linalg.vector_norm(raw, dtype=torch.float64).item()
    return (raw.div_(norm) if norm else old), norm
