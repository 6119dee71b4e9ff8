"""Every kernel compiles for real GPUs on a machine that has none: ptxas ships inside the Triton wheel."""

import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from sagan_kernels.ops import configs

pytest.importorskip("triton", reason="static compilation needs the package triton")
ROOT = Path(__file__).parents[1]
TABLE = ROOT / "benchmarks/results/static.csv"
TILE = ("kernel", "shape", "layout", "precision", "target", "tiling")
FIGURES = ("registers", "spills", "shared", "programs_per_sm", "tensor_core", "exponentials", "triton")
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB a program may have


FEW = 8  # the column passes of one image, whose queries are split, need a register or two more
# of tilings that were timed on a Hopper GPU the fastest count, whether they spill or not
TIMED = {
    f"L {row[2]} S {row[3]} warps {row[4]} stages {row[5]}"
    for (_, arch), table in configs._TABLES.items()
    for rows in table.values()
    for row in rows
    if arch == "sm_90" and len(row) == 6
}


@pytest.fixture(scope="module")
def static_report():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import static_report

    yield static_report
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def table(static_report):
    return static_report.read(TABLE)


def run_report(static_report, out, *options):
    # a process of its own: in this one kernels are interpreted, and what is interpreted cannot be compiled
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks/static_report.py"), "--out", str(out), *options]
    done = subprocess.run(
        command, env=env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return static_report.read(out)


def test_table_holds_every_tiling_that_may_run(static_report, table, tmp_path):
    def tilings(rows):
        return [tuple(getattr(row, name) for name in TILE) for row in rows]

    planned = run_report(static_report, tmp_path / "plan.csv", "--plan")
    assert tilings(planned) == tilings(table), "run python benchmarks/static_report.py and commit the table"


def test_kernels_spill_on_ampere_and_hopper_only_where_that_was_timed(table):
    spilling = [row for row in table if row.target in ("sm_80", "sm_90") and row.spills > FEW]
    assert {row.target for row in spilling} == {"sm_90"}
    assert {row.tiling for row in spilling} <= TIMED
    assert max(row.spills for row in spilling) < 100


def test_every_kernel_uses_tensor_cores_and_fits_a_multiprocessor(table):
    assert {row.target for row in table} == set(SHARED)
    for row in table:
        assert row.tensor_core > 0, row
        assert row.shared <= SHARED[row.target] * 1024, row
        assert row.programs_per_sm >= 1, row
        assert row.exponentials > 0 or row.kernel == "project_pool", row


def test_compiling_again_gives_the_committed_figures(static_report, table, tmp_path):
    sample = sampled(table)
    for name in ("kernel", "target", "precision"):
        assert {getattr(row, name) for row in sample} == {getattr(row, name) for row in table}
    names = [f"{r.kernel}|{r.shape}|{r.layout}|{r.precision}|{r.target}" for r in sample]
    found = run_report(static_report, tmp_path / "again.csv", "--rows", *names)
    # another compiler, other registers
    compared = (*TILE, *(FIGURES if found[0].triton == sample[0].triton else ()))
    assert [tuple(getattr(r, n) for n in compared) for r in found] == [
        tuple(getattr(r, n) for n in compared) for r in sample
    ], "run python benchmarks/static_report.py and commit the table"
    assert not [
        row
        for row in found
        if row.spills > FEW and row.target in ("sm_80", "sm_90") and row.tiling not in TIMED
    ]


def sampled(table):
    """A row for every kernel, of every target and precision in turn; the kernels' own text chooses which.

    So the sample is the same until a kernel or a tiling changes, and then it is another.
    """
    sources = [*sorted((ROOT / "sagan_kernels/kernels").glob("*.py")), ROOT / "sagan_kernels/ops/configs.py"]
    chosen_by = random.Random(b"".join(path.read_bytes() for path in sources))
    groups = {}
    for row in table:
        groups.setdefault((row.target, row.precision), []).append(row)
    kernels, sample = sorted({row.kernel for row in table}), []
    chosen_by.shuffle(kernels)
    for kernel, group in zip(kernels, itertools.cycle(groups.values()), strict=False):
        sample.append(chosen_by.choice([row for row in group if row.kernel == kernel]))
    return [row for row in table if row in sample]
