"""Search tilings on the GPU at hand: python -m benchmarks.tune --minutes 20 [--arithmetic half tf32x3 tf32].

For every kernel and the widths that SAGANs and BigGANs have, runs candidate tilings, leaves out those that are wrong
against float64 or do not compile, and times the tuned kernel alone; the fastest must be right at lengths that no tile
divides, too. Prints the tables in the form in which
`sagan_kernels/ops/configs.py` holds them, with their origin, after each arithmetic. Other processes compile ahead. What
the time does not reach keeps the tiling it has, and is listed.
"""

import argparse
import concurrent.futures
import contextlib
import copy
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import measuring
from sagan_kernels import reference
from sagan_kernels.files import write_atomically
from sagan_kernels.ops import attention_launch, configs, launching, sagan_layer

ATTENTION = (
    "forward", "row", "column", "double_row", "double_column", "tangent", "lse", "over_queries",
)  # fmt: skip
KERNELS = (*ATTENTION, "projection", "layer", "spectral_norm")
WIDTHS = ((16, 32), (16, 64), (32, 128), (16, 128), (32, 64), (64, 128))  # blocks of keys and of values
CHANNELS = (64, 128, 256)
TOGETHER = ({"row", "column"}, {"double_row", "double_column"})  # their values are cut alike
DTYPES = {"half": "bfloat16", "tf32": "tf32", "tf32x3": "float32", "ieee": "float32"}
MOST = 18  # candidates
Candidate = Any
"""A tiling of configs.py, of the kernel's kind."""
Timer = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Task:
    """A kernel to tune: attention's by widths of keys and values, others by channels in and out."""

    kernel: str
    arithmetic: configs.Arithmetic
    widths: tuple[int, int]
    size: tuple[int, int, int]  # B, L, S


