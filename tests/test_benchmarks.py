"""The arithmetic of the benchmarks: what is compared, bounded, fitted and searched, on figures worked out by hand."""

import concurrent.futures
import dataclasses
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks import attention_contenders, measuring, report, roofline, scaling, tune
from benchmarks.measuring import Case, Contender
from sagan_kernels.ops import configs

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
EXPECTED = torch.tensor([1.0, -4.0], dtype=torch.float64)


def case(**contenders):
    named = {name: Contender(call) for name, call in contenders.items()}
    return Case("suite", "task", "shape", named, lambda: EXPECTED)


def test_check_refuses_a_wrong_result():
    wrong = case(eager=lambda: EXPECTED.float(), ours=lambda: EXPECTED.float() + 1e-3)
    with pytest.raises(AssertionError, match=r"ours must be within 1e-04 of float64, got 2\.5e-04"):
        measuring.check(wrong)


def test_a_wrong_result_of_others_is_a_reason():
    found = measuring.check(case(eager=lambda: EXPECTED, other=lambda: 2 * EXPECTED, ours=lambda: EXPECTED))
    assert found["other"].unavailable == "wrong: must be within 1e-04 of float64, got 1.0e+00"
    for name in ("eager", "ours, bf16", "ours"):
        forms = {"eager": EXPECTED, "ours, bf16": EXPECTED, "ours": EXPECTED} | {name: 2 * EXPECTED}
        with pytest.raises(AssertionError, match=f"{name} must be within"):
            measuring.check(case(**{form: lambda result=result: result for form, result in forms.items()}))


def test_check_of_a_network_takes_the_mean_error():
    few = torch.arange(1000.0).double()
    flipped = few.float().clone()
    flipped[7] += 10  # 1e-2 of the largest, 1e-5 in the mean
    forms = {"eager": Contender(lambda: few), "ours": Contender(lambda: flipped)}
    network = Case("suite", "task", "shape", forms, lambda: few, tolerance=1e-4)
    assert measuring.check(network)["ours"].error == pytest.approx(1e-5, rel=0.01)
    with pytest.raises(AssertionError, match="ours must be within 1e-04"):
        measuring.check(dataclasses.replace(network, tolerance=None))
    with pytest.raises(AssertionError, match="ours must be within 1e-06"):
        measuring.check(dataclasses.replace(network, tolerance=1e-6))


def test_check_keeps_a_contender_that_cannot_run_but_never_excuses_ours():
    def refuses():
        raise NotImplementedError("no backward here\nand more")

    found = measuring.check(case(eager=lambda: EXPECTED, other=refuses, ours=lambda: EXPECTED))
    assert found["other"].unavailable == "NotImplementedError: no backward here"
    assert not found["ours"].unavailable
    with pytest.raises(NotImplementedError, match="no backward"):
        measuring.check(case(eager=lambda: EXPECTED, ours=refuses))


def test_check_in_16_bits_without_a_baseline_holds_to_the_tolerance():
    def refuses():
        raise NotImplementedError("out of memory")

    wrong = dataclasses.replace(case(eager=refuses, ours=lambda: 2 * EXPECTED), dtype="bfloat16")
    with pytest.raises(AssertionError, match="ours must be within 6e-02"):
        measuring.check(wrong)


@pytest.mark.parametrize("dtype", ["tf32", "float16", "bfloat16"])
def test_check_of_a_forward_in_few_bits_is_not_blinded_by_a_residual(dtype):
    """A layer with another attention, whose residual is much the larger part, has errors of about a hundredth."""
    wrong = case(eager=lambda: 1.0001 * EXPECTED, ours=lambda: 1.014 * EXPECTED)
    with pytest.raises(AssertionError, match="ours must be within"):
        measuring.check(dataclasses.replace(wrong, dtype=dtype, task="forward"))
    measuring.check(dataclasses.replace(wrong, dtype=dtype, task="forward + backward"))


def off(error):
    """A result this far from EXPECTED."""
    return lambda: EXPECTED * (1 + error)


@pytest.mark.parametrize(
    ("dtype", "task", "baseline", "right", "wrong"),
    [
        ("float32", "forward", 5e-5, 9e-5, 1.5e-4),  # the tolerance
        ("float32", "forward + backward", 1.7e-4, 3e-4, 4e-4),  # twice the baseline's
        ("float32", "R1 step", 1e-6, 9e-5, 1.5e-4),
        ("tf32", "forward", 1.4e-3, 8e-3, 9e-3),  # six times
        ("tf32", "R1 step", 4e-2, 7e-2, 9e-2),
        ("tf32", "R1 step", 1e-3, 1.9e-2, 2.1e-2),
        ("bfloat16", "forward", 1e-2, 2.9e-2, 3.1e-2),  # three times
        ("bfloat16", "forward + backward", 0.1, 0.19, 0.21),
    ],
)
def test_check_of_others_knows_the_error_of_the_baseline(dtype, task, baseline, right, wrong):
    for error in (right, wrong):
        made = case(eager=off(baseline), other=off(error), ours=off(right))
        found = measuring.check(dataclasses.replace(made, dtype=dtype, task=task))
        assert bool(found["other"].unavailable) == (error == wrong)
    with pytest.raises(AssertionError, match="ours must be within"):
        measuring.check(
            dataclasses.replace(case(eager=off(baseline), ours=off(wrong)), dtype=dtype, task=task)
        )


