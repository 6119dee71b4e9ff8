"""How cost grows: python -m benchmarks.scaling --out SCALING.json [--only L B C layers processes].

Time and peak memory of attention against positions L and batch B, of the whole layer against channels C, of spectral
norm against the number of layers, with fitted exponents; the time of sampling, and of sampling with the features that
scores are computed from, over processes of one thread each. BENCH_THREADS fixes the threads of the others.
`python -m benchmarks.report SCALING.json` draws the curves.
"""

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import queue
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import measuring, roofline
from sagan_kernels.files import write_atomically

KEPT = ("eager", "SDPA flash", "ours", "parametrization", "hook", "grouped")


@dataclasses.dataclass
class Curve:
    """One contender along one axis: milliseconds and MiB at each x, and the exponent of the time."""

    what: str
    axis: str
    contender: str
    x: list[int]
    ms: list[float]
    peak_mib: list[float | None]
    exponent: float | None = None
    unavailable: str = ""


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=[*AXES, "processes"], default=[*AXES, "processes"])
    parser.add_argument("--largest", type=int, default=16384, help="most positions L, 256 or more")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--images", type=int, default=256, help="drawn by all processes together")
    arguments = parser.parse_args()
    for name, least in (("largest", 256), ("rounds", 1), ("processes", 1), ("images", 1)):
        given = getattr(arguments, name)
        if min(given if isinstance(given, list) else [given]) < least:
            parser.error(f"--{name} must be {least} or more, got {given}")
    try:
        measuring.settle_heap()
        torch.set_num_threads(measuring.numbers("BENCH_THREADS", str(torch.get_num_threads()))[0])
    except ValueError as error:
        parser.error(str(error))
    curves: list[Curve] = []
    for axis in arguments.only:
        if axis == "processes":
            curves += over_processes(arguments.processes, arguments.images)
            continue
        for what, make, sizes in AXES[axis](arguments.largest):
            print(f"{what} against {axis}", file=sys.stderr)
            curves += along(what, axis, sizes, make, arguments.rounds)
    ceilings = roofline.measure_ceilings(measuring.device(), ["float32"])
    stored = {
        "run": measuring.environment() | {"ceilings": dataclasses.asdict(ceilings)},
        "curves": [dataclasses.asdict(curve) for curve in curves],
    }
    write_atomically(
        arguments.out, lambda path: path.write_text(json.dumps(stored, indent=1), encoding="utf-8")
    )


def along(
    what: str, axis: str, sizes: Iterable[int], make: Callable[[int], measuring.Case], rounds: int
) -> list[Curve]:
    """Measure `make(size)` at every size; a contender that cannot run at one has a reason beside its points."""
    curves: dict[str, Curve] = {}
    for size in sizes:
        case = make(size)
        kept = {name: c for name, c in case.contenders.items() if name in KEPT}
        for name, m in measuring.measure(dataclasses.replace(case, contenders=kept), rounds).items():
            curve = curves.setdefault(name, Curve(what, axis, name, [], [], []))
            if m.unavailable:
                curve.unavailable = curve.unavailable or f"at {size}: {m.unavailable}"
                continue
            curve.x.append(size)
            curve.ms.append(round(statistics.median(m.times_ms), 4))
            curve.peak_mib.append(m.peak_mib)
    for curve in curves.values():
        curve.exponent = exponent(curve.x, curve.ms)
    return list(curves.values())


