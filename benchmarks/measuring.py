"""How every figure is taken: contenders of one task, checked against float64, then timed in turn.

A suite makes a `Case` and hands it to the fixture `versus`; everything else happens here. A contender that cannot run
keeps its line in the results, with the reason. Ours has no such excuse: what it raises is raised.
"""

import ctypes
import dataclasses
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import sagan_kernels
from benchmarks.roofline import Work

BASELINE, OURS = "eager", "ours"
# float32 sums in another order; TF32 has 10 bits of mantissa, bfloat16 has 7 and its steps add up over a layer
TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "tf32": 2e-2, "float16": 2e-2, "bfloat16": 6e-2}
# what the baseline's gradients may have: on an H100 they had up to 6e-3 in float32, where a max-pool chose otherwise
# between values that are equal to rounding; others must not fail for it
BASELINE_GRADIENTS = {"float32": 1e-2, "tf32": 6e-2}
# and what those of others may have for the same reason, where few do: the mean error is a tenth of the tolerance
FLIPPED = {"float32": 1e-2, "tf32": 6e-2, "float16": 0.1, "bfloat16": 0.1}
# how often the baseline's error a forward in few bits may have: Triton truncates to TF32, cuBLAS rounds
FORWARDS = {"tf32": 6, "float16": 3, "bfloat16": 3}
STEPS = {"tf32": 2**-10, "float16": 2**-10, "bfloat16": 2**-7}  # between neighbouring numbers at 1
GPU_ROUNDS, GPU_SECONDS = 15, 0.5
SPIN_MS, CYCLES_PER_MS = 50, 1.8e6  # a GPU's clock, at about its highest
DTYPES = {
    "float64": torch.float64, "float32": torch.float32, "tf32": torch.float32,
    "float16": torch.float16, "bfloat16": torch.bfloat16,
}  # fmt: skip


@dataclass(frozen=True)
class Contender:
    """One way to do the task.

    Attributes:
        call: does it once and returns its results.
        note: what a reader must know, such as the back end that runs.
        compiles: whether the first call compiles, which is timed apart.
        tolerance: the mean error allowed, where it computes in another precision than its case; single outliers say
            little there.
    """

    call: Callable[[], Any]
    note: str = ""
    compiles: bool = False
    tolerance: float | None = None


@dataclass(frozen=True)
class Case:
    """One task and all who do it.

    Attributes:
        suite: what is measured, such as "attention layer".
        task: which part of it, such as "forward + backward".
        shape: its name, for reports.
        contenders: by name; the first is the baseline, the last ours.
        expected: the results in float64, from a formula none of the contenders uses; None where the suite has compared
            them itself.
        dtype: a key of `DTYPES`.
        layout: "NCHW" or "NHWC".
        batch: images; None for a case without images.
        work: what must be moved and computed at least; None where no roofline is meant.
        length: query positions L, for memory against L.
        tolerance: the mean error allowed, where the largest says little: somewhere in a whole network a ReLU or a
            max-pool chooses otherwise.
        pooled: whether it has a max-pool, so that single gradients may lie elsewhere in few bits.
    """

    suite: str
    task: str
    shape: str
    contenders: dict[str, Contender]
    expected: Callable[[], Any] | None = None
    dtype: str = "float32"
    layout: str = "NCHW"
    batch: int | None = None
    work: Work | None = None
    length: int | None = None
    tolerance: float | None = None
    pooled: bool = False


@dataclass
class Measured:
    """What one contender took; `unavailable` says why there is nothing else.

    `times_ms` are a CPU's or the GPU's own, `host_ms` what the host took to queue the same on a GPU.
    """

    note: str = ""
    unavailable: str = ""
    error: float | None = None
    compile_s: float | None = None
    peak_mib: float | None = None
    times_ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def without_compilers(case: Case) -> Case:
    """The case without contenders that take long to compile, for smoke tests."""
    kept = {name: contender for name, contender in case.contenders.items() if not contender.compiles}
    return dataclasses.replace(case, contenders=kept)