@pytest.mark.parametrize(
    ("dtype", "task", "right", "wrong"),
    [
        ("float32", "forward", 9e-5, 1.1e-4),
        ("float32", "R1 step", 9e-3, 1.1e-2),
        ("tf32", "forward", 1.9e-2, 2.1e-2),
        ("tf32", "R1 step", 5.9e-2, 6.1e-2),
    ],
)
def test_check_bounds_the_baseline_itself(dtype, task, right, wrong):
    measuring.check(dataclasses.replace(case(eager=off(right), ours=off(0)), dtype=dtype, task=task))
    with pytest.raises(AssertionError, match="eager must be within"):
        measuring.check(dataclasses.replace(case(eager=off(wrong), ours=off(0)), dtype=dtype, task=task))


@pytest.mark.parametrize(
    ("pooled", "elements", "error", "passes"),
    [(True, 1, 5e-3, True), (False, 1, 5e-3, False), (True, 1, 2e-2, False), (True, 10, 5e-3, False)],
    ids=["one", "no max-pool", "too large", "too many"],
)
def test_a_max_pool_may_move_single_gradients(pooled, elements, error, passes):
    exact = torch.ones(1000, dtype=torch.float64)
    found = exact.clone()
    found[:elements] += error
    same = case(eager=lambda: exact, ours=lambda: found)
    same = dataclasses.replace(
        same, task="forward + backward", dtype="float32", pooled=pooled, expected=lambda: exact
    )
    if passes:
        assert measuring.check(same)["ours"].error == pytest.approx(error)
    else:
        with pytest.raises(AssertionError, match="ours must be within"):
            measuring.check(same)


@pytest.mark.parametrize("text", ["", "eight", "1 -2", "0", "1.5"])
def test_numbers_of_a_variable_must_be_positive_and_whole(monkeypatch, text):
    monkeypatch.setenv("BENCH_BATCHES", text)
    with pytest.raises(ValueError, match="BENCH_BATCHES: must be positive integers"):
        measuring.numbers("BENCH_BATCHES", "1 8")
    monkeypatch.setenv("BENCH_BATCHES", "2 16")
    assert measuring.numbers("BENCH_BATCHES", "1 8") == [2, 16]


def test_each_case_compiles_once_and_for_itself():
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    twice, half = (
        torch.compile(function, backend=backend) for function in (lambda x: 2 * x, lambda x: x / 2)
    )
    named = {
        "eager": Contender(lambda: EXPECTED),
        "compiled": Contender(lambda: twice(EXPECTED / 2), compiles=True),
        "ours": Contender(lambda: half(EXPECTED * 2), compiles=True),
    }
    for cases in (1, 2):
        measuring.measure(Case("suite", "task", "shape", named, lambda: EXPECTED), rounds=2)
        assert len(compilations) == 2 * cases


def test_error_of_a_small_tensor_is_measured_against_the_largest():
    large, small, rounding = (torch.tensor([value]).double() for value in (100.0, 1e-3, 1e-12))
    errors = measuring.relative_errors([large + 1, small + 0.01, rounding + 1], [large, small, rounding])
    assert errors == pytest.approx([0.01, 0.01, 0.01])


def test_speed_is_the_median_of_ratios_within_rounds(monkeypatch):
    times = iter([10.0, 5.0, 20.0, 10.0, 30.0, 30.0])  # eager, ours, eager, ours, ...
    monkeypatch.setattr(measuring, "time_ms", lambda call: next(times))
    timed = case(eager=lambda: EXPECTED, ours=lambda: EXPECTED)
    row = measuring.summary(timed, measuring.measure(timed, rounds=3))["contenders"]["ours"]
    assert (row["speedup"], row["median_ms"], row["quartiles_speedup"]) == (2.0, 10.0, [1.5, 2.0])


