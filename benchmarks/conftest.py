"""Fixtures of the benchmarks: pinned threads, contenders measured in turn, and what a results file says of its run."""

import dataclasses
import os

import pytest
import torch

from benchmarks import measuring, report, roofline

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
torch.backends.cudnn.benchmark = True


@pytest.fixture(scope="session", autouse=True)
def _settled():
    """A heap as BENCH_HEAP says, and pinned threads."""
    measuring.settle_heap()
    with measuring.pinned_threads():
        yield


@pytest.fixture
def versus(benchmark):
    """versus(case, rounds=N) checks and times the contenders of a `measuring.Case`.

    What counts is in extra_info; pytest-benchmark's own columns show ours alone, from calls of their own.
    BENCH_COMPILERS=0 leaves out those that compile. BENCH_COMMIT names the commit where there is no git.
    """

    def run(case, *, rounds=7):
        if os.environ.get("BENCH_COMPILERS") == "0":
            case = measuring.without_compilers(case)
        with measuring.arithmetic(case.dtype):
            found = measuring.measure(case, rounds)
            benchmark.extra_info.update(measuring.summary(case, found))
            *_, ours = case.contenders.values()
            benchmark.pedantic(lambda: (ours.call(), measuring.synchronize()), rounds=3, iterations=1)

    return run


_failed: list[dict[str, str]] = []


def pytest_runtest_logreport(report):
    if report.failed and report.when != "teardown":
        crash = getattr(report.longrepr, "reprcrash", None)
        why = crash.message if crash else str(report.longrepr)
        _failed.append({"name": report.nodeid.split("::")[-1], "why": why.partition("\n")[0]})


def pytest_benchmark_update_machine_info(config, machine_info):
    for key in ("node", "release"):  # whose machine it was is nobody's business
        machine_info.pop(key, None)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    dtypes = sorted({b.extra_info["dtype"] for b in benchmarks if "contenders" in b.extra_info})
    with measuring.pinned_threads():  # the session's have ended
        ceilings = roofline.measure_ceilings(measuring.device(), dtypes)
    output_json["failed"] = _failed
    output_json["run"] = measuring.environment() | {"ceilings": dataclasses.asdict(ceilings)}


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    measured = [b.extra_info for b in getattr(session, "benchmarks", []) if "contenders" in b.extra_info]
    if not measured:
        return
    terminalreporter.write_sep("-", "speed over the first contender, medians of interleaved rounds")
    run = measuring.environment()
    terminalreporter.write_line(
        f"{run['device']}, {run['threads']} threads on {run['processors']} processors, load {run['load'] or 0:.1f}, "
        f"torch {run['torch']}; more threads and load than processors measure the scheduler, not the contenders"
    )

    if any("host_ms" in row for case in measured for row in case["contenders"].values()):
        terminalreporter.write_line(report.HOST)

    def took(row):
        host = f", host {row['host_ms']:.2f}{report.host_mark(row)}" if "host_ms" in row else ""
        return f"{row['median_ms']:.2f} ms{host}"

    for case in measured:
        told = ", ".join(
            f"{name} {row['unavailable']}"
            if "unavailable" in row
            else f"{name} {row['speedup']:.2f}x ({took(row)})"
            if "speedup" in row
            else f"{name} ({took(row)})"
            for name, row in case["contenders"].items()
        )
        what = f"{case['suite']}, {case['task']}, {report.label(case)}, {case['dtype']}, {case['layout']}"
        terminalreporter.write_line(f"{what}: {told}")
