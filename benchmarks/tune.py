"""Search tilings on the GPU at hand: python -m benchmarks.tune --minutes 20 [--arithmetic half tf32 tf32x3].

For every kernel and every pair of widths that `sagan_kernels/ops/configs.py` tells apart, runs candidate tilings,
leaves out those that are wrong against float64 or do not compile, and times the rest. Prints the tables in the form in
which configs.py holds them, with their origin. What the time does not reach keeps the tiling it has, and is listed.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import measuring
from sagan_kernels import reference
from sagan_kernels.ops import attention_launch, configs

BLOCKS = (16, 32, 64, 128)
DTYPES = {"half": "bfloat16", "tf32": "tf32", "tf32x3": "float32", "ieee": "float32"}
Timer = Callable[[Callable[[], Any]], float]


@dataclass
class Found:
    """The search for one kernel at one pair of widths: milliseconds by tiling, and why others were left out."""

    times_ms: dict[tuple[int, int], float]
    refused: dict[tuple[int, int], str]

    @property
    def best(self) -> tuple[int, int] | None:
        """The fastest tiling that is right."""
        return min(self.times_ms, key=self.times_ms.__getitem__, default=None)


@dataclass(frozen=True)
class Problem:
    """What a kernel is to compute: `run` launches it, `expected` is float64's answer, `tolerance` its error."""

    run: Callable[[], Any]
    expected: list[Tensor]
    tolerance: float


