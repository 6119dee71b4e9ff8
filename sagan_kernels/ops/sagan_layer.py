"""Operators for the SAGAN layer's other parts: the pooled projection with its gradients, and the fused inference."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from sagan_kernels.ops import configs
from sagan_kernels.ops.attention_launch import current, input_precision, reach, triton_dtype

_ops = torch.ops.sagan_kernels


def project_pool(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The 2×2 max-pool of a 1×1 convolution in one Triton kernel: (B, C, H, W) -> (B, ⌊H/2⌋·⌊W/2⌋, K).

    Gradients: of every order; ties go to the first element of the window in scan order, as in `max_pool2d`.
    """
    if torch.compiler.is_compiling():
        return _ops.project_pool(x, weight, bias)[0]
    return _ProjectPool.apply(x, weight, bias)[0]


def sagan_forward(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor | None,
    key: Tensor,
    value: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    gamma: Tensor,
) -> Tensor:
    """X + gamma · out(attention(query(x), key, value)) in one Triton kernel, without gradients.

    x (B, C, H, W) with dense rows, key (B, S, E), value (B, S, Ev), weights (E, C) and (C, Ev). A fresh tensor.
    """
    return _ops.sagan_forward(x, query_weight, query_bias, key, value, out_weight, out_bias, gamma)