def test_a_gpu_is_timed_apart_from_the_host_that_queues(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(measuring, "synchronize", lambda: None)
    monkeypatch.setattr(measuring, "peak_mib", lambda call: 1.0)
    host, gpu = (iter(values * 50) for values in ([3.0, 6.0], [8.0, 2.0]))  # eager, ours, eager, ours, ...
    queued = []
    monkeypatch.setattr(measuring, "host_ms", lambda call: next(host))
    monkeypatch.setattr(measuring, "device_ms", lambda call, host: queued.append(host) or next(gpu))
    timed = case(eager=lambda: EXPECTED, ours=lambda: EXPECTED)
    eager, ours = measuring.summary(timed, measuring.measure(timed, rounds=31))["contenders"].values()
    assert (eager["host_ms"], eager["speedup_host"], eager["rounds"]) == (3.0, 1.0, 15)
    assert (ours["median_ms"], ours["speedup"], ours["host_ms"], ours["speedup_host"]) == (2.0, 4.0, 6.0, 0.5)
    assert queued == [3.0, 6.0] * 15
    clock = itertools.count()
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(clock))
    assert len(measuring.measure(timed, rounds=31)["ours"].times_ms) == 5


def test_the_gpu_spins_while_the_host_queues(monkeypatch):
    told, spun = [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            told.append("event")

        def elapsed_time(self, other):
            return 2.0

    monkeypatch.setattr(measuring, "_overwrite_l2", lambda: told.append("flush"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: told.append("spin") or spun.append(cycles))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("wait"))
    assert measuring.device_ms(lambda: told.append("call"), 2.0) == 2.0
    measuring.device_ms(lambda: None, 1e3)
    assert told[:6] == ["flush", "spin", "event", "call", "event", "wait"]
    assert spun == [int(3.3 * 1.8e6), 90_000_000]  # 3.3 and 50 ms


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="speaks to glibc")
@pytest.mark.parametrize(("heap", "held"), [("settled", 0), ("kept", 48)])
def test_heap_keeps_or_returns_large_blocks(heap, held):
    code = (
        "import re, torch; from benchmarks import measuring; measuring.settle_heap()\n"
        "held = lambda: int(re.search(r'VmRSS:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "before = held(); x = torch.ones(48 << 20, dtype=torch.uint8); del x; print(held() - before)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"BENCH_HEAP": heap},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(run.stdout) / 1024 == pytest.approx(held, abs=4)


def test_ceilings_are_those_of_the_threads_that_were_timed(monkeypatch):
    from benchmarks import conftest

    seen = []
    ceilings = roofline.Ceilings(1.0, {}, 1.0)
    monkeypatch.setattr(
        roofline, "measure_ceilings", lambda *_: seen.append(torch.get_num_threads()) or ceilings
    )
    monkeypatch.setenv("BENCH_THREADS", "3")
    before = torch.get_num_threads()
    stored = {}
    conftest.pytest_benchmark_update_json(None, [], stored)
    assert seen == [3]
    assert (torch.get_num_threads(), stored["run"]["threads"]) == (before, 3)


def test_unknown_heap_is_told_in_one_line(monkeypatch):
    monkeypatch.setenv("BENCH_HEAP", "jemalloc")
    with pytest.raises(ValueError, match="BENCH_HEAP: must be of settled, kept, got 'jemalloc'"):
        measuring.settle_heap()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_slow_host_does_not_slow_a_full_queue():
    x = torch.zeros(8, device="cuda")

    def call():
        time.sleep(5e-3)
        x.add_(1)

    call()
    assert measuring.host_ms(call) > 5
    assert measuring.time_ms(call) < 1


def test_peak_memory_counts_what_a_call_holds_at_once():
    def holds():
        torch.ones(2**23, device=measuring.device())  # 32 MiB, freed again
        torch.ones(2**24, device=measuring.device())

    assert measuring.peak_mib(holds) == pytest.approx(64, abs=8)


def test_attention_work_is_that_of_the_design_table():
    # B 64, C 256 at 32×32, pooled, in bf16: 16.8 M scores, 160 multiply-adds each, 26.2 MB
    work = roofline.attention_work("forward", 64, 1024, 256, 32, 128, 2)
    assert (work.bytes, work.flops, work.exponentials) == (26_214_400, 5_368_709_120, 16_777_216)
    # unpooled C 128 at 64×64: five products take 0.474 ms, the double backward's 1.68 ms, at 798 TF/s
    both = roofline.attention_work("forward + backward", 64, 4096, 4096, 16, 64, 2)
    forward = roofline.attention_work("forward", 64, 4096, 4096, 16, 64, 2)
    r1 = roofline.attention_work("R1 step", 64, 4096, 4096, 16, 64, 2)
    assert 1e3 * (both.flops - forward.flops) / 798e12 == pytest.approx(0.474, abs=1e-3)
    assert 1e3 * (r1.flops - both.flops) / 798e12 == pytest.approx(1.68, abs=0.01)
    assert r1.exponentials == 4 * forward.exponentials


def test_layer_work_moves_its_input_and_output_only():
    work = roofline.layer_work("forward", 64, 256, 1024, 256, 32, 128, 2)
    assert work.bytes == 2 * 2 * 64 * 256 * 1024  # 0.022 ms at 3 TB/s
    assert work.flops == 5_368_709_120 + 2 * 64 * 1024 * 256 * (32 + 32 + 128 + 128)


