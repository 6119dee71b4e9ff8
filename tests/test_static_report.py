"""Every kernel compiles for real GPUs on a machine that has none: ptxas ships inside the Triton wheel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="static compilation needs the package triton")
ROOT = Path(__file__).parents[1]
TABLE = ROOT / "benchmarks/results/static.csv"
TILE = ("kernel", "shape", "layout", "precision", "target", "tiling")
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB a program may have


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


def test_no_kernel_spills_on_ampere_and_hopper(table):
    spilling = [row for row in table if row.target in ("sm_80", "sm_90") and row.spills]
    assert not spilling


def test_every_kernel_uses_tensor_cores_and_fits_a_multiprocessor(table):
    assert {row.target for row in table} == set(SHARED)
    for row in table:
        assert row.tensor_core > 0, row
        assert row.shared <= SHARED[row.target] * 1024, row
        assert row.programs_per_sm >= 1, row
        assert row.exponentials > 0 or row.kernel == "project_pool", row


@pytest.mark.parametrize(
    ("target", "precision"), [("sm_80", "bf16"), ("sm_90", "bf16"), ("sm_100", "bf16"), ("gfx942", "bf16")]
)
def test_compiling_again_gives_the_committed_figures(target, precision, static_report, table, tmp_path):
    options = ("--targets", target, "--precisions", precision, "--shapes", "D128 64×64 C64")
    found = run_report(static_report, tmp_path / "again.csv", *options)
    rows = [
        r for r in table if (r.target, r.precision, r.shape) == (target, precision, "D128 64×64 C64")
    ]  # fmt: skip
    assert [tuple(getattr(r, n) for n in TILE) for r in found] == [
        tuple(getattr(r, n) for n in TILE) for r in rows
    ]
    assert not [row for row in found if row.spills and target in ("sm_80", "sm_90")]
    if found[0].triton == rows[0].triton:  # another compiler, other registers
        assert found == rows