def check(case: Case) -> dict[str, Measured]:
    """Run every contender once and compare it with float64: a wrong result has no speed, but a reason.

    A forward pass in 16 bits may have three times the error that the baseline has there, in TF32 six times, or one step
    of the dtype: the residual of a layer hides a wrong attention from a wider tolerance. A gradient may have twice the
    baseline's error, or the tolerance, or more in single elements where a max-pool comes before it. The baseline itself
    is held to the tolerance, its gradients in float32 and TF32 to a wider one, in 16 bits to none. Contenders with a
    tolerance of their own, and all where the baseline cannot run, are held to the tolerance.

    Raises:
        AssertionError: a result of the baseline or of ours is wrong.
    """
    if any(contender.compiles for contender in case.contenders.values()):
        torch._dynamo.reset()  # each case compiles for itself: past 8 shapes of one function eager would run instead
    expected = None if case.expected is None else tensors(case.expected())
    first, *_, ours = case.contenders
    found = {}
    baseline: list[float] = []
    for name, contender in case.contenders.items():
        measured = found[name] = Measured(note=contender.note)
        try:
            with _own_warnings(contender):
                start = time.perf_counter()
                results = tensors(contender.call())
                synchronize()
                if contender.compiles:
                    measured.compile_s = round(time.perf_counter() - start, 2)
        except Exception as error:
            if name == ours:
                raise
            measured.unavailable = reason(error)
            continue
        if expected is None:
            continue
        errors = relative_errors(results, expected, mean=bool(contender.tolerance or case.tolerance))
        measured.error = max(errors)
        if name == first:
            baseline = errors
        if name == first and case.dtype in ("float16", "bfloat16"):
            continue  # 16 bits are as good as they are; the others are held to what they gave here
        for i, error in enumerate(errors):
            allowed = contender.tolerance or case.tolerance or TOLERANCES[case.dtype]
            if contender.tolerance or case.tolerance:
                pass
            elif name == first and case.task != "forward":
                allowed = BASELINE_GRADIENTS.get(case.dtype, allowed)
            elif name != first and baseline:
                if case.task != "forward":
                    allowed = max(allowed, 2 * baseline[i])
                elif case.dtype in STEPS:
                    allowed = max(STEPS[case.dtype], FORWARDS[case.dtype] * baseline[i])
            if error <= allowed:
                continue
            if case.pooled and case.task != "forward" and error <= FLIPPED.get(case.dtype, 0):
                mean = relative_errors(results, expected, mean=True)[i]
                if mean <= TOLERANCES[case.dtype] / 10:
                    continue
            told = f"must be within {allowed:.0e} of float64, got {error:.1e}"
            if name == first or name.startswith(ours):
                raise AssertionError(f"{case.suite}, {case.task}, {case.shape}, {case.dtype}: {name} {told}")
            measured.unavailable = f"wrong: {told}"
            break
    return found


def measure(case: Case, rounds: int) -> dict[str, Measured]:
    """Check, take the peak memory in a pass of its own, then time A B C, A B C, ... for `rounds` rounds.

    On a GPU for at most `GPU_ROUNDS`, and for no more than five once `GPU_SECONDS` have passed.
    """
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.empty_cache()
    found = check(case)
    running = {name: case.contenders[name] for name, m in found.items() if not m.unavailable}
    for name, contender in running.items():
        with _own_warnings(contender):
            found[name].peak_mib = peak_mib(contender.call)
    start = time.perf_counter()
    for i in range(min(rounds, GPU_ROUNDS) if gpu else rounds):
        if gpu and i >= 5 and time.perf_counter() - start > GPU_SECONDS:
            break
        for name, contender in running.items():
            with _own_warnings(contender):
                if gpu:
                    found[name].host_ms.append(host_ms(contender.call))
                    found[name].times_ms.append(device_ms(contender.call, found[name].host_ms[-1]))
                else:
                    found[name].times_ms.append(time_ms(contender.call))
    return found


def time_ms(call: Callable[[], Any]) -> float:
    """Milliseconds of one call that has been made before; on a GPU those of the device."""
    host = host_ms(call)
    return device_ms(call, host) if torch.cuda.is_available() else host


def host_ms(call: Callable[[], Any]) -> float:
    """Milliseconds until one call returns; on a GPU, idle before, that is what it takes to queue the work."""
    synchronize()
    start = time.perf_counter()
    call()
    taken = time.perf_counter() - start
    synchronize()
    return 1e3 * taken


