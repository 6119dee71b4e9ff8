"""Whether a swapped layer computes what its host computed: both run, on copies, in float64."""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from sagan_kernels.nn import SpectralNormGroup
from sagan_kernels.swapping.projections import is_weight_hook

TOLERANCE = 1e-10
"""Of a difference, relative to the largest element where that is over 1."""

NETWORK_TOLERANCE = 1e-8
"""Of a whole network, where rounding adds up from layer to layer."""

SIZES = ((6, 8), (8, 8))
"""Height and width of the random inputs: the first that the host takes, and no square where it can be avoided."""

WARM_UP = 10
"""Forwards before the comparison: spectral norm of a fresh layer may give weights so large that rounding shows."""


REPLACED = "its forward was replaced on the object; undo that, then swap"
"""Why a module is refused whose own attribute hides the forward of its class."""

GAINS = (-1.7, 1.3)
"""What parameters of one element are in the two batches: not what a clamp, a ReLU or an absolute value leaves alone."""


class NotComparable(Exception):
    """Why the two cannot be run beside each other."""


def safe_copy(module: nn.Module) -> Any:
    """A deep copy, also where a module holds results of a graph, as hooks of spectral norm leave them behind.

    `copy.deepcopy` refuses those; in the copy they are constants.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for value in (*part.__dict__.values(), *part._buffers.values()):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(module, memo)


def float64_copy(module: nn.Module) -> Any:
    """A copy on the CPU in which every parameter matters: no zeros, nothing frozen, no hooks that watch.

    A gain of zero hides every error behind it.

    Raises:
        NotComparable: the module has no values, or cannot be copied.
    """
    if any(t.is_meta for t in itertools.chain(module.parameters(), module.buffers())):
        raise NotComparable(
            "its tensors are on the meta device; load its weights first, or pass verify=False"
        )
    try:
        twin = safe_copy(module).to(device="cpu", dtype=torch.float64)
    except Exception as error:
        raise NotComparable(f"it cannot be copied ({told(error)})") from error
    remove_watchers(twin)
    for part in twin.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.5  # one that is 0 now may not be so later
    for buffer in twin._buffers.values():
        if buffer is not None and buffer.is_floating_point():
            buffer.mul_(1.25).add_(0.125)  # a temperature that is 1 now would hide itself
    generator = torch.Generator("cpu").manual_seed(1)
    for name, parameter in twin.named_parameters():
        if not parameter.any():
            parameter.data.normal_(generator=generator).add_(0.5)
        parameter.requires_grad_(not name.endswith(("_u", "_v", ".u", ".v")))
    return twin


def remove_watchers(module: nn.Module) -> None:
    """Take the hooks off that are neither a weight's normalization nor a group's: they are somebody's own."""
    for part in module.modules():
        for hooks in (
            part._forward_hooks,
            part._forward_pre_hooks,
            part._backward_hooks,
            part._backward_pre_hooks,
        ):
            for key, hook in list(hooks.items()):
                if not (
                    is_weight_hook(hook) or isinstance(getattr(hook, "__self__", None), SpectralNormGroup)
                ):
                    del hooks[key]


class Recording:
    """What a host's layer computes: outputs, gradients to the input and every parameter, and the state afterwards.

    In training and in eval mode, each on two batches after one another.

    Args:
        layer: a `float64_copy` of the host's layer; stays as it is.
        width: channels C of its input (B, C, H, W).

    Raises:
        NotComparable: the host does not run, its result is not finite, or its forward leaves something behind that a
            swapped one would not.
    """

    def __init__(self, layer: nn.Module, width: int) -> None:
        self.layer = safe_copy(layer).train()
        self.size = _accepted_size(self.layer, width)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for _ in range(WARM_UP):
                self.layer(_input(2, width, self.size))
            before = dict(self.layer.__dict__)
            self.layer(_input(2, width, self.size))
        kept = [key for key, value in self.layer.__dict__.items() if before.get(key, self) is not value]
        if kept:
            raise NotComparable(f"its forward keeps {', '.join(kept)}, which a swapped one would not")
        self.steps = []
        for training in (True, False):
            host = safe_copy(self.layer).train(training)
            batches = []
            for batch in (2, 3):
                x = _input(batch, width, self.size)
                _set_gains(host, batch)
                try:
                    parts = {what: [t.detach() for t in tensors] for what, tensors in _run(host, x)}
                except Exception as error:
                    raise NotComparable(f"it cannot be compared ({told(error)})") from error
                for what, tensors in parts.items():
                    if not all(t.isfinite().all() for t in tensors):
                        raise NotComparable(f"its {what} is not finite")
                batches.append((x, parts))
            self.steps.append((training, batches))
        self.returns_map = len(self.steps[0][1][0][1]["output"]) == 2

    def difference_to(self, swap: Callable[[nn.Module], None]) -> float:
        """The largest difference to a copy of the layer that `swap` has swapped.

        Relative where elements are over 1; infinity where a shape differs, or the swapped layer does not run.
        Ends at the first that is over `TOLERANCE`.
        """
        largest = 0.0
        for training, batches in self.steps:
            swapped = safe_copy(self.layer).train(training)
            swap(swapped)
            try:
                for x, theirs in batches:
                    _set_gains(swapped, len(x))
                    for what, ours in _run(swapped, x):
                        largest = max(largest, difference(theirs[what], ours))
                        if not largest <= TOLERANCE:
                            return largest
            except (RuntimeError, TypeError, ValueError):  # a form that the layer's tensors do not fit
                return float("inf")
        return largest