@pytest.mark.parametrize(
    ("work", "bound"),
    [((6, 1, 1), (3000, "bytes")), ((1, 8, 1), (2000, "products")), ((1, 1, 8), (1600, "exp"))],
)
def test_bound_is_the_slowest_resource(work, bound):
    ceilings = roofline.Ceilings(2.0, {"float32": 4.0}, 5.0)
    assert roofline.bound_ms(roofline.Work(*work), ceilings, "float32") == bound


def test_measured_ceilings_are_of_a_computer():
    ceilings = roofline.measure_ceilings(measuring.device(), ["float32"])
    assert all(
        1e4 < rate < 1e16 for rate in (ceilings.bytes, ceilings.flops["float32"], ceilings.exponentials)
    )


def test_exponent_is_that_of_the_larger_half():
    x = [256, 1024, 4096, 16384]
    assert scaling.exponent(x, [3.0 * n**1.5 for n in x]) == 1.5
    assert scaling.exponent(x, [100, 100, 1, 16]) == 2.0
    assert scaling.exponent([8], [1.0]) is None


def test_curve_of_a_contender_that_fails_says_why():
    def make(size):
        def fails():
            raise RuntimeError("too long")

        return case(**{"eager": fails if size > 2 else lambda: EXPECTED, "ours": lambda: EXPECTED})

    eager, ours = scaling.along("what", "L", [1, 2, 4], make, rounds=1)
    assert (eager.x, eager.unavailable) == ([1, 2], "at 4: RuntimeError: too long")
    assert "1: " in report.curve_table([dataclasses.asdict(eager)])
    assert "unavailable at 4: RuntimeError: too long" in report.curve_table([dataclasses.asdict(eager)])
    assert ours.x == [1, 2, 4]
    assert ours.exponent is not None


def test_curve_over_layers_compares_three_forms():
    ((what, make, _),) = scaling.AXES["layers"](0)
    curves = scaling.along(what, "layers", [2, 4], make, rounds=1)
    assert [curve.contender for curve in curves] == ["parametrization", "hook", "grouped"]
    assert all(curve.x == [2, 4] and min(curve.ms) > 0 for curve in curves)
    assert len(make(3).contenders["grouped"].call()) == 3  # a gradient for each layer


def results(tmp_path, name, speedup, spread, unavailable=""):
    row = {"speedup": speedup, "quartiles_speedup": [speedup - spread, speedup + spread], "rounds": 9}
    row |= {"median_ms": 2.0, "quartiles_ms": [2.0, 2.0], "error": 1e-7}
    eager = {"median_ms": 2 * speedup, "quartiles_ms": [1, 1], "error": 1e-7, "rounds": 9}
    eager |= {"speedup": 1.0, "quartiles_speedup": [1.0, 1.0]}
    info = {"suite": "attention", "task": "forward", "shape": "tiny", "dtype": "float32", "layout": "NCHW"}
    info |= {"batch": 4, "length": 64, "work": {"bytes": 4e6, "flops": 1e6, "exponentials": 1e6}}
    info |= {"contenders": {"eager": eager, "other": {"unavailable": "no compiler"}, "ours": row}}
    ceilings = {"bytes": 8e9, "flops": {"float32": 1e12}, "exponentials": 1e9}
    run = {
        "device": "abacus",
        "kind": "cpu",
        "threads": 1,
        "commit": name,
        "command": "c",
        "ceilings": ceilings,
    }
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps({"run": run, "benchmarks": [{"extra_info": info}]}))
    return path


def test_report_shows_losses_reasons_and_the_roofline(tmp_path):
    text = "\n".join(report.sections(report.load(results(tmp_path, "a", 0.5, 0.01))))
    assert "| ours | 2 | 2e+03 | **0.50×** (0.49 to 0.51) | 1e-07 |" in text
    assert "unavailable: no compiler" in text
    assert "50% (exp)" in text  # a million exponentials take 1 ms, and 2 ms were measured
    assert "copy 8.0 GB/s" in text


def test_brief_report_has_a_line_a_shape_with_the_fastest_of_the_others(tmp_path):
    result = report.load(results(tmp_path, "a", 0.5, 0.01))
    faster = {"speedup": 1.7, "median_ms": 0.6}
    result["cases"][0]["contenders"] = {
        "eager": {"speedup": 1.0, "median_ms": 1.0}, "slow": {"speedup": 0.9, "median_ms": 1.1},
        "fast": faster, "absent": {"unavailable": "no compiler"}, "ours, bf16": {"speedup": 2.0, "median_ms": 0.5},
        "ours": {"speedup": 0.5, "median_ms": 2.0},
    }  # fmt: skip
    assert report.brief(result["cases"], result["run"]).splitlines() == [
        "| shape | forward |",
        "|---|---|",
        "| tiny, B 4 | eager 1 ms; ours **0.50×**; ours, bf16 2.00×; fast 1.70× |",
    ]