def device_ms(call: Callable[[], Any], host: float) -> float:
    """Milliseconds of a GPU for one call, by events, its L2 overwritten before and its queue full.

    The GPU spins while the host, which takes `host` milliseconds, queues the call. A call that waits for the GPU, or
    that takes the host longer than `SPIN_MS`, leaves the queue empty in between, and those gaps are counted.
    """
    _overwrite_l2()
    torch.cuda._sleep(int(min(1.5 * host + 0.3, SPIN_MS) * CYCLES_PER_MS))
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    call()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after)


def peak_mib(call: Callable[[], Any]) -> float | None:
    """MiB that a call needs at its peak beyond what was held before; None where nobody counts them.

    On a GPU as PyTorch's allocator counts, on Linux as the resident set grows, in pages.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 2)
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not os.access(reset, os.W_OK):
        return None
    ctypes.CDLL(None).malloc_trim(0)  # else freed memory is taken again and no growth is seen
    reset.write_text("5")  # the peak is now what is held

    def held(key: str) -> int:
        return int(re.findall(rf"{key}:\s+(\d+)", status.read_text())[0])

    before = held("VmRSS")
    call()
    return round(max(held("VmHWM") - before, 0) / 1024, 2)


def summary(case: Case, found: dict[str, Measured]) -> dict[str, Any]:
    """The case as it is stored: medians, quartiles, and the speed over the baseline in the same rounds.

    From a GPU also the host's median and speed.
    """
    first = next(iter(found.values()))
    baseline = first.times_ms
    rows: dict[str, Any] = {}
    for name, m in found.items():
        row = {key: value for key, value in vars(m).items() if value not in (None, "", [])}
        row.pop("times_ms", None)
        row.pop("host_ms", None)
        if m.times_ms:
            row["rounds"] = len(m.times_ms)
            low, middle, high = quartiles(m.times_ms)
            row |= {"median_ms": round(middle, 4), "quartiles_ms": [round(low, 4), round(high, 4)]}
            if baseline:
                low, middle, high = quartiles([a / b for a, b in zip(baseline, m.times_ms, strict=True)])
                row |= {"speedup": round(middle, 3), "quartiles_speedup": [round(low, 3), round(high, 3)]}
        if m.host_ms:
            row["host_ms"] = round(statistics.median(m.host_ms), 4)
            if first.host_ms:
                ratios = [a / b for a, b in zip(first.host_ms, m.host_ms, strict=True)]
                row["speedup_host"] = round(statistics.median(ratios), 3)
        rows[name] = row
    told = {
        key: getattr(case, key) for key in ("suite", "task", "shape", "dtype", "layout", "batch", "length")
    }
    work = None if case.work is None else vars(case.work)
    return told | {"work": work, "contenders": rows}


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The first quartile, the median and the third, of at least one value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def relative_errors(
    found: list[torch.Tensor], expected: list[torch.Tensor], mean: bool = False
) -> list[float]:
    """For each tensor the largest error, or the mean one, over its largest value.

    A tensor that is small beside the others is measured against a hundredth of the largest. One that even in float64
    is nothing but rounding, such as the gradient of a bias of keys or before a batch norm, is measured against the
    largest: its terms cancel, and they are as large as those of the others.
    """
    assert [t.shape for t in found] == [t.shape for t in expected], "results must have the expected shapes"
    scales = [t.abs().max().item() for t in expected]
    errors = []
    for actual, wanted, scale in zip(found, expected, scales, strict=True):
        difference = (actual.detach().double() - wanted).abs()
        error = (difference.mean() if mean else difference.max()).item()
        least = 1e-2 if scale > 1e-10 * max(scales) else 1.0
        errors.append(error / max(scale, least * max(scales), 1e-300))
    return errors


def numbers(variable: str, default: str) -> list[int]:
    """The positive integers that an environment variable lists.

    Raises:
        ValueError: it lists something else.
    """
    text = os.environ.get(variable, default)
    if not all(word.isdecimal() and int(word) for word in text.split()) or not text.split():
        raise ValueError(f"{variable}: must be positive integers, got {text!r}; give such as '1' or '1 8'")
    return [int(word) for word in text.split()]


def reason(error: Exception) -> str:
    """One line of what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:160]