def returns_map(layer: nn.Module, width: int) -> bool:
    """Whether a layer returns two tensors instead of one, asked of a copy, on its own device.

    Raises:
        NotComparable: the layer does not run.
    """
    host = safe_copy(layer)
    remove_watchers(host)
    like = next(host.parameters())
    with torch.random.fork_rng(devices=[like.device] if like.is_cuda else []):
        return len(_tensors(host(_input(2, width, _accepted_size(host, width)).to(like)))) == 2


def network_difference(model: nn.Module, swap: Callable[[nn.Module], Any], inputs: Sequence[Any]) -> float:
    """The largest difference between a network and its copy that `swap` has swapped, in float64.

    Compared are outputs, gradients and the state afterwards, in training and in eval mode; random numbers are the same.
    What the forward does not use is left out.

    Raises:
        NotComparable: the network does not run in float64.
    """
    host = safe_copy(model).to(dtype=torch.float64)
    remove_watchers(host)
    devices = list({t.device for t in host.parameters() if t.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        host.train()
        try:
            for _ in range(WARM_UP):
                host(*_doubled(inputs))
        except Exception as error:
            raise NotComparable(f"the whole model does not run in float64 ({told(error)})") from error
    largest = 0.0
    for training in (True, False):
        twin = safe_copy(host)
        swap(twin)
        found: list[list[Tensor]] = []
        unused: tuple[str, ...] = ()
        for network in (safe_copy(host), twin):
            with torch.random.fork_rng(devices=devices), torch.enable_grad():
                torch.manual_seed(0)
                results = tree_leaves(network.train(training)(*_doubled(inputs)))
                outputs = [t.tensor() if hasattr(t, "tensor") else t for t in results]
                outputs = [t for t in outputs if isinstance(t, Tensor) and t.is_floating_point()]
                wanted = {name: p for name, p in network.named_parameters() if p.requires_grad}
                grads = dict(zip(wanted, gradients(outputs, list(wanted.values())), strict=True))
            if not found:
                unused = tuple(f"{name.rpartition('.')[0]}." for name, grad in grads.items() if grad is None)
            known = grads | network.state_dict(prefix="state ")
            kept = (t for name, t in known.items() if not name.removeprefix("state ").startswith(unused))
            found.append([t.detach().clone() for t in (*outputs, *kept) if isinstance(t, Tensor)])
        largest = max(largest, difference(*found))
    return largest


def difference(theirs: list[Tensor], ours: list[Tensor]) -> float:
    """The largest |theirs - ours|, relative where theirs is over 1; infinity where a shape differs, or for NaN."""
    if [t.shape for t in theirs] != [t.shape for t in ours]:
        return float("inf")
    largest = 0.0
    for a, b in zip(theirs, ours, strict=True):
        if a.numel():
            error = ((a - b.detach()).abs().max() / a.abs().max().clamp(min=1)).item()
            largest = max(largest, error if error == error else float("inf"))
    return largest


def gradients(outputs: list[Tensor], wanted: list[Tensor]) -> list[Tensor | None]:
    """Of a sum of the outputs in which every element has another factor; None where nothing depends on it."""
    loss: Any = 0.0
    for t in outputs:
        loss = loss + (t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype, device=t.device).view_as(t)).sum()
    if not wanted or not isinstance(loss, Tensor) or not loss.requires_grad:
        return [None] * len(wanted)
    return list(torch.autograd.grad(loss, wanted, allow_unused=True))


def told(error: Exception | None) -> str:
    """An error of a host on one line, not too long."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _set_gains(layer: nn.Module, batch: int) -> None:
    for parameter in layer._parameters.values():
        if parameter is not None and parameter.numel() == 1:
            parameter.data.fill_(GAINS[batch % 2])


def _accepted_size(host: nn.Module, width: int) -> tuple[int, int]:
    refused: Exception | None = None
    for size in SIZES:
        try:
            with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False), torch.no_grad():
                host(_input(2, width, size).to(next(host.parameters())))
        except Exception as error:
            refused = error
        else:
            return size
    raise NotComparable(f"it does not run on a {(2, width, *SIZES[-1])} input ({told(refused)})")


def _run(layer: nn.Module, x: Tensor) -> Iterator[tuple[str, list[Tensor]]]:
    """What a step through the layer gives, part by part, each computed when it is asked for."""
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False), torch.enable_grad():
        x = x.clone().requires_grad_()
        outputs = _tensors(layer(x))
        yield "output", outputs
        wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
        grads = zip(gradients(outputs, wanted), wanted, strict=True)
        yield "gradient", [torch.zeros_like(p) if grad is None else grad for grad, p in grads]
    yield "state", [t.detach().double().clone() for t in layer.state_dict().values() if isinstance(t, Tensor)]


def _tensors(result: Any) -> list[Tensor]:
    """A result as tensors; an attention map that is not computed yet is one."""
    parts = result if isinstance(result, tuple | list) else [result]
    return [p if isinstance(p, Tensor) else p.tensor() for p in parts]


def _input(batch: int, width: int, size: tuple[int, int]) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(batch)
    return torch.randn(batch, width, *size, dtype=torch.float64, generator=generator, device="cpu")


def _doubled(inputs: Sequence[Any]) -> Any:
    """The arguments in float64, each a tensor of its own, since a network may work in place."""
    return tree_map(
        lambda t: (t.double() if t.is_floating_point() else t).clone() if isinstance(t, Tensor) else t,
        tuple(inputs),
    )
