"""Operators for the SAGAN layer's other parts: the pooled projection with its gradients, and the fused inference."""

from typing import Any

import torch
from torch import Tensor

from sagan_kernels.ops import configs
from sagan_kernels.ops.attention_launch import input_precision, reach, triton_dtype
from sagan_kernels.ops.direct import DirectFunction, run
from sagan_kernels.ops.launching import Arguments, launch

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
    return run(
        _ops.sagan_forward, _launch_sagan_forward,
        x, query_weight, query_bias, key, value, out_weight, out_bias, gamma,
    )  # fmt: skip


def _launch_project_pool(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    from sagan_kernels.kernels.sagan_layer import project_pool_kernel

    bias = None if bias is None else bias.contiguous()  # the kernel takes no stride for it
    pooled, argmax = _fake_project_pool(x, weight, bias)
    arithmetic = configs.arithmetic(x)
    kind = (arithmetic, x.shape, x.stride(), weight.shape, weight.stride())

    def arguments() -> Arguments:
        (B, C, H, W), K, S = x.shape, weight.shape[0], pooled.shape[1]
        tile = configs.projection_tiling(C, K, arithmetic, configs.architecture(x.device))
        numbers = (S, W // 2, C, K, *x.stride(), *weight.stride(), *pooled.stride())
        return (
            B * -(-S // tile.block_s) * -(-K // tile.block_k),
            numbers,
            {
                "BLOCK_S": tile.block_s, "BLOCK_K": tile.block_k, "BLOCK_C": tile.block_c,
                "HAS_BIAS": bias is not None,
                "WIDE": (H + 1) * x.stride(2) + (W + 64) * x.stride(3) + (C + 64) * x.stride(1) >= 2**31,
                "PRECISION": input_precision(arithmetic), "ACC": triton_dtype(x),
                "num_warps": tile.num_warps, "num_stages": tile.num_stages,
            },
        )  # fmt: skip

    launch(project_pool_kernel, (x, weight, bias, pooled, argmax), kind, arguments)
    return pooled, argmax


def _fake_project_pool(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    (B, _, H, W), K = x.shape, weight.shape[0]
    S = (H // 2) * (W // 2)
    stride = (S * K, K, 1) if x.stride(1) == 1 else (S * K, 1, S)
    return (
        x.new_empty_strided((B, S, K), stride),
        x.new_empty_strided((B, S, K), stride, dtype=torch.uint8),
    )


def mix(weight: Tensor, maps: Tensor) -> Tensor:
    """A 1×1 convolution as one product: (M, N) times (B, N, L) -> (B, M, L), which lies as `maps` does.

    cuDNN's gradients of such convolutions, the second ones above all, can take longer than the attention between them.
    """
    if maps.stride(1) == 1 and maps.stride(2) != 1:
        return (maps.mT @ weight.mT).mT
    return torch.bmm(weight.expand(maps.shape[0], -1, -1), maps)


def _correlate(left: Tensor, right: Tensor) -> Tensor:
    """Σ left rightᵀ over images and positions: (B, M, L) and (B, N, L) -> (M, N), the gradient of a `mix`."""
    (B, M, L), N = left.shape, right.shape[1]
    # reshape and not flatten, for which is_grads_batched has no rule
    if left.stride(1) == 1 and right.stride(1) == 1:
        return left.mT.reshape(B * L, M).mT @ right.mT.reshape(B * L, N)
    if M * N <= (M + N) * L:
        return torch.bmm(left, right.mT).sum(0)
    # many channels on few positions: copies are smaller than a product an image
    return left.transpose(0, 1).reshape(M, B * L) @ right.transpose(0, 1).reshape(N, B * L).mT


def _grad_project_pool(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, weight, argmax = ctx.saved_tensors
    full = _unpool(grad, argmax, *x.shape[2:])
    grad_x = mix(weight.mT, full).view(x.shape) if ctx.needs_input_grad[0] else None
    grad_weight = _correlate(full, x.flatten(2)) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, grad.sum((0, 1)) if ctx.needs_input_grad[2] else None


def _unpool(pooled: Tensor, argmax: Tensor, height: int, width: int) -> Tensor:
    """(B, S, K) -> (B, K, H·W): each value at its window's argmax, 0 elsewhere. Deterministic, unlike max_unpool2d."""
    if torch.compiler.is_compiling():
        return _ops.unpool(pooled, argmax, height, width)
    return _Unpool.apply(pooled, argmax, height, width)


def _take(full: Tensor, argmax: Tensor, height: int, width: int) -> Tensor:
    """(B, K, H·W) -> (B, S, K): the values at argmax; what `_unpool` does, transposed."""
    if torch.compiler.is_compiling():
        return _ops.take_pooled(full, argmax, height, width)
    return _Take.apply(full, argmax, height, width)


def _launch_unpool(pooled: Tensor, argmax: Tensor, height: int, width: int) -> Tensor:
    from sagan_kernels.kernels.sagan_layer import unpool_kernel

    full = _fake_unpool(pooled, argmax, height, width)
    kind = (height, width, pooled.shape, pooled.stride(), argmax.stride())

    def arguments() -> Arguments:
        B, S, K = pooled.shape
        L = height * width
        numbers = (L, width, S, width // 2, K, *pooled.stride(), *argmax.stride(), *full.stride())
        wide = max(reach(t) for t in (pooled, argmax, full.mT)) >= 2**31
        return B * -(-L // 64) * -(-K // 32), numbers, {"BLOCK_L": 64, "BLOCK_K": 32, "WIDE": wide}

    launch(unpool_kernel, (pooled, argmax, full), kind, arguments)
    return full


def _fake_unpool(pooled: Tensor, argmax: Tensor, height: int, width: int) -> Tensor:
    (B, _, K), L = argmax.shape, height * width
    return pooled.new_empty_strided((B, K, L), (L * K, 1, K) if argmax.stride(2) == 1 else (L * K, L, 1))


def _launch_take(full: Tensor, argmax: Tensor, height: int, width: int) -> Tensor:
    from sagan_kernels.kernels.sagan_layer import take_kernel

    pooled = _fake_take(full, argmax, height, width)
    kind = (height, width, full.shape, full.stride(), argmax.stride())

    def arguments() -> Arguments:
        B, S, K = pooled.shape
        numbers = (S, width, width // 2, K, *full.stride(), *argmax.stride(), *pooled.stride())
        wide = max(reach(t) for t in (pooled, argmax, full.mT)) >= 2**31
        return B * -(-S // 64) * -(-K // 32), numbers, {"BLOCK_S": 64, "BLOCK_K": 32, "WIDE": wide}

    launch(take_kernel, (full, argmax, pooled), kind, arguments)
    return pooled


def _fake_take(full: Tensor, argmax: Tensor, height: int, width: int) -> Tensor:
    return torch.empty_like(argmax, dtype=full.dtype)


def _save_argmax(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, argmax, *ctx.size = inputs
    ctx.save_for_backward(argmax)


def _save_project_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], output[1])


class _ProjectPool(DirectFunction):
    operator = "project_pool"

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return run(_ops.project_pool, _launch_project_pool, x, weight, bias)

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
            moved = moved + mix(weight, dx.flatten(2))
        if dweight is not None:
            moved = moved + mix(dweight, x.flatten(2))
        if moved.ndim:
            moved = _take(moved, argmax, *x.shape[2:])
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


class _Unpool(DirectFunction):
    operator = "unpool"

    @staticmethod
    def forward(pooled: Tensor, argmax: Tensor, height: int, width: int) -> Tensor:
        return run(_ops.unpool, _launch_unpool, pooled, argmax, height, width)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save_argmax(ctx, inputs, output)
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _take(grad, *ctx.saved_tensors, *ctx.size), None, None, None

    @staticmethod
    def jvp(ctx: Any, moved: Tensor, *_: None) -> Tensor:
        return _unpool(moved, *ctx.saved_tensors, *ctx.size)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        return _fold(_unpool, info.batch_size, in_dims, *args), 0


class _Take(DirectFunction):
    operator = "take_pooled"

    @staticmethod
    def forward(full: Tensor, argmax: Tensor, height: int, width: int) -> Tensor:
        return run(_ops.take_pooled, _launch_take, full, argmax, height, width)

    setup_context = _Unpool.setup_context

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _unpool(grad, *ctx.saved_tensors, *ctx.size), None, None, None

    @staticmethod
    def jvp(ctx: Any, moved: Tensor, *_: None) -> Tensor:
        return _take(moved, *ctx.saved_tensors, *ctx.size)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        return _fold(_take, info.batch_size, in_dims, *args), 0


def _fold(
    function: Any,
    n: int,
    in_dims: tuple[int | None, ...],
    tensor: Tensor,
    argmax: Tensor,
    height: int,
    width: int,
) -> Tensor:
    """Map over one more dimension by making it part of the batch."""
    folded = [
        (t.expand(n, *t.shape) if d is None else t.movedim(d, 0)).flatten(0, 1)
        for t, d in zip((tensor, argmax), in_dims, strict=False)
    ]
    return function(*folded, height, width).unflatten(0, (n, -1))


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

    y = torch.empty_like(x)
    # the kernel takes no strides for them
    query_bias, out_bias = (bias if bias is None else bias.contiguous() for bias in (query_bias, out_bias))
    arithmetic = configs.arithmetic(x)
    matrices = (query_weight, key, value, out_weight)
    kind = (arithmetic, x.shape, x.stride(), *[(matrix.shape, matrix.stride()) for matrix in matrices])

    def arguments() -> Arguments:
        (B, C, H, W), (_, S, E), Ev = x.shape, key.shape, value.shape[2]
        L = H * W
        tile = configs.layer_tiling(C, E, Ev, arithmetic, configs.architecture(x.device))
        assert tile is not None, "the caller asks configs first"
        x_strides, y_strides = ((t.stride(0), t.stride(3), t.stride(1)) for t in (x, y))
        strides = [stride for matrix in matrices for stride in matrix.stride()]
        return (
            B * -(-L // tile.block_l),
            (L, S, *x_strides, *strides, *y_strides),
            {
                "C": C, "E": E, "EV": Ev, "BLOCK_E": configs.width_block(E), "BLOCK_EV": configs.width_block(Ev),
                "BLOCK_L": tile.block_l, "BLOCK_S": tile.block_s, "BLOCK_C": tile.block_c,
                "EVEN_L": L % tile.block_l == 0, "EVEN_S": S % tile.block_s == 0,
                "HAS_QUERY_BIAS": query_bias is not None, "HAS_OUT_BIAS": out_bias is not None,
                "WIDE": max(reach(t) for t in (x.flatten(2).mT, key, value)) >= 2**31,
                "PRECISION": input_precision(arithmetic), "ACC": triton_dtype(x),
                "num_warps": tile.num_warps, "num_stages": tile.num_stages,
            },
        )  # fmt: skip

    tensors = (x, query_weight, query_bias, key, value, out_weight, out_bias, gamma, y)
    launch(sagan_forward_kernel, tensors, kind, arguments)
    return y


_library = torch.library.Library("sagan_kernels", "FRAGMENT")
_library.define("project_pool(Tensor x, Tensor weight, Tensor? bias) -> (Tensor, Tensor)")
_library.impl("project_pool", _launch_project_pool, "CompositeExplicitAutograd")
torch.library.register_fake("sagan_kernels::project_pool", _fake_project_pool, lib=_library)
torch.library.register_autograd(
    "sagan_kernels::project_pool", _grad_project_pool, setup_context=_save_project_pool, lib=_library
)
for _name, _body, _fake, _gradient in (
    ("unpool", _launch_unpool, _fake_unpool, _take),
    ("take_pooled", _launch_take, _fake_take, _unpool),
):
    _library.define(f"{_name}(Tensor values, Tensor argmax, int height, int width) -> Tensor")
    _library.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sagan_kernels::{_name}", _fake, lib=_library)
    torch.library.register_autograd(
        f"sagan_kernels::{_name}",
        lambda ctx, grad, g=_gradient: (g(grad, *ctx.saved_tensors, *ctx.size), None, None, None),
        setup_context=_save_argmax,
        lib=_library,
    )
_library.define(
    "sagan_forward(Tensor x, Tensor query_weight, Tensor? query_bias, Tensor key, Tensor value, Tensor out_weight,"
    " Tensor? out_bias, Tensor gamma) -> Tensor"
)
_library.impl("sagan_forward", _launch_sagan_forward, "CompositeExplicitAutograd")
torch.library.register_fake("sagan_kernels::sagan_forward", lambda x, *_: torch.empty_like(x), lib=_library)
