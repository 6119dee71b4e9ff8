"""Fixtures of the benchmarks: what a figure was measured on, and contenders timed in turn within one run."""

import os
import platform
import statistics
import time

import pytest
import torch

import sagan_kernels

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


@pytest.fixture
def threads():
    """Intra-op threads of the run: BENCH_THREADS, or all."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("BENCH_THREADS", before)))
    yield torch.get_num_threads()
    torch.set_num_threads(before)


@pytest.fixture
def versus(benchmark, threads):
    """Times contenders A B C, A B C, ... and reports each one's median and its speed over the first.

    The ratio is the median over rounds of (first's time / contender's time) in the same round, so a load that comes
    and goes meets all of them alike. pytest-benchmark's own columns show the last contender, ours.
    """

    def run(contenders, *, rounds=7, **work):
        names = list(contenders)
        for call in contenders.values():
            call()
        times = {name: [] for name in names}
        for _ in range(rounds):
            for name, call in contenders.items():
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
        first = times[names[0]]
        benchmark.extra_info.update(
            work
            | {
                "median_ms": {name: round(1e3 * statistics.median(t), 2) for name, t in times.items()},
                "speedup": {
                    name: round(statistics.median(a / b for a, b in zip(first, t, strict=True)), 2)
                    for name, t in times.items()
                },
                "baseline": names[0],
                "device": "cpu",
                "processor": platform.processor() or platform.machine(),
                "threads": threads,
                "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
                "torch": torch.__version__,
                "sagan_kernels": sagan_kernels.__version__,
            }
        )
        benchmark.pedantic(contenders[names[-1]], rounds=3, iterations=1)

    return run


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    measured = [b for b in getattr(session, "benchmarks", []) if "speedup" in b.extra_info]
    if not measured:
        return
    terminalreporter.write_sep("-", "speed over the first contender, medians of interleaved rounds")
    info = measured[0].extra_info
    terminalreporter.write_line(
        f"{info['threads']} threads on {os.cpu_count()} processors, load {info['load'] or 0:.1f} at the start, "
        f"torch {info['torch']}; more threads and load than processors measure the scheduler, not the networks"
    )
    for bench in measured:
        info = bench.extra_info
        told = ", ".join(
            f"{name} {info['speedup'][name]:.2f}x ({info['median_ms'][name]:.1f} ms)"
            for name in info["speedup"]
        )
        terminalreporter.write_line(f"{bench.name}: {told}")