def test_reports_from_a_gpu_have_the_time_of_the_host(tmp_path):
    result = report.load(results(tmp_path, "a", 2.0, 0.01))
    contenders = result["cases"][0]["contenders"]
    contenders["eager"] |= {"host_ms": 0.3, "speedup_host": 1.0}
    contenders["ours"] |= {"host_ms": 2.5, "speedup_host": 0.5}
    *_, full = report.sections(result)
    _, told, mark, header, _, *rows = [line for line in full.splitlines() if line]
    assert told.startswith("Device time is a GPU's while its queue is full, host time what it takes")
    assert mark == "images/s are a loop's."
    assert "| eager | 4 | 1e+03 | 1.00× (1.00 to 1.00) | 0.3 (1.00×) | 1e-07 |" in rows[0]
    # four images in the 2.5 ms of the host, which are more than the GPU's 2
    assert "| ours | 2 | 1.6e+03 | 2.00× (1.99 to 2.01) | 2.5† (**0.50×**) | 1e-07 |" in rows[-1]
    assert {row.count("|") for row in [header, *rows]} == {header.count("|")}
    *_, short = report.sections(result, report.brief)
    assert short.splitlines()[2] == told
    assert short.splitlines()[-1] == "| tiny, B 4 | eager 4 ms; ours 2.00×† (host **0.5×**) |"


@pytest.mark.parametrize(("new", "verdict"), [(2.2, "within noise"), (2.6, "faster"), (1.4, "slower")])
def test_regressions_are_told_from_noise(new, verdict, tmp_path):
    old, found = (report.load(results(tmp_path, n, s, 0.1)) for n, s in (("old", 2.0), ("new", new)))
    line = report.regressions(old, found).splitlines()[-1]
    level = math.hypot(0.1 / 2, 0.1 / new)
    assert line.endswith(f"| 2.00× | {new:.2f}× | {new / 2 - 1:+.1%} | ±{level:.1%} | {verdict} |")


def test_report_names_the_cases_that_failed(tmp_path):
    (tmp_path / "conftest.py").write_text("from benchmarks.conftest import *\n")
    (tmp_path / "test_two.py").write_text(
        "from benchmarks import measuring\n"
        "def test_wrong(versus): assert False, 'ours must be right'\n"
        "def test_right(versus):\n"
        "    one = measuring.Contender(lambda: measuring.torch.ones(1))\n"
        "    versus(measuring.Case('suite', 'task', 'shape', {'eager': one, 'ours': one}), rounds=1)\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--rootdir=.",
        "--benchmark-json=out.json",
        "test_two.py",
    ]
    environment = os.environ | {"PYTHONPATH": str(RESULTS.parents[1])}
    environment.pop("PYTEST_XDIST_WORKER", None)  # in a run over processes nothing is timed, this one does
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert "1 failed, 1 passed" in ended.stdout, ended.stdout
    _, failed, table = report.sections(report.load(tmp_path / "out.json"))
    assert failed.splitlines()[2:] == ["- `test_wrong`: AssertionError: ours must be right"]
    assert "test_wrong" not in table


def test_regressions_list_what_only_one_file_has(tmp_path):
    old, new = (report.load(results(tmp_path, n, 2.0, 0.1)) for n in ("old", "new"))
    new["cases"][0]["shape"] = "large"
    lines = report.regressions(old, new).splitlines()
    assert lines[0] == "old: abacus, 1 threads, old; new: abacus, 1 threads, new"
    assert (
        lines[-1] == "| attention, forward, large, 4, float32, NCHW | ours |  | 2.00× | | | only in the new |"
    )
    assert "| attention, forward, tiny, 4, float32, NCHW | ours | 2.00× |  | | | only in the old |" in lines


def test_regressions_of_curves_have_exponents_and_times(tmp_path):
    old, new = (report.load(results(tmp_path, n, 2.0, 0.1)) | {"cases": []} for n in ("old", "new"))
    curve = {
        "what": "layer",
        "axis": "L",
        "contender": "ours",
        "x": [64, 256],
        "ms": [1.0, 4.0],
        "exponent": 1.0,
    }
    old["curves"] = [curve, curve | {"contender": "eager", "exponent": None}]
    new["curves"] = [curve | {"x": [64, 256, 1024], "ms": [1.5, 5.0, 20.0], "exponent": 0.93}]
    first, _, _, _, *lines = report.regressions(old, new).splitlines()
    assert first.startswith("old: abacus")
    assert lines == [
        "| layer against L | ours | 1.00 | 0.93 | 1.25 to 1.50 |",
        "| layer against L | eager | – | – | only in the old |",
    ]


