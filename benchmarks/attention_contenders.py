"""Who is timed at attention: as the peers write it, SDPA by back end, FlexAttention, torch.compile, and ours.

Each maker returns contenders by name; the first is the baseline, the last ours.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import peers
from benchmarks.measuring import BASELINE, OURS, Contender
from sagan_kernels.ops import attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
TASKS = ("forward", "forward + backward", "R1 step")


def of_core(task: str, tensors: list[Tensor]) -> dict[str, Contender]:
    """softmax(q kᵀ) v on query (B, L, E), key (B, S, E), value (B, S, Ev)."""
    return {
        name: _on_tensors(made, task, tensors) for name, made in _core_table(tensors[0].device.type).items()
    }


def of_layer(task: str, layer: torch.nn.Module, x: Tensor) -> dict[str, Contender]:
    """The whole layer, each contender on the same parameters."""
    forms: dict[str, tuple[Callable[[Any, Tensor], Tensor], str, bool]] = {BASELINE: (eager_layer, "", False)}
    for name, (core, note, compiles) in _core_table(x.device.type).items():
        if name not in (BASELINE, OURS, "torch.compile"):
            forms[name] = (functools.partial(layer_around, core), note, compiles)
    forms["torch.compile"] = (torch.compile(eager_layer, dynamic=False), "of the eager layer", True)
    forms[OURS] = (lambda layer, x: layer(x), "", False)
    grad = gradient_like(x)
    wanted = [x, *layer.parameters()]
    return {
        name: Contender(
            functools.partial(passes, task, functools.partial(form, layer, x), wanted, [x], grad),
            note,
            compiles,
        )
        for name, (form, note, compiles) in forms.items()
    }


def passes(
    task: str, forward: Callable[[], Tensor], wanted: list[Tensor], penalized: list[Tensor], grad: Tensor
) -> Any:
    """The output; the gradients of all of `wanted`; or those of the squared slope for `penalized`.

    The gradient that comes from above counts among the inputs of a slope: in a discriminator it depends on the layers
    that follow.
    """
    if task == "forward":
        with torch.no_grad():
            return forward()
    if task == "forward + backward":
        return torch.autograd.grad(forward(), wanted, grad)
    grad = grad.detach().requires_grad_()
    slopes = torch.autograd.grad(forward(), penalized, grad, create_graph=True)
    squared = sum(s.square().sum() for s in slopes)
    return torch.autograd.grad(squared, [*wanted, grad], materialize_grads=True)


def gradient_like(tensor: Tensor) -> Tensor:
    """The gradient that comes from above, always the same."""
    generator = torch.Generator(tensor.device).manual_seed(1)
    return torch.randn(tensor.shape, generator=generator, device=tensor.device).to(tensor.dtype)


def eager_layer(layer: Any, x: Tensor) -> Tensor:
    """The layer as other code bases write it."""
    return peers.attention(layer, x) if hasattr(layer, "out") else peers.paper_attention(layer, x)


def layer_around(core: Attention, layer: Any, x: Tensor) -> Tensor:
    """The layer with `core` in its middle."""
    key, value = layer.key(x), layer.value(x)
    if hasattr(layer, "out"):
        key, value = F.max_pool2d(key, 2), F.max_pool2d(value, 2)
    o = core(*(t.flatten(2).mT for t in (layer.query(x), key, value)))
    o = o.mT.unflatten(2, x.shape[2:])
    return torch.addcmul(x, layer.gamma, layer.out(o) if hasattr(layer, "out") else o)


def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Two products and a softmax, the map stored, as the peers write it."""
    return torch.bmm(F.softmax(torch.bmm(query, key.mT), -1), value)


def sdpa(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """SDPA, unscaled, one head; where it is fused contiguous, of equal widths that are multiples of 8.

    Raises:
        RuntimeError: the back end does not take these tensors.
    """
    tensors = [query, key, value]
    if backend != SDPBackend.MATH:
        width = -(-max(query.shape[2], value.shape[2]) // 8) * 8
        tensors = [F.pad(t, (0, width - t.shape[2])).contiguous() for t in tensors]
    with sdpa_kernel(backend), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            out = F.scaled_dot_product_attention(*(t.unsqueeze(1) for t in tensors), scale=1.0)
        except RuntimeError as error:  # it tells in warnings why each back end was refused
            said = [str(w.message).partition(" (Triggered")[0] for w in told]
            reasons = [why for why in said if not why.endswith(("because:", "runtime disabled."))]
            raise RuntimeError(" ".join([str(error), *reasons])) from None
    return out.squeeze(1)[..., : value.shape[2]]


def flex(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """FlexAttention, compiled; it takes widths from 16."""
    E = query.shape[2]
    query, key = (F.pad(t, (0, max(16 - E, 0))) for t in (query, key))
    width = value.shape[2]
    value = F.pad(value, (0, max(16 - width, 0)))
    tensors = (t.contiguous().unsqueeze(1) for t in (query, key, value))
    return _compiled_flex()(*tensors, scale=1.0).squeeze(1)[..., :width]


def _core_table(device: str) -> dict[str, tuple[Attention, str, bool]]:
    """For each contender: the function, what to know of it, whether it compiles."""
    backends = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA math": SDPBackend.MATH}
    if device == "cuda":
        backends["SDPA efficient"] = SDPBackend.EFFICIENT_ATTENTION
        backends["SDPA cuDNN"] = SDPBackend.CUDNN_ATTENTION
    table: dict[str, tuple[Attention, str, bool]] = {BASELINE: (eager, "", False)}
    for name, backend in backends.items():
        note = "stores the map" if backend == SDPBackend.MATH else "padded to equal widths"
        table[name] = (functools.partial(sdpa, backend), note, False)
    table["FlexAttention"] = (flex, "widths padded to 16", True)
    table["torch.compile"] = (torch.compile(eager, dynamic=False), "of eager", True)
    table[OURS] = (attention, "", False)
    return table


def _on_tensors(made: tuple[Attention, str, bool], task: str, tensors: list[Tensor]) -> Contender:
    core, note, compiles = made
    query, _, value = tensors
    grad = gradient_like(query.new_empty(*query.shape[:2], value.shape[2]))
    forward = functools.partial(core, *tensors)
    return Contender(functools.partial(passes, task, forward, tensors, tensors, grad), note, compiles)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