@contextmanager
def pinned_threads() -> Iterator[None]:
    """A context with BENCH_THREADS threads, or all, each kept to as many processors."""
    before = torch.get_num_threads()
    threads = numbers("BENCH_THREADS", str(before))[0]
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else set()
    torch.set_num_threads(threads)
    if len(allowed) > threads:
        os.sched_setaffinity(0, sorted(allowed)[-threads:])
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if allowed:
            os.sched_setaffinity(0, allowed)


HEAPS = ("settled", "kept")


def settle_heap() -> None:
    """Fix what glibc keeps of freed memory, so that no figure depends on what ran before, as BENCH_HEAP asks.

    "settled", the default, is where glibc's own adjustment ends in any process that has freed a block of 32 MB: blocks
    from there on are mapped anew at each allocation, and 64 MB and more at the end of the heap go back to the system.
    "kept" gives nothing back, as some allocators do: no contender pays for fresh pages.

    Raises:
        ValueError: BENCH_HEAP asks for something else.
    """
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # of mallopt(3)
    options = {
        "settled": ((mmap_threshold, 32 << 20), (trim_threshold, 64 << 20)),
        "kept": ((mmap_max, 0), (trim_threshold, 2**31 - 1)),
    }
    if (heap := _heap()) in options:
        libc = ctypes.CDLL(None)
        for option, value in options[heap]:
            libc.mallopt(option, value)


def _heap() -> str:
    asked = os.environ.get("BENCH_HEAP", HEAPS[0])
    if asked not in HEAPS:
        raise ValueError(f"BENCH_HEAP: must be of {', '.join(HEAPS)}, got {asked!r}")
    return asked if platform.libc_ver()[0] == "glibc" else "the system's"


def environment() -> dict[str, Any]:
    """What a figure was measured on, and how to measure it again."""
    found = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "kind": device().type,
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": numbers("BENCH_THREADS", str(torch.get_num_threads()))[0],
        "processors": os.cpu_count(),
        "heap": _heap(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sagan_kernels": sagan_kernels.__version__,
        "commit": _commit(),
        "command": _command(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    if torch.cuda.is_available():
        import triton

        found |= {"triton": triton.__version__, "cuda": torch.version.cuda or torch.version.hip}
        asked = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
        found["driver and clocks"] = _output("nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader")
    return found


@contextmanager
def arithmetic(dtype: str) -> Iterator[None]:
    """Products of float32 in TF32 where `dtype` is "tf32", in full precision otherwise."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def tensors(results: Any) -> list[torch.Tensor]:
    """A result, or several, as a list."""
    return [results] if isinstance(results, torch.Tensor) else list(results)


@contextmanager
def _own_warnings(contender: Contender) -> Iterator[None]:
    """A compiler's warnings are not ours to fix."""
    with warnings.catch_warnings():
        if contender.compiles:
            warnings.simplefilter("ignore")
        yield


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


_flush: list[torch.Tensor] = []


def _overwrite_l2() -> None:
    if not _flush:
        size = torch.cuda.get_device_properties(0).L2_cache_size
        _flush.append(torch.empty(max(2 * size, 2**26), dtype=torch.int8, device="cuda"))
    _flush[0].zero_()


def _processor() -> str:
    if Path("/proc/cpuinfo").exists():
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if names:
            return f"{names[0]}, {torch.backends.cpu.get_cpu_capability()}"
    return platform.processor() or platform.machine()


def _command() -> str:
    module = sys.modules["__main__"].__spec__
    name = f"python -m {module.name.removesuffix('.__main__')}" if module else Path(sys.argv[0]).name
    asked = [
        f"{key}={shlex.quote(os.environ[key])}"
        for key in sorted(os.environ)
        if key.startswith("BENCH_") and key != "BENCH_COMMIT"
    ]
    return " ".join([*asked, name, shlex.join(sys.argv[1:])])


def _commit() -> str:
    if told := os.environ.get("BENCH_COMMIT"):
        return told
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return f"{commit} with changes" if commit and changed else commit


def _output(*command: str) -> str:
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