def test_report_of_fields_or_folders_that_cannot_be_used_is_one_line(tmp_path, monkeypatch):
    path = results(tmp_path, "a", 0.5, 0.01)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["report", str(path), "--out", str(tmp_path / "file" / "out")])
    with pytest.raises(SystemExit, match=r"^[^\n]*file[^\n]*$"):
        report.main()
    stored = json.loads(path.read_text())
    del stored["benchmarks"][0]["extra_info"]["suite"]
    path.write_text(json.dumps(stored))
    monkeypatch.setattr("sys.argv", ["report", str(path)])
    with pytest.raises(SystemExit, match=r"must have the fields .*, got KeyError 'suite'; measure again"):
        report.main()


def test_brief_report_of_a_baseline_that_cannot_run_has_our_time(tmp_path):
    result = report.load(results(tmp_path, "a", 0.5, 0.01))
    result["cases"][0]["contenders"] = {"eager": {"unavailable": "memory"}, "ours": {"median_ms": 2.0}}
    assert report.brief(result["cases"], result["run"]).endswith(
        "| tiny, B 4 | eager cannot run; ours 2 ms |"
    )


def test_report_names_a_file_without_results(tmp_path):
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(ValueError, match=r"empty.json must hold results, got none; write it with pytest"):
        report.load(tmp_path / "empty.json")
    with pytest.raises(FileNotFoundError, match="must exist, got no such file"):
        report.load(tmp_path / "absent.json")
    (tmp_path / "image.json").write_bytes(b"\xff\xfe")
    for name in ("image.json", ""):
        with pytest.raises(ValueError, match="must hold results, got none"):
            report.load(tmp_path / name)


def test_plots_are_written(tmp_path):
    plots = pytest.importorskip("benchmarks.plots")
    pytest.importorskip("matplotlib", reason="plots need matplotlib, which the extra dev has")
    curve = scaling.Curve("attention", "L", "ours", [256, 512], [1.0, 3.0], [2.0, 4.0], 1.58)
    result = report.load(results(tmp_path, "a", 0.5, 0.01)) | {"curves": [vars(curve)]}
    written = [path.name for path in plots.write_all([result], tmp_path)]
    stem = "a_attention_float32_NCHW"
    assert written == [f"{stem}_speedup.png", f"{stem}_roofline.png", "a_memory.png", "a_scaling.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in written)


def test_plots_of_several_files_do_not_overwrite_each_other(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="plots need matplotlib, which the extra dev has")
    files = [results(tmp_path, name, 0.5, 0.01) for name in "ab"]
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["report", *map(str, files), "--out", str(out)])
    report.main()
    assert len(list(out.glob("*.png"))) == 4
    monkeypatch.setattr("sys.argv", ["report", str(files[0]), str(files[0]), "--out", str(out)])
    with pytest.raises(SystemExit, match="needs files of different names, which plots get, got a, a"):
        report.main()


TILES = [configs.Tiling(16, 16), configs.Tiling(32, 16, 8, 1), configs.Tiling(16, 32)]


def task(kernel, widths=(16, 16), arithmetic="ieee"):
    return tune.Task(kernel, arithmetic, widths, (1, 64, 16))


@pytest.mark.parametrize("kernel", [*tune.ATTENTION, "projection", "layer"])
def test_search_takes_the_fastest_right_tiling(kernel):
    pytest.importorskip("triton")
    device = measuring.device()
    problem = tune.problem(task(kernel), device, torch.float32)
    tried = tune.candidates(task(kernel), "sm_90")[:2]
    timed = []

    def timer(call):
        call()
        timed.append(tune.present(task(kernel), "sm_90"))  # what configs gives while it is timed
        return {tried[0]: 3.0, tried[1]: 2.0}[timed[-1]]

    found = tune.search(kernel, problem, tried, timer, until=0, clock=lambda: -1)
    assert timed == tried
    assert (found.refused, found.best) == ({}, tried[1])
    assert tune.present(task(kernel), "sm_90") == tried[0]


def test_search_refuses_what_is_wrong_or_fails_and_stops_in_time():
    answers = dict(zip(TILES, (lambda: EXPECTED + 1, lambda: 1 / 0, lambda: EXPECTED), strict=True))

    def run():
        return answers[tune.configs.tiling("forward", 8, 8, "ieee", "sm_90")]()

    problem = tune.Problem(run, [EXPECTED], 1e-6)
    found = tune.search("forward", problem, TILES, lambda call: 1.0, until=1, clock=lambda: 0)
    assert found.best == TILES[2]
    assert found.refused == {TILES[0]: "error 2.5e-01", TILES[1]: "ZeroDivisionError: division by zero"}
    late = tune.search("forward", problem, TILES, lambda call: 1.0, until=1, clock=lambda: 2)
    assert (late.best, len(late.refused)) == (None, 1)


def test_a_lost_device_ends_the_search(capsys):
    def run():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    problem = tune.Problem(run, [EXPECTED], 1e-6)
    plan = [(task("forward"), TILES), (task("row"), TILES)]
    found = tune.tune(plan, lambda task: problem, lambda kernel, call: 1.0, deadline=9, clock=lambda: 0)
    assert [len(result.refused) for result in found.values()] == [1, 0]
    assert "stopped at forward (16, 16): an illegal memory access" in capsys.readouterr().err


