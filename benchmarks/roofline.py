"""The least time a task can take on a device: bytes moved, products summed, exponentials taken.

The three ceilings are measured on the device at hand, never read from a data sheet. A task's bound is the slowest of
the three, as if they overlapped perfectly, so the fraction of it that is reached is below one.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Work:
    """What a task needs at least: bytes between memory and chip, floating-point operations, exponentials."""

    bytes: float
    flops: float
    exponentials: float

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.bytes + other.bytes, self.flops + other.flops, self.exponentials + other.exponentials
        )


@dataclass(frozen=True)
class Ceilings:
    """What a device reached, a second: bytes copied (read and written), operations by dtype, exponentials."""

    bytes: float
    flops: dict[str, float]
    exponentials: float


def bound_ms(work: Work, ceilings: Ceilings, dtype: str) -> tuple[float, str]:
    """The least time in milliseconds, and which resource sets it: "bytes", "products" or "exp"."""
    times = {
        "bytes": work.bytes / ceilings.bytes,
        "products": work.flops / ceilings.flops[dtype],
        "exp": work.exponentials / ceilings.exponentials,
    }
    slowest = max(times, key=times.__getitem__)
    return 1e3 * times[slowest], slowest


def attention_work(task: str, B: int, L: int, S: int, E: int, Ev: int, itemsize: int) -> Work:
    """The attention product's work: each input read once, each result written once, no map in memory.

    "forward" has two products and an exponential a score, the backward pass five products, the double backward pass
    (11 E + 7 Ev) multiply-adds and two exponentials.
    """
    scores = B * L * S
    tensors = itemsize * B * (L + S) * (E + Ev)  # query, key, value and out
    forward = Work(tensors, 2 * scores * (E + Ev), scores)
    # out and its gradient come in again, three gradients go out
    backward = Work(2 * tensors, 2 * scores * (3 * E + 2 * Ev), scores)
    double = Work(3 * tensors, 2 * scores * (11 * E + 7 * Ev), 2 * scores)
    return {
        "forward": forward,
        "forward + backward": forward + backward,
        "R1 step": forward + backward + double,
    }[task]


def layer_work(task: str, B: int, C: int, L: int, S: int, E: int, Ev: int, itemsize: int) -> Work:
    """The whole layer's work: x in, y out, and the products of the projections beside those of attention."""
    core = attention_work(task, B, L, S, E, Ev, itemsize)
    out = 0 if Ev == C else Ev
    projections = 2 * B * L * C * (2 * E + Ev + out)
    # the gradient of a projection is two products of its size; a second derivative doubles that
    passes = {"forward": (1, 2), "forward + backward": (3, 5), "R1 step": (7, 10)}[task]
    return Work(passes[1] * itemsize * B * C * L, core.flops + passes[0] * projections, core.exponentials)


def measure_ceilings(device: torch.device, dtypes: list[str]) -> Ceilings:
    """Copy a large tensor, multiply large matrices, take exponentials that stay on chip; the best of several runs."""
    from benchmarks import measuring

    gpu = device.type == "cuda"
    source = torch.ones(2**28 if gpu else 2**25, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() * source.element_size() / _best(functools.partial(target.copy_, source), gpu)
    del source, target
    n = 8192 if gpu else 1024
    flops = {}
    for dtype in dtypes:
        with measuring.arithmetic(dtype):
            a, b = (torch.randn(n, n, device=device).to(measuring.DTYPES[dtype]) for _ in range(2))
            flops[dtype] = 2 * n**3 / _best(functools.partial(torch.mm, a, b), gpu)
    return Ceilings(copied, flops, _exponentials_on_gpu() if gpu else _exponentials_on_cpu())


def _exponentials_on_cpu() -> float:
    x = torch.rand(2**16 * torch.get_num_threads())  # a thread's part fits its second-level cache
    out = torch.empty_like(x)

    def many() -> None:
        for _ in range(32):
            torch.exp(x, out=out)

    return 32 * x.numel() / _best(many, False)


def _exponentials_on_gpu() -> float:
    import triton
    import triton.language as tl

    @triton.jit
    def exponentials_kernel(out_ptr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = at.to(tl.float32) * -1e-9
        for _ in range(ROUNDS):
            x = tl.exp2(-x)
        tl.store(out_ptr + at, x)

    programs, rounds, block = 16384, 1024, 512
    out = torch.empty(programs * block, device="cuda")
    return (
        out.numel()
        * rounds
        / _best(lambda: exponentials_kernel[(programs,)](out, ROUNDS=rounds, BLOCK=block), True)
    )


def _best(call: Callable[[], Any], gpu: bool) -> float:
    """Seconds of the fastest of several calls."""
    call()
    times = []
    for _ in range(7):
        if gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