def _launch_project_pool(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    from sagan_kernels.kernels.sagan_layer import project_pool_kernel

    (B, C, H, W), K = x.shape, weight.shape[0]
    S = (H // 2) * (W // 2)
    pooled, argmax = _fake_project_pool(x, weight, bias)
    arithmetic = configs.arithmetic(x)
    tile = configs.projection_tiling(C, K, arithmetic, configs.architecture(x.device))
    with current(x.device):
        project_pool_kernel[B * -(-S // tile.block_s) * -(-K // tile.block_k),](
            x, weight, bias, pooled, argmax,
            S, W // 2, C, K,
            *x.stride(), *weight.stride(), *pooled.stride(),
            BLOCK_S=tile.block_s, BLOCK_K=tile.block_k, BLOCK_C=tile.block_c, HAS_BIAS=bias is not None,
            WIDE=(H + 1) * x.stride(2) + (W + 64) * x.stride(3) + (C + 64) * x.stride(1) >= 2**31,
            PRECISION=input_precision(arithmetic), ACC=triton_dtype(x),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return pooled, argmax


def _fake_project_pool(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    (B, _, H, W), K = x.shape, weight.shape[0]
    S = (H // 2) * (W // 2)
    stride = (S * K, K, 1) if x.stride(1) == 1 else (S * K, 1, S)
    return (
        x.new_empty_strided((B, S, K), stride),
        x.new_empty_strided((B, S, K), stride, dtype=torch.uint8),
    )


def _grad_project_pool(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, weight, argmax = ctx.saved_tensors
    full = _unpool(grad, argmax, x.shape[2:])
    grad_x = torch.einsum("bohw,oc->bchw", full, weight) if ctx.needs_input_grad[0] else None
    grad_weight = torch.einsum("bohw,bchw->oc", full, x) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, grad.sum((0, 1)) if ctx.needs_input_grad[2] else None


def _unpool(pooled: Tensor, argmax: Tensor, size: torch.Size) -> Tensor:
    """(B, S, K) -> (B, K, H, W): each value at its window's argmax, 0 elsewhere. Deterministic, unlike max_unpool2d."""
    H, W = size
    window = torch.arange(4, device=argmax.device)
    spread = torch.where(argmax[..., None] == window, pooled[..., None], 0)  # (B, S, K, 4)
    spread = spread.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, (H // 2, W // 2))
    return F.pad(F.pixel_shuffle(spread, 2), (0, W % 2, 0, H % 2))


def _save_project_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], output[1])


class _ProjectPool(Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return _ops.project_pool(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _save_project_pool(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:2], output[1])
        ctx.mark_non_differentiable(output[1])

    backward = staticmethod(_grad_project_pool)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None) -> tuple[Tensor, None]:
        x, weight, argmax = ctx.saved_tensors
        moved = torch.zeros((), dtype=x.dtype, device=x.device)
        if dx is not None:
            moved = moved + torch.einsum("bchw,oc->bohw", dx, weight)
        if dweight is not None:
            moved = moved + torch.einsum("bchw,oc->bohw", x, dweight)
        if moved.ndim:
            H, W = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
            windows = (
                F.pixel_unshuffle(moved[..., :H, :W], 2).unflatten(1, (-1, 4)).flatten(3)
            )  # (B, K, 4, S)
            moved = windows.permute(0, 3, 1, 2).gather(3, argmax.long()[..., None])[..., 0]
        moved = moved if dbias is None else moved + dbias
        return moved.expand(argmax.shape), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor | None) -> tuple[Any, Any]:
        n = info.batch_size
        x, weight, bias = args
        if in_dims[1] is None and in_dims[2] is None and x is not None:
            pooled, argmax = _ProjectPool.apply(x.movedim(in_dims[0] or 0, 0).flatten(0, 1), weight, bias)
            return (pooled.unflatten(0, (n, -1)), argmax.unflatten(0, (n, -1))), (0, 0)
        # a weight for every element: no kernel shares its reads, so one after the other loses nothing
        each = [
            _ProjectPool.apply(
                *(t if t is None or d is None else t.select(d, i) for t, d in zip(args, in_dims, strict=True))
            )
            for i in range(n)
        ]
        return (torch.stack([p for p, _ in each]), torch.stack([a for _, a in each])), (0, 0)


def _launch_sagan_forward(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor | None,
    key: Tensor,
    value: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    gamma: Tensor,
) -> Tensor:
    from sagan_kernels.kernels.sagan_layer import sagan_forward_kernel

    (B, C, H, W), (_, S, E), Ev = x.shape, key.shape, value.shape[2]
    L = H * W
    y = torch.empty_like(x)
    arithmetic = configs.arithmetic(x)
    tile = configs.layer_tiling(C, E, Ev, arithmetic, configs.architecture(x.device))
    assert tile is not None, "the caller asks configs first"
    x_strides, y_strides = ((t.stride(0), t.stride(3), t.stride(1)) for t in (x, y))
    with current(x.device):
        sagan_forward_kernel[B * -(-L // tile.block_l),](
            x, query_weight, query_bias, key, value, out_weight, out_bias, gamma, y,
            L, S,
            *x_strides, *query_weight.stride(), *key.stride(), *value.stride(), *out_weight.stride(), *y_strides,
            C=C, E=E, EV=Ev, BLOCK_E=configs.width_block(E), BLOCK_EV=configs.width_block(Ev),
            BLOCK_L=tile.block_l, BLOCK_S=tile.block_s, BLOCK_C=tile.block_c,
            EVEN_L=L % tile.block_l == 0, EVEN_S=S % tile.block_s == 0,
            HAS_QUERY_BIAS=query_bias is not None, HAS_OUT_BIAS=out_bias is not None,
            WIDE=max(reach(t) for t in (x.flatten(2).mT, key, value)) >= 2**31,
            PRECISION=input_precision(arithmetic), ACC=triton_dtype(x),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return y


_library = torch.library.Library("sagan_kernels", "FRAGMENT")
_library.define("project_pool(Tensor x, Tensor weight, Tensor? bias) -> (Tensor, Tensor)")
_library.impl("project_pool", _launch_project_pool, "CompositeExplicitAutograd")
torch.library.register_fake("sagan_kernels::project_pool", _fake_project_pool, lib=_library)
torch.library.register_autograd(
    "sagan_kernels::project_pool", _grad_project_pool, setup_context=_save_project_pool, lib=_library
)
_library.define(
    "sagan_forward(Tensor x, Tensor query_weight, Tensor? query_bias, Tensor key, Tensor value, Tensor out_weight,"
    " Tensor? out_bias, Tensor gamma) -> Tensor"
)
_library.impl("sagan_forward", _launch_sagan_forward, "CompositeExplicitAutograd")
torch.library.register_fake("sagan_kernels::sagan_forward", lambda x, *_: torch.empty_like(x), lib=_library)