def test_a_winner_that_is_wrong_elsewhere_is_refused():
    problem = tune.Problem(lambda: EXPECTED, [EXPECTED], 1e-6)
    times = iter([3.0, 1.0, 2.0])
    asked = []

    def elsewhere(task, tile):
        asked.append(tile)
        return "error 1" if tile == TILES[1] else ""

    found = tune.tune(
        [(task("forward"), TILES)], lambda task: problem, lambda kernel, call: next(times), deadline=9,
        clock=lambda: 0, elsewhere=elsewhere,
    )[task("forward")]  # fmt: skip
    assert asked == [TILES[1], TILES[2]]
    assert (found.best, found.refused) == (TILES[2], {TILES[1]: "error 1"})


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, within the interpreter
@pytest.mark.parametrize("kernel", ["forward", "column", "double_row", "projection", "layer"])
def test_tilings_are_tried_at_lengths_that_none_divides(kernel, monkeypatch):
    pytest.importorskip("triton")
    device = measuring.device()
    asked = task(kernel, (32, 32)) if kernel in ("projection", "layer") else task(kernel)
    tile = tune.present(asked, "sm_90")
    size = (2, 49, 9)
    assert tune.wrong_elsewhere(asked, tile, device, torch.float32, size) == ""
    search = tune.search
    monkeypatch.setattr(
        tune,
        "search",
        lambda k, problem, *rest: search(k, tune.Problem(problem.run, problem.expected, 0.0), *rest),
    )
    assert "at (2, 49, 9): error" in tune.wrong_elsewhere(asked, tile, device, torch.float32, size)


def test_a_device_lost_elsewhere_ends_the_search_too(capsys):
    problem = tune.Problem(lambda: EXPECTED, [EXPECTED], 1e-6)
    times, asked = iter([3.0, 1.0, 2.0]), []

    def elsewhere(task, tile):
        asked.append(tile)
        return "RuntimeError: CUDA error: an illegal memory access was encountered"

    plan = [(task("forward"), TILES), (task("row"), TILES)]
    found = tune.tune(
        plan, lambda task: problem, lambda kernel, call: next(times), deadline=9, clock=lambda: 0,
        elsewhere=elsewhere,
    )  # fmt: skip
    assert asked == [TILES[1]]
    assert not found[task("row")].times_ms
    assert "stopped at forward (16, 16): an illegal memory access" in capsys.readouterr().err


def test_what_did_not_compile_is_not_tried():
    problem = tune.Problem(lambda: EXPECTED, [EXPECTED], 1e-6)
    found = tune.tune(
        [(task("forward"), TILES)], lambda task: problem, lambda kernel, call: 1.0, deadline=9,
        compiled=lambda task, seconds: {TILES[0]: "late", TILES[1]: "late"}, clock=lambda: 0,
    )  # fmt: skip
    # the present tiling is the measure of others, compiled ahead or not
    assert list(found[task("forward")].times_ms) == [TILES[0], TILES[2]]
    assert found[task("forward")].refused == {TILES[1]: "late"}


def test_workers_that_fail_or_are_late_are_refused():
    class Future(concurrent.futures.Future):
        def __init__(self, error=None, done=True):
            super().__init__()
            if done:
                self.set_exception(error) if error else self.set_result(None)

    ahead = tune.Ahead(None, lambda: None)
    futures = (Future(), Future(ValueError("no room")), Future(done=False))
    ahead.futures[task("row")] = dict(zip(TILES, futures, strict=True))
    assert ahead.wait(task("row"), 0.01) == {
        TILES[1]: "ValueError: no room",
        TILES[2]: "not compiled in time",
    }


def test_tuned_table_reads_back_and_keeps_what_time_did_not_reach():
    table = {"forward": ((32, 32, 64, 64), (256, 32, 32, 32)), "lse": ((256, 0, 32, 64),)}
    elapsed = []  # a timing takes five seconds
    problem = tune.Problem(lambda: EXPECTED, [EXPECTED], 1e-6)

    def timer(kernel, call):
        elapsed.append(5)
        return 1.0

    plan = [(task("forward", (16, 32)), TILES[1:]), (task("lse", (16, 0)), TILES)]
    found = tune.tune(plan, lambda task: problem, timer, deadline=3, clock=lambda: sum(elapsed))
    tuned = tune.merged(table, found)
    assert tuned == {
        "forward": ((16, 32, 32, 16, 8, 1), (32, 32, 64, 64), (256, 32, 32, 32)),
        "lse": ((256, 0, 32, 64),),
    }
    assert "not reached, as before" in tune.line(plan[1][0], found[plan[1][0]])
    text = tune.rendered(tuned, "half", "sm_90", "from here")
    scope = {"_Table": dict}
    exec(text, scope)
    assert scope["_HALF_90"] == tuned


