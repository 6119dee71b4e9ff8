"""What the package promises: light imports, no need of Triton, one version, types, telling file names."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import sagan_kernels

ROOT = Path(__file__).parents[1]
PUBLIC = ("sagan_kernels", *(f"sagan_kernels.{name}" for name in ("cli", "models", "nn", "ops")))
NOT_IMPORTED = ("triton", "timm", "torchvision", "gradio", "matplotlib")
VAGUE = ("util", "utils", "helper", "helpers", "common", "misc", "base", "core", "manager", "managers")


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_takes_no_optional_package():
    loaded = python(f"import sys, {', '.join(PUBLIC)}; print(*sys.modules)").split()
    assert set(PUBLIC) <= set(loaded)
    assert not set(NOT_IMPORTED) & set(loaded)


def test_layer_works_where_triton_is_not_installed():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        f"import {', '.join(PUBLIC)}, torch\n"
        "print(tuple(sagan_kernels.nn.SelfAttention2d(8)(torch.zeros(1, 8, 4, 4)).shape))"
    )
    assert python(code) == "(1, 8, 4, 4)"


def test_version_is_that_of_the_installed_package():
    assert importlib.metadata.version("sagan-kernels") == sagan_kernels.__version__


def test_package_ships_its_types():
    assert Path(sagan_kernels.__file__).with_name("py.typed").is_file()


def test_file_names_say_what_is_inside():
    folders = [ROOT / name for name in ("sagan_kernels", "tests", "benchmarks", "zoo")]
    paths = [*ROOT.glob("*"), *(path for folder in folders for path in folder.rglob("*"))]
    paths = [path for path in paths if "__pycache__" not in path.parts]
    assert Path(__file__) in paths
    assert [path for path in paths if path.name.partition(".")[0] in VAGUE] == []
