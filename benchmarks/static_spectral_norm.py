"""What every spectral-norm kernel costs on GPUs that are not there: python benchmarks/static_spectral_norm.py.

Compiles each kernel as a launch would, for float32 and bfloat16 weights, on the architectures of static_report.py, and
counts what tells a kernel that lives off bandwidth: registers, spills, loads of 16 bytes. Writes
`benchmarks/results/static_spectral_norm.csv`; a minute and a half on one core.
"""

import argparse
import csv
import dataclasses
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import static_report
import torch

from sagan_kernels.files import write_atomically
from sagan_kernels.ops import spectral_norm_launch
from sagan_kernels.ops.spectral_norm_layout import Item, Rule, layout

OUT = Path(__file__).parent / "results/static_spectral_norm.csv"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WIDE_LOAD = {"cuda": r"LDG\.E\.(?:\w+\.)*128", "hip": r"(?:global|buffer|flat)_load_(?:dwordx4|b128)"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One compiled kernel. Registers a thread, spilling instructions, loads of 16 bytes, bytes of shared memory."""

    kernel: str
    variant: str
    weights: str
    target: str
    registers: int
    spills: int
    wide_loads: int
    shared: int
    programs_per_sm: int
    triton: str


def main() -> None:
    """Compile everything and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--targets", nargs="+", choices=static_report.TARGETS, default=list(static_report.TARGETS)
    )
    parser.add_argument("--weights", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    rows = [
        row for target in arguments.targets for name in arguments.weights for row in rows_of(target, name)
    ]
    write_atomically(arguments.out, lambda temporary: write(rows, temporary))


def write(rows: list[Row], path: Path) -> None:
    """The rows as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
        table.writeheader()
        table.writerows(dataclasses.asdict(row) for row in rows)


def read(path: Path) -> list[Row]:
    """The rows of a CSV file that `write` wrote."""
    numbers = {field.name for field in dataclasses.fields(Row) if field.type is int}
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row(**{name: int(text) if name in numbers else text for name, text in row.items()})
            for row in csv.DictReader(file)
        ]


def rows_of(target: Any, name: str) -> list[Row]:
    """Every kernel of a training and of an evaluation forward, and of the backward."""
    import triton
    from triton.backends.compiler import GPUTarget

    from sagan_kernels.kernels import spectral_norm

    backend, *_ = static_report.TARGETS[target]
    rows: dict[tuple[str, str], Row] = {}
    run = triton.runtime.jit.JITFunction.run

    def warm_up(kernel: Any, *args: Any, **keywords: Any) -> Any:
        compiled = run(kernel, *args, **keywords | {"warmup": True})
        flags = ("STORED", "DOT", "ITERATED", "STORE")
        variant = " ".join(flag.lower() for flag in flags if keywords.get(flag))
        resources = static_report._resources(compiled, target)
        code = compiled.asm["amdgcn"] if backend == "hip" else sass(compiled)
        kept = {key: resources[key] for key in ("registers", "spills", "shared", "programs_per_sm", "triton")}
        label = kernel.fn.__name__.removesuffix("_kernel")
        wide = len(re.findall(WIDE_LOAD[str(backend)], code))
        rows[label, variant] = Row(label, variant, name, target, wide_loads=wide, **kept)
        return compiled

    for kernel in vars(spectral_norm).values():
        if hasattr(kernel, "device_caches"):  # kept for the current device, which is always the same stub
            kernel.device_caches.clear()
    triton.runtime.driver.set_active(static_report._StubDriver(GPUTarget(*static_report.TARGETS[target])))
    weight = torch.empty(64, 64, dtype=DTYPES[name])
    lies = layout(weight.shape, weight.stride(), 0)
    assert lies
    item = Item(weight, weight.new_empty(64), weight.new_empty(64), Rule(), weight.dtype, lies)
    with mock.patch.object(triton.runtime.jit.JITFunction, "run", warm_up):
        plans = spectral_norm_launch.Plans()
        for iterate in (True, False):
            state, _ = plans.launch([item], iterate=iterate, store=iterate)
        state.gradients([weight], [weight], [weight])
    return list(rows.values())


def sass(compiled: Any) -> str:
    """The machine code of a compiled kernel, as text."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([tool, "-c", file.name], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