def test_tune_times_each_arithmetic_in_its_own_precision(monkeypatch, capsys):
    precisions, deadlines = [], []

    def search(plan, make, timer, deadline, compiled, elsewhere):
        precisions.append(torch.backends.cuda.matmul.fp32_precision)
        deadlines.append(deadline)
        return {}

    before = torch.backends.cuda.matmul.fp32_precision
    run = {"device": "a GPU", "torch": "2", "date": "today", "command": "tune"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measuring, "environment", lambda: run)
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tune, "tune", search)
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    words = "tune --jobs 0 --minutes 1 --kernels forward --arithmetic tf32 tf32x3"
    monkeypatch.setattr("sys.argv", words.split())
    tune.main()
    assert precisions == ["tf32", "ieee"]
    assert torch.backends.cuda.matmul.fp32_precision == before
    assert deadlines[-1] == 60
    assert "_TF32_90" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["tune", "--jobs", "0", "--minutes", "1", "--kernels", "spectral_norm"])
    tune.main()
    assert deadlines[-1] == 60  # all of it, where nothing else is to be done


def test_sdpa_says_why_a_back_end_was_refused(monkeypatch):
    def refuse(*_, **keywords):
        warnings.warn(
            "Flash attention kernel not used because: (Triggered internally at x.h:1.)", stacklevel=1
        )
        warnings.warn("Flash takes 16 bits, got float32. (Triggered internally at x.h:2.)", stacklevel=1)
        warnings.warn("CuDNN attention has been runtime disabled. (Triggered internally)", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
    backend = torch.nn.attention.SDPBackend.FLASH_ATTENTION
    with pytest.raises(
        RuntimeError, match=r"^No available kernel\. Aborting execution\. Flash takes 16 bits, got float32\.$"
    ):
        attention_contenders.sdpa(backend, *torch.zeros(3, 1, 4, 8))


def test_tune_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr("sys.argv", ["tune"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="tune: needs a GPU, got none"):
        tune.main()


@pytest.mark.parametrize("device", ["cpu", "h100"])
def test_committed_table_is_that_of_the_results(device):
    results = [report.load(path) for path in sorted(RESULTS.glob(f"{device}_*.json"))]
    parts = [part for result in results for part in report.sections(result, report.brief)]
    assert (RESULTS / f"{device}.md").read_text(encoding="utf-8").strip() == "\n\n".join(parts), (
        f"write it again: python -m benchmarks.report benchmarks/results/{device}_*.json --brief"
        f" > benchmarks/results/{device}.md"
    )


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(RESULTS.glob("*.json")) if not p.stem.startswith("tuned")],
    ids=lambda p: p.stem,
)
def test_committed_results_are_read_by_the_report(path):
    result = report.load(path)
    assert result["name"].partition("_")[0] in ("cpu", "h100"), "a device of its own needs a table of its own"
    assert "with changes" not in result["run"]["commit"]
    text = "\n".join(report.sections(result))
    rows = sum(len(case["contenders"]) for case in result["cases"]) + len(result["curves"])
    titles = text.count("\n### ")
    assert sum(line.startswith("| ") for line in text.splitlines()) == rows + titles


@pytest.mark.parametrize("device", ["cpu", "h100"])
def test_figures_in_the_readme_are_those_of_the_results(device):
    table = (RESULTS / f"{device}.md").read_text(encoding="utf-8").splitlines()
    readme = (RESULTS.parents[1] / "README.md").read_text(encoding="utf-8")
    section = readme.partition({"cpu": "## Speed on a CPU", "h100": "## Speed on a GPU"}[device])[2]
    lines = section.partition("\n## ")[0].splitlines()
    measured = [line for line in lines if line.startswith("| ") and " ms; " in line and "×" in line]
    assert len(measured) >= 20
    assert set(measured) <= set(table)


def test_figures_in_the_swapping_guides_are_those_of_the_results():
    result = report.load(RESULTS / "cpu_swap.json")
    rows: dict[tuple[str, str], list[str]] = {}
    for case in result["cases"]:
        project, _, what = report.label(case).partition(" ")
        host, compiled, ours = (
            case["contenders"][name] for name in ("host", "torch.compile", measuring.OURS)
        )
        told = f"{host['median_ms']:.3g} ms; {ours['speedup']:.2f}×; {compiled['speedup']:.2f}×"
        rows.setdefault((project.lower().replace("-", "_"), what), []).append(told)
    assert len(rows) == 19
    for (page, what), cells in rows.items():
        text = (RESULTS.parents[1] / "docs" / "swapping" / f"{page}.md").read_text(encoding="utf-8")
        assert f"| {what} | {' | '.join(cells)} |" in text
        assert f"{result['run']['date']};" in text