def main() -> None:
    """Search and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument(
        "--arithmetic", nargs="+", choices=["half", "tf32", "tf32x3"], default=["half", "tf32x3"]
    )
    parser.add_argument(
        "--length", type=int, default=4096, help="query positions; keys are a quarter of them"
    )
    parser.add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune: needs a GPU, got none; tables without one come from benchmarks/static_report.py")
    device = torch.device("cuda")
    arch = configs.architecture(device)
    size = (arguments.batch, arguments.length, arguments.length // 4)
    for i, arithmetic in enumerate(arguments.arithmetic):
        deadline = time.monotonic() + 60 * arguments.minutes / len(arguments.arithmetic)
        table = configs._TABLES[arithmetic, arch]
        with measuring.arithmetic(DTYPES[arithmetic]):
            dtype = measuring.DTYPES[DTYPES[arithmetic]]
            tuned, kept = tune(
                table,
                lambda kernel, E, Ev, t=dtype: problem(kernel, *size, E, Ev, t, device),
                median_ms,
                deadline,
            )
        print(("\n" if i else "") + rendered(tuned, arithmetic, arch, origin(measuring.environment(), size)))
        for kernel, E, Ev in kept:
            print(f"# not reached, as before: {kernel}, keys to {E}, values to {Ev}")


def tune(
    table: configs._Table,
    make: Callable[[configs.Kernel, int, int], Problem],
    timer: Timer,
    deadline: float,
    blocks: Iterable[int] = BLOCKS,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[configs._Table, list[tuple[str, int, int]]]:
    """The table with the best tilings, and the rows that the deadline left as they were.

    Args:
        table: rows (widest key, widest value, block_l, block_s) by kernel.
        make: the problem for a kernel at these widths.
        timer: milliseconds of a call.
        deadline: when to stop, by `clock`; each row gets an equal part of what is left.
        blocks: sides a tile may have.
        clock: seconds.
    """
    blocks = tuple(blocks)
    rows = [(kernel, row) for kernel, rows in table.items() for row in rows]
    tuned: dict[configs.Kernel, list[tuple[int, int, int, int]]] = {kernel: [] for kernel in table}
    kept = []
    for done, (kernel, (E, Ev, block_l, block_s)) in enumerate(rows):
        now = clock()
        until = now + (deadline - now) / (len(rows) - done)
        best = None
        if now < deadline:
            # nearest to the present choice first: the budget may end the search
            candidates = sorted(
                itertools.product(blocks, repeat=2),
                key=lambda c, at=(block_l, block_s): (
                    abs(c[0].bit_length() - at[0].bit_length()) + abs(c[1].bit_length() - at[1].bit_length())
                ),
            )
            best = search(kernel, make(kernel, E, Ev), candidates, timer, until, clock).best
        if best is None:
            kept.append((kernel, E, Ev))
        tuned[kernel].append((E, Ev, *(best or (block_l, block_s))))
    return {kernel: tuple(rows) for kernel, rows in tuned.items()}, kept


def search(
    kernel: configs.Kernel,
    problem: Problem,
    candidates: Iterable[tuple[int, int]],
    timer: Timer,
    until: float,
    clock: Callable[[], float] = time.monotonic,
) -> Found:
    """Time each candidate that computes what it should, until the clock says stop; the first is always tried."""
    found = Found({}, {})
    for candidate in candidates:
        if (found.times_ms or found.refused) and clock() >= until:
            break
        with using(kernel, candidate):
            try:
                results = measuring.tensors(problem.run())
                error = max(measuring.relative_errors(results, problem.expected))
            except Exception as refusal:  # too much shared memory, or a compiler that gives up
                found.refused[candidate] = measuring.reason(refusal)
                continue
            if not error <= problem.tolerance:
                found.refused[candidate] = f"error {error:.1e}"
                continue
            found.times_ms[candidate] = timer(problem.run)
    return found


def using(kernel: configs.Kernel, candidate: tuple[int, int]) -> Any:
    """A context in which `kernel`, and no other, has this tiling."""
    chosen = configs.tiling

    def tiling(name: configs.Kernel, *widths: Any) -> configs.Tiling:
        return configs.Tiling(*candidate) if name == kernel else chosen(name, *widths)

    return mock.patch.object(configs, "tiling", tiling)


def problem(
    kernel: configs.Kernel, B: int, L: int, S: int, E: int, Ev: int, dtype: torch.dtype, device: torch.device
) -> Problem:
    """Random inputs for `kernel`, and what it must give."""
    generator = torch.Generator().manual_seed(0)
    Ev = Ev or 16  # the kernel that sums exponentials alone takes no values

    def random(rows: int, width: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(B, rows, width, generator=generator)).to(device, dtype)

    q, k, v, g = random(L, E, E**-0.25), random(S, E, E**-0.25), random(S, Ev), random(L, Ev)
    a, b, c = random(L, E), random(S, E), random(S, Ev)
    exact = [t.double().requires_grad_() for t in (q, k, v, g)]
    along = tuple(t.double() for t in (a, b, c))
    tolerance = measuring.TOLERANCES["bfloat16" if dtype.itemsize == 2 else "tf32"]
    if kernel in ("lse", "over_queries"):
        expected = [reference.attention(*exact[:3], normalize="queries").detach()]
        return Problem(lambda: attention_launch.over_queries(q, k, v), expected, tolerance)
    out, lse = attention_launch.forward(q, k, v)
    if kernel == "forward":
        expected = [reference.attention(*exact[:3]).detach()]
        return Problem(lambda: attention_launch.forward(q, k, v)[0], expected, tolerance)
    if kernel == "tangent":
        _, tangent = torch.func.jvp(reference.attention, tuple(t.detach() for t in exact[:3]), along)
        return Problem(lambda: attention_launch.tangent(q, k, v, out, lse, a, b, c), [tangent], tolerance)
    slopes = torch.autograd.grad(reference.attention(*exact[:3]), exact[:3], exact[3], create_graph=True)
    if kernel in ("row", "column"):
        expected = [slope.detach() for slope in slopes]
        return Problem(lambda: attention_launch.backward(q, k, v, out, lse, g), expected, tolerance)
    second = torch.autograd.grad(sum((s * t).sum() for s, t in zip(slopes, along, strict=True)), exact)
    dq = slopes[0].detach().to(dtype)
    return Problem(
        lambda: attention_launch.double_backward(q, k, v, out, lse, g, dq, a, b, c), list(second), tolerance
    )


def median_ms(call: Callable[[], Any]) -> float:
    """The median of eleven calls, after one."""
    call()
    return statistics.median(measuring.time_ms(call) for _ in range(11))


def rendered(table: configs._Table, arithmetic: str, arch: str, came_from: str) -> str:
    """The table as it stands in configs.py, its origin above it."""
    name = f"_{arithmetic.upper()}_{arch.removeprefix('sm_').upper()}"
    rows = "".join(
        f'    "{kernel}": ({", ".join(str(row) for row in rows)}{"," if len(rows) == 1 else ""}),\n'
        for kernel, rows in table.items()
    )
    return f"# {came_from}\n{name}: _Table = {{\n{rows}}}"


def origin(run: dict[str, Any], size: tuple[int, int, int]) -> str:
    """Where a table came from, in a line."""
    B, L, S = size
    return (
        f"{run['device']}, torch {run['torch']}, triton {run.get('triton', 'none')}, {run['date']}, "
        f"B {B}, L {L}, S {S}: {run['command']}"
    )


if __name__ == "__main__":
    main()