def exponent(x: list[int], y: list[float]) -> float | None:
    """The p of y ∝ x^p by least squares of logarithms, over the larger half of x, where what is constant fades.

    None under two points.
    """
    half = sorted(zip(x, y, strict=True))[len(x) // 2 if len(x) > 3 else 0 :]
    if len(half) < 2:
        return None
    u, v = ([math.log(value) for value in values] for values in zip(*half, strict=True))
    return round(statistics.linear_regression(u, v).slope, 3)


def over_processes(counts: list[int], images: int) -> list[Curve]:
    """Strong scaling: the same images, drawn by 1, 2, ... processes of one thread, which start together."""
    curves = []
    for what, scored in (("sampling 32px", False), ("sampling and features 32px", True)):
        times = [processes_ms(count, images, scored) for count in counts]
        p = exponent(counts, times)
        curves.append(
            Curve(f"{what}, {images} images", "processes", "ours", counts, times, [None] * len(counts), p)
        )
    return curves


def processes_ms(count: int, images: int, scored: bool) -> float:
    """Milliseconds from the common start to the end of the last process."""
    context = multiprocessing.get_context("spawn")
    barrier, ends = context.Barrier(count + 1), context.Queue()
    parts = [images // count + (i < images % count) for i in range(count)]
    workers = [context.Process(target=_draw, args=(part, scored, barrier, ends)) for part in parts]
    for worker in workers:
        worker.start()
    try:
        barrier.wait(timeout=300)
        start = time.monotonic()
        _wait(workers, ends)
        return round(1e3 * (time.monotonic() - start), 2)
    finally:
        for worker in workers:
            worker.join(timeout=60)


def _wait(workers: list[Any], ends: Any) -> None:
    """Until every worker has said that it ended, or one died."""
    waiting = len(workers)
    while waiting:
        try:
            ends.get(timeout=1)
            waiting -= 1
        except queue.Empty:
            if any(worker.exitcode for worker in workers):
                raise RuntimeError("scaling: every process must draw to the end, got one that died") from None


def _draw(images: int, scored: bool, barrier: Any, ends: Any) -> None:
    from benchmarks.bench_sampling import trained_like
    from sagan_kernels.features import FeatureNet
    from sagan_kernels.models.inference import inference_generator

    torch.set_num_threads(1)
    model = trained_like(resolution=32, base_channels=32, attention_at=[16])
    generator, z_dim, device = inference_generator(model), model.z_dim, measuring.device()
    classifier = FeatureNet("untrained", 3, 10).eval().to(device) if scored else None

    def draw(batch: int) -> None:
        with torch.inference_mode():
            drawn = generator(
                torch.randn(batch, z_dim, device=device), torch.arange(batch, device=device) % 10
            )
            if classifier is not None:
                classifier.features(drawn)
        measuring.synchronize()

    draw(min(16, images))
    barrier.wait(timeout=300)
    for start in range(0, images, 16):
        draw(min(16, images - start))
    ends.put(os.getpid())


def _positions(largest: int) -> list[tuple[str, Callable[[int], measuring.Case], list[int]]]:
    from benchmarks.bench_attention import core

    sizes = [size for size in (256, 1024, 4096, 16384) if size <= largest]
    return [
        (
            f"attention, {task}, pooled, E 8, Ev 32, B 1",
            lambda L, task=task: core(task, str(L), (L, L // 4, 8, 32), 1, "float32", "NCHW"),
            sizes,
        )
        for task in ("forward", "forward + backward", "R1 step")
    ]


def _batches(largest: int) -> list[tuple[str, Callable[[int], measuring.Case], list[int]]]:
    from benchmarks.bench_attention import core

    def make(B: int) -> measuring.Case:
        return core("forward + backward", str(B), (1024, 256, 8, 32), B, "float32", "NCHW")

    return [("attention, forward + backward, L 1024, S 256, E 8, Ev 32", make, [1, 2, 4, 8, 16, 32])]


def _channels(largest: int) -> list[tuple[str, Callable[[int], measuring.Case], list[int]]]:
    from benchmarks.bench_attention import layer

    def make(C: int) -> measuring.Case:
        return layer("forward + backward", str(C), (1024, 256, C // 8, C // 2), 4, "float32", "NCHW")

    return [("layer, forward + backward, 32×32, B 4", make, [32, 64, 128, 256, 512])]


def _layers(largest: int) -> list[tuple[str, Callable[[int], measuring.Case], list[int]]]:
    from benchmarks import bench_spectral_norm as suite

    def make(count: int) -> measuring.Case:
        models = suite.checked(suite.contenders(lambda: [suite.conv(32, 32, 3) for _ in range(count)]))
        return suite.case("forward_backward", str(count), suite.forward_backward(models))

    return [("spectral norm, forward + backward, conv 32 to 32, 3×3", make, [4, 8, 16, 32, 64, 128])]


AXES = {"L": _positions, "B": _batches, "C": _channels, "layers": _layers}


if __name__ == "__main__":
    main()
