"""The spectral-norm kernels compile for real GPUs on a machine that has none, and read 16 bytes at a time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="static compilation needs the package triton")
ROOT = Path(__file__).parents[1]
TABLE = ROOT / "benchmarks/results/static_spectral_norm.csv"
VARIANTS = 7  # kernels, each as training and evaluation launch it


@pytest.fixture(scope="module")
def report():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import static_spectral_norm

    yield static_spectral_norm
    sys.path.remove(str(ROOT / "benchmarks"))


def test_kernels_spill_nothing_and_load_vectors(report):
    table = report.read(TABLE)
    assert {(row.target, row.weights) for row in table} == {
        (target, weights) for target in ("sm_80", "sm_90", "sm_100", "gfx942") for weights in ("fp32", "bf16")
    }
    assert len(table) == 8 * VARIANTS
    for row in table:
        assert row.spills == 0, row
        assert row.wide_loads > 0, row
        assert row.programs_per_sm >= 4, row


@pytest.mark.parametrize(("target", "weights"), [("sm_90", "fp32"), ("gfx942", "bf16")])
def test_compiling_again_gives_the_committed_figures(target, weights, report, tmp_path):
    # a process of its own: in this one kernels are interpreted, and what is interpreted cannot be compiled
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks/static_spectral_norm.py")]
    command += ["--out", str(tmp_path / "again.csv"), "--targets", target, "--weights", weights]
    done = subprocess.run(
        command, env=env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = report.read(tmp_path / "again.csv")
    rows = [row for row in report.read(TABLE) if (row.target, row.weights) == (target, weights)]
    assert [(row.kernel, row.variant) for row in found] == [(row.kernel, row.variant) for row in rows]
    assert all(row.spills == 0 and row.wide_loads > 0 for row in found)
    if found[0].triton == rows[0].triton:  # another compiler, other registers
        assert found == rows, "run python benchmarks/static_spectral_norm.py and commit the table"
