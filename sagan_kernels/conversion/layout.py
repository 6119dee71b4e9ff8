"""The arithmetic of a conversion: layouts of weights, and the vectors of a power iteration."""

import torch
import torch.nn.functional as F
from torch import Tensor


def to_channels_first(tensor: Tensor, kind: str) -> Tensor:
    """TensorFlow's layout of a weight, or of a vector over a layer's outputs, to PyTorch's.

    conv (H, W, C, K) -> (K, C, H, W); linear (C, K) -> (K, C); embedding as it is. A seed is a linear layer whose
    outputs are a 4×4 map, (4, 4, C) there and (C, 4, 4) here.
    """
    if tensor.ndim == 4:
        return tensor.permute(3, 2, 0, 1).contiguous()
    if tensor.ndim == 2 and kind in ("linear", "seed"):
        tensor = tensor.T
    if kind == "seed":
        tensor = tensor.unflatten(0, (16, -1)).transpose(0, 1).flatten(0, 1)
    return tensor.contiguous()


def to_channels_last(tensor: Tensor, kind: str) -> Tensor:
    """The inverse of `to_channels_first`."""
    if tensor.ndim == 4:
        return tensor.permute(2, 3, 1, 0).contiguous()
    if kind == "seed":
        tensor = tensor.unflatten(0, (-1, 16)).transpose(0, 1).flatten(0, 1)
    if tensor.ndim == 2 and kind in ("linear", "seed"):
        tensor = tensor.T
    return tensor.contiguous()


def iterate(weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """One power iteration from u (M,): v = n(Wᵀu), then u = n(W v), for W = weight as (M, N). In float64.

    BigGAN-PyTorch and the official code divide by σ = uᵀ W v of these in eval mode and keep neither.
    """
    matrix = weight.double().flatten(1)
    v = F.normalize(matrix.T @ u.double(), dim=0)
    return F.normalize(matrix @ v, dim=0).to(weight.dtype), v.to(weight.dtype)


def before(weight: Tensor, v: Tensor) -> Tensor:
    """The unit u (M,) with n(Wᵀu) = v, or nearest to it: the state one half iteration before v (N,).

    Exact when v lies in the row space of W, as it does after a forward pass with this very W.
    """
    matrix, v = weight.double().flatten(1), v.double()
    if len(matrix) <= len(v):
        u = torch.linalg.pinv(matrix @ matrix.T, hermitian=True) @ (matrix @ v)
    else:
        u = matrix @ (torch.linalg.pinv(matrix.T @ matrix, hermitian=True) @ v)
    return F.normalize(u, dim=0).to(weight.dtype)