@dataclass
class Found:
    """Milliseconds by tiling, the present one first, and why others were left out."""

    times_ms: dict[Candidate, float]
    refused: dict[Candidate, str]

    @property
    def best(self) -> Candidate | None:
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
        "--arithmetic",
        nargs="+",
        choices=["half", "tf32", "tf32x3"],
        default=["half", "tf32x3", "tf32"],
    )
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile ahead")
    parser.add_argument("--out", type=Path, help="all timings as JSON")
    parser.add_argument(
        "--length", type=int, default=4096, help="query positions; keys are a quarter of them"
    )
    parser.add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune: needs a GPU, got none; tables without one come from benchmarks/static_report.py")
    deadline = time.monotonic() + 60 * arguments.minutes
    device = torch.device("cuda")
    arch = configs.architecture(device)
    size = (arguments.batch, arguments.length, arguments.length // 4)
    everything = [
        planned(kernels, arithmetic, arch, size)
        for arithmetic, kernels in [
            *[(a, [k for k in KERNELS[:-1] if k in arguments.kernels]) for a in arguments.arithmetic],
            ("ieee", [k for k in KERNELS[-1:] if k in arguments.kernels]),
        ]
    ]
    everything = [tasks for tasks in everything if tasks]
    run, told = measuring.environment(), []
    with ahead(arguments.jobs) as compiler:
        compiler.submit([(task, candidates(task, arch)) for tasks in everything for task in tasks])
        compiler.started(min(120, 0.3 * (deadline - time.monotonic())))
        for i, tasks in enumerate(everything):
            arithmetic, left = tasks[0].arithmetic, sum(map(len, everything[i + 1 :]))
            now = time.monotonic()
            until = now + (deadline - now) * len(tasks) / (len(tasks) + left)
            with measuring.arithmetic(DTYPES[arithmetic]):
                found = tune(
                    [(task, candidates(task, arch)) for task in tasks],
                    lambda task: problem(task, device),
                    median_ms,
                    until,
                    compiler.wait,
                    elsewhere=lambda task, tile: wrong_elsewhere(task, tile, device),
                )
            if any(task.kernel in ATTENTION for task in tasks):
                table = merged(configs._TABLES[arithmetic, arch], found)
                print(rendered(table, arithmetic, arch, origin(run, size)))
            print("\n".join(line(task, result) for task, result in found.items()), flush=True)
            told += [stored(task, result) for task, result in found.items()]
            if arguments.out:
                text = json.dumps({"environment": run, "size": size, "rows": told}, indent=1)
                write_atomically(arguments.out, lambda path, text=text: path.write_text(text + "\n"))


def planned(
    kernels: Iterable[str], arithmetic: configs.Arithmetic, arch: configs.Arch, size: tuple[int, int, int]
) -> list[Task]:
    """The tasks of one arithmetic: widths that one launch takes, and layers that are fused."""
    tasks = []
    for kernel in kernels:
        if kernel == "spectral_norm":
            widths = [(0, 0)]
        elif kernel == "projection":
            widths = [(C, 5 * C // 8) for C in CHANNELS]
        elif kernel == "layer":
            widths = [
                (C, C)
                for C in CHANNELS
                if configs.layer_tiling(C, C // 8, C // 2, arithmetic, arch) is not None
            ]
        elif kernel == "lse":
            widths = [(E, 0) for E in sorted({E for E, _ in WIDTHS})]
        else:
            siblings = next((names for names in TOGETHER if kernel in names), {kernel})
            widths = [
                (E, Ev)
                for E, Ev in WIDTHS
                if all(configs.value_part(name, E, Ev, arithmetic, arch) == Ev for name in siblings)
            ]
        tasks += [Task(kernel, arithmetic, at, size) for at in widths]
    return tasks


def present(task: Task, arch: configs.Arch) -> Candidate:
    """The tiling that configs.py has."""
    a, b = task.widths
    if task.kernel == "projection":
        return configs.projection_tiling(a, b, task.arithmetic, arch)
    if task.kernel == "layer":
        return configs.layer_tiling(a, a // 8, a // 2, task.arithmetic, arch)
    if task.kernel == "spectral_norm":
        return configs.SPECTRAL_NORM
    return configs.tiling(task.kernel, a, b, task.arithmetic, arch)


def candidates(task: Task, arch: configs.Arch) -> list[Candidate]:
    """Tilings to try, the present one first and the nearest to it before others: time may end the search."""
    now = present(task, arch)
    if task.kernel == "spectral_norm":  # one number at a time
        spans = {
            "rows": (4, 8, 16), "row_span": (128, 256, 512), "columns": (32, 64, 128),
            "column_span": (16, 32, 64), "block": (1024, 2048, 4096), "warps": (4, 8),
        }  # fmt: skip
        return list(
            dict.fromkeys(
                [now, *(dataclasses.replace(now, **{k: v}) for k, values in spans.items() for v in values)]
            )
        )
    if task.kernel == "projection":
        tiles = (*itertools.product((16, 32, 64, 128), (32, 64), (16, 32, 64), (4, 8), (2, 3)),)
        tried = [configs.ProjectionTiling(*tile) for tile in tiles]
    elif task.kernel == "layer":
        tiles = (*itertools.product((64, 128), (32, 64, 128), (32, 64), (4, 8), (1, 2, 3)),)
        tried = [configs.LayerTiling(*tile) for tile in tiles]
    else:
        area = now.block_l * now.block_s
        tried = [
            configs.Tiling(block_l, block_s, warps, stages)
            for block_l, block_s in itertools.product((16, 32, 64, 128, 256), repeat=2)
            for warps, stages in itertools.product((4, 8), (1, 2, 3))
            if min(32 * 32, area) <= block_l * block_s <= 128 * 128
            and (warps == 4 or block_l * block_s >= 64 * 64)
            and max(block_l, block_s) <= max(128, now.block_l, now.block_s)
        ]

    def distance(tile: Candidate) -> float:
        pairs = zip(dataclasses.astuple(tile), dataclasses.astuple(now), strict=True)
        return sum(abs(math.log2(a / b)) for a, b in pairs)

    return [now, *sorted((tile for tile in tried if tile != now), key=distance)][:MOST]


def tune(
    plan: list[tuple[Task, list[Candidate]]],
    make: Callable[[Task], Problem],
    timer: Callable[[str, Callable[[], Any]], float],
    deadline: float,
    compiled: Callable[[Task, float], dict[Candidate, str]] = lambda task, seconds: {},
    clock: Callable[[], float] = time.monotonic,
    elsewhere: Callable[[Task, Candidate], str] = lambda task, tile: "",
) -> dict[Task, Found]:
    """What each task's search found; nothing for those that the deadline left out.

    Args:
        plan: tasks in order, each with its candidates.
        make: the problem of a task.
        timer: milliseconds that the kernel of a name takes in a call.
        deadline: when to stop, by `clock`; each task gets an equal part of what is left.
        compiled: waits for the task's candidates, at most so many seconds, and says which are not to be tried and why.
        clock: seconds.
        elsewhere: why a tiling that won is refused after all; empty where it is right.
    """
    found = {task: Found({}, {}) for task, _ in plan}
    for done, (task, tried) in enumerate(plan):
        now = clock()
        until = now + (deadline - now) / (len(plan) - done)
        refused = compiled(task, max(0, 0.7 * (until - now)))
        if now >= deadline:
            continue
        refused.pop(tried[0], None)  # what is used today is the measure of others, and runs
        try:
            posed = make(task)
        except Exception as error:
            found[task].refused[tried[0]] = measuring.reason(error)
            continue
        found[task] = search(
            task.kernel, posed, [c for c in tried if c not in refused], lambda call, k=task.kernel: timer(k, call),
            until, clock,
        )  # fmt: skip
        found[task].refused |= refused
        while (best := found[task].best) not in (None, tried[0]) and (why := elsewhere(task, best)):
            del found[task].times_ms[best]
            found[task].refused[best] = why
            if "illegal memory access" in why:
                break
        if lost := [tile for tile, why in found[task].refused.items() if "illegal memory access" in why]:
            print(
                f"tune: stopped at {task.kernel} {task.widths}: an illegal memory access, first of {lost[0]}, after "
                "which the device refuses all else; give the other kernels and arithmetics a run of their own",
                file=sys.stderr,
            )
            break
    return found


def search(
    kernel: str,
    problem: Problem,
    candidates: Iterable[Candidate],
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
                if error <= problem.tolerance:
                    found.times_ms[candidate] = timer(problem.run)
                else:
                    found.refused[candidate] = f"error {error:.1e}"
            except Exception as refusal:  # too much shared memory, or a compiler that gives up
                found.refused[candidate] = measuring.reason(refusal)
                if "illegal memory access" in found.refused[candidate]:
                    break
    return found


def wrong_elsewhere(
    task: Task,
    candidate: Candidate,
    device: torch.device,
    dtype: torch.dtype | None = None,
    size: tuple[int, int, int] = (2, 961, 225),
) -> str:
    """Why a tiling is wrong at lengths that no tile divides; empty where it is right."""
    posed = problem(dataclasses.replace(task, size=size), device, dtype)
    found = search(task.kernel, posed, [candidate], lambda call: 0.0, math.inf)
    return "".join(f"at {size}: {why}" for why in found.refused.values())


@contextmanager
def using(kernel: str, candidate: Candidate) -> Iterator[None]:
    """A context in which `kernel`, and no other, has this tiling, and column passes are not split."""
    chosen, splits = configs.tiling, configs.column_splits

    def tiling(name: configs.Kernel, *widths: Any) -> configs.Tiling:
        return candidate if name == kernel else chosen(name, *widths)

    patches: dict[str, Any] = {"tiling": tiling}
    if kernel in ("projection", "layer"):
        patches = {f"{kernel}_tiling": lambda *_: candidate}
    elif kernel == "spectral_norm":
        patches = {"SPECTRAL_NORM": candidate}
    launching.forget()
    try:
        with mock.patch.multiple(configs, column_splits=lambda *_: 1, **patches):
            yield
    finally:
        launching.forget()
        if hasattr(splits, "cache_clear"):
            splits.cache_clear()


def through(kernel: str, wrap: Callable[..., None]) -> AbstractContextManager[Any]:
    """A context in which launches of `kernel` are made by wrap(launch, *arguments)."""
    if kernel not in ATTENTION:
        real = sagan_layer.launch
        return mock.patch.object(sagan_layer, "launch", lambda *given: wrap(real, *given))
    real = attention_launch._launch

    def launch(compiled: Any, name: str, *rest: Any) -> None:
        if name == kernel:
            wrap(real, compiled, name, *rest)
        else:
            real(compiled, name, *rest)

    return mock.patch.object(attention_launch, "_launch", launch)


def median_ms(kernel: str, call: Callable[[], Any]) -> float:
    """The median over eleven calls of the time that the launches of `kernel` take, or all where it has no own."""
    if kernel == "spectral_norm":
        return statistics.median(_event_ms(lambda record: record(call)) for _ in range(11))

    def once(record: Callable[..., None]) -> None:
        with through(kernel, record):
            call()

    once(lambda launch, *given: launch(*given))
    return statistics.median(_event_ms(once) for _ in range(11))


def _event_ms(body: Callable[[Callable[..., None]], None]) -> float:
    pairs = []

    def record(launch: Callable[..., Any], *given: Any) -> None:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        launch(*given)
        after.record()
        pairs.append((before, after))

    measuring._overwrite_l2()
    torch.cuda._sleep(1_000_000)  # half a millisecond, in which the host gets ahead
    body(record)
    torch.cuda.synchronize()
    return sum(before.elapsed_time(after) for before, after in pairs)


class Ahead:
    """Compiles candidates in other processes, so that Triton's disk cache has them when they are timed."""

    def __init__(self, pool: concurrent.futures.Executor | None, compile_one: Callable[..., None]) -> None:
        self.pool, self.compile_one = pool, compile_one
        self.futures: dict[Task, dict[Candidate, concurrent.futures.Future[None]]] = {}

    def submit(self, plan: list[tuple[Task, list[Candidate]]]) -> None:
        """Queue all, in order. A pool that broke compiles nothing: then the timing process does."""
        with contextlib.suppress(concurrent.futures.BrokenExecutor):
            for task, tried in plan if self.pool else []:
                self.futures[task] = {c: self.pool.submit(self.compile_one, task, c) for c in tried}

    def started(self, seconds: float) -> None:
        """Wait for the first that is compiled."""
        futures = [future for of_task in self.futures.values() for future in of_task.values()]
        if futures:
            concurrent.futures.wait(futures, seconds, concurrent.futures.FIRST_COMPLETED)

    def wait(self, task: Task, seconds: float) -> dict[Candidate, str]:
        """Wait for the candidates of a task; what fails or is late is refused, and the late make room."""
        futures = self.futures.pop(task, {})
        concurrent.futures.wait(futures.values(), seconds)
        refused = {}
        for candidate, future in futures.items():
            if not future.done():
                future.cancel()
                refused[candidate] = "not compiled in time"
            elif (error := future.exception()) and not isinstance(error, concurrent.futures.BrokenExecutor):
                refused[candidate] = measuring.reason(error)
        return refused


@contextmanager
def ahead(jobs: int) -> Iterator[Ahead]:
    """An `Ahead` of so many processes, which are gone afterwards; none for 0."""
    if not jobs:
        yield Ahead(None, compile_ahead)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=_give_way
    )
    try:
        yield Ahead(pool, compile_ahead)
    finally:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()


def _give_way() -> None:
    torch.set_num_threads(1)
    if hasattr(os, "nice"):
        os.nice(5)  # the process that times launches goes first


def compile_ahead(task: Task, candidate: Candidate) -> None:
    """Compile one candidate as a launch would, for one image: nothing that a kernel is compiled for depends on more."""
    device = torch.device("cuda")
    if task.kernel == "spectral_norm":  # its kernels are the same for all weights
        with using(task.kernel, candidate):
            _spectral_norm([torch.nn.Linear(32, 16)], device)()
        return
    one = dataclasses.replace(task, size=(1, *task.size[1:]))

    def warm_up(kernel: Any, tensors: Any, kind: Any, arguments: Callable[[], launching.Arguments]) -> None:
        programs, numbers, named = arguments()
        kernel.warmup(*tensors, *numbers, grid=(programs,), **named)

    real = attention_launch._launch

    def launch(kernel: Any, name: str, *rest: Any) -> None:
        if name == task.kernel:
            real(kernel, name, *rest)

    with (
        measuring.arithmetic(DTYPES[task.arithmetic]),
        using(task.kernel, candidate),
        mock.patch.object(attention_launch, "launch", warm_up),
        mock.patch.object(sagan_layer, "launch", warm_up),
        mock.patch.object(attention_launch, "_launch", launch),
    ):
        operator(one, inputs(one, device))()


def inputs(task: Task, device: torch.device, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Random tensors that lie as those of NCHW maps do."""
    (B, L, S), (E, Ev) = task.size, task.widths
    generator = torch.Generator(device).manual_seed(0)
    dtype = dtype or measuring.DTYPES[DTYPES[task.arithmetic]]

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, device=device)).to(dtype)

    def rows(count: int, width: int, scale: float = 1.0) -> Tensor:
        return random(B, width, count, scale=scale).mT

    if task.kernel in ("projection", "layer"):
        C, K = task.widths
        E, Ev, side = C // 8, C // 2, math.isqrt(L)
        t = {"x": random(B, C, side, side)}
        if task.kernel == "projection":
            return t | {"weight": random(K, C, scale=C**-0.5)}
        return t | {
            "wq": random(E, C, scale=C**-0.5 * E**-0.25), "k": rows(S, E, E**-0.25), "v": rows(S, Ev),
            "wo": random(C, Ev, scale=Ev**-0.5), "gamma": random(1).abs() + 1,
        }  # fmt: skip
    Ev = Ev or 16  # the kernel that sums exponentials alone takes no values
    t = {"q": rows(L, E, E**-0.25), "k": rows(S, E, E**-0.25), "v": rows(S, Ev), "g": rows(L, Ev)}
    t |= {"a": rows(L, E), "b": rows(S, E), "c": rows(S, Ev), "dq": rows(L, E)}
    lse = torch.zeros(B, 2, L, device=device, dtype=torch.promote_types(dtype, torch.float32))
    return t | {"out": torch.zeros_like(t["g"]), "lse": lse}


def operator(task: Task, t: dict[str, Tensor]) -> Callable[[], Any]:
    """The launches that `task` is a part of, on its `inputs`."""

    def call(launch: Callable[..., Any], names: str) -> Any:
        return launch(*(t.get(name) for name in names.split()))

    if task.kernel == "projection":
        return lambda: sagan_layer._launch_project_pool(t["x"], t["weight"], None)[0]
    if task.kernel == "layer":
        return lambda: call(sagan_layer._launch_sagan_forward, "x wq no_bias k v wo no_bias gamma")
    if task.kernel in ("lse", "over_queries"):
        return lambda: call(attention_launch.over_queries, "q k v")
    if task.kernel == "forward":

        def forward() -> list[Tensor]:
            out, lse = call(attention_launch.forward, "q k v")
            return [out, lse.sum(1)]  # what is stored is two numbers to be added

        return forward
    if task.kernel == "tangent":
        return lambda: call(attention_launch.tangent, "q k v out lse a b c")
    if task.kernel in ("row", "column"):
        return lambda: call(attention_launch.backward, "q k v out lse g")
    return lambda: call(attention_launch.double_backward, "q k v out lse g dq a b c")


def problem(task: Task, device: torch.device, dtype: torch.dtype | None = None) -> Problem:
    """Random inputs for a task's operator, and what it must give."""
    if task.kernel == "spectral_norm":
        return _spectral_norm_problem(device)
    t = inputs(task, device, dtype)
    tolerance = measuring.TOLERANCES[DTYPES[task.arithmetic]]
    d = {name: tensor.double() for name, tensor in t.items()}
    if task.kernel == "projection":
        maps = torch.einsum("kc,bchw->bkhw", d["weight"], d["x"])
        expected = [reference.positions(torch.nn.functional.max_pool2d(maps, 2))]
    elif task.kernel == "layer":
        query = torch.einsum("ec,bcl->ble", d["wq"], d["x"].flatten(2))
        o = reference.attention(query, d["k"], d["v"])
        y = torch.einsum("cv,blv->bcl", d["wo"], o).view_as(d["x"])
        expected = [d["x"] + d["gamma"] * y]
    else:
        expected = _attention_expected(task.kernel, t, d)
    return Problem(operator(task, t), expected, tolerance)


def _attention_expected(kernel: str, t: dict[str, Tensor], d: dict[str, Tensor]) -> list[Tensor]:
    """Float64's answer from `d`; also puts into `t` what earlier passes leave for the kernel."""
    exact = [d[name].requires_grad_() for name in "qkvg"]
    along = tuple(d[name] for name in "abc")
    if kernel in ("lse", "over_queries"):
        with torch.no_grad():
            return [reference.attention(*exact[:3], normalize="queries")]
    if kernel == "forward":
        with torch.no_grad():
            lse = torch.logsumexp(exact[0] @ exact[1].mT, 2) / math.log(2)
            return [reference.attention(*exact[:3]), lse]
    t["out"], t["lse"] = attention_launch.forward(t["q"], t["k"], t["v"])
    if kernel == "tangent":
        return [torch.func.jvp(reference.attention, tuple(x.detach() for x in exact[:3]), along)[1]]
    double = kernel.startswith("double")
    slopes = torch.autograd.grad(reference.attention(*exact[:3]), exact[:3], exact[3], create_graph=double)
    if not double:
        return list(slopes)
    t["dq"].copy_(slopes[0].detach())
    total = sum((s * x).sum() for s, x in zip(slopes, along, strict=True))
    return list(torch.autograd.grad(total, exact))


def _spectral_norm_problem(device: torch.device) -> Problem:
    """Forward and backward of BigGAN's discriminator; torch's form has no such kernels and says what is right."""
    from benchmarks import bench_spectral_norm as bench

    torch.manual_seed(0)
    layers = bench.biggan_discriminator(64)
    expected = [x.detach().double() for x in _spectral_norm(layers, device, grouped=False)()]
    groups: dict[Candidate, Callable[[], Any]] = {}

    def run() -> Any:
        tiling = configs.SPECTRAL_NORM
        if tiling not in groups:
            groups.clear()
            groups[tiling] = _spectral_norm(layers, device)
        return groups[tiling]()

    return Problem(run, expected, 1e-3)


def _spectral_norm(
    layers: list[Any], device: torch.device, grouped: bool = True
) -> Callable[[], list[Tensor]]:
    """A call that gives W/σ and gradients of new copies of `layers`, in training at first, from the same vectors."""
    from torch.nn.utils import parametrizations

    from benchmarks import bench_spectral_norm as bench
    from sagan_kernels.nn import group_spectral_norm

    torch.manual_seed(1)
    layers = [parametrizations.spectral_norm(copy.deepcopy(layer)) for layer in layers]
    model = bench.Weights(layers).to(device)
    parameters = bench.originals(model)
    if grouped:
        group_spectral_norm(model, impl="triton")
    grads = [torch.ones_like(parameter) for parameter in parameters]

    def call() -> list[Tensor]:
        outs = model()
        return [*outs, *torch.autograd.grad(outs, parameters, grads)]

    return call


def merged(table: configs._Table, found: dict[Task, Found]) -> configs._Table:
    """The table with the best tilings of these widths and all its other rows, narrow ones first."""
    result: dict[Any, Any] = {}
    for kernel, rows in table.items():
        by_width = {row[:2]: row for row in rows}
        for task, searched in found.items():
            if task.kernel == kernel and (tile := searched.best):
                by_width[task.widths] = (*task.widths, *dataclasses.astuple(tile))
        result[kernel] = tuple(by_width[widths] for widths in sorted(by_width))
    return result


def line(task: Task, found: Found) -> str:
    """What became of a task, in a comment."""
    start = f"# {task.kernel} {task.widths}:"
    if found.best is None:
        return (
            f"{start} not reached, as before{''.join(f'; {why}' for why in list(found.refused.values())[:1])}"
        )
    before = next(iter(found.times_ms.values()))
    best = dataclasses.asdict(found.best)
    tiling = " ".join(f"{name.removeprefix('num_')} {value}" for name, value in best.items())
    return (
        f"{start} {before:.4f} ms -> {found.times_ms[found.best]:.4f} ms, {tiling} "
        f"({len(found.times_ms)} timed, {len(found.refused)} refused)"
    )


def stored(task: Task, found: Found) -> dict[str, Any]:
    """The search as it is written to a file."""

    def rows(of: dict[Candidate, Any], name: str) -> list[dict[str, Any]]:
        return [dataclasses.asdict(candidate) | {name: value} for candidate, value in of.items()]

    return {
        "kernel": task.kernel, "arithmetic": task.arithmetic, "widths": task.widths,
        "times": rows(found.times_ms, "ms"), "refused": rows(found.refused, "reason"),
    }  # fmt: skip


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
