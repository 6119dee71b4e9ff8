"""`sagan swap --check` tells what a swap would do to a model that a person has, and fails in one line."""

import json
import sys

import pytest
from click.testing import CliRunner

from sagan_kernels.cli import cli

FACTORIES = """
import torch
from hosts import biggan_pytorch, unlisted


def generator():
    return biggan_pytorch.Generator()


def networks():
    return {"G": biggan_pytorch.Generator(), "D": biggan_pytorch.Discriminator(), "steps": 3}


class Zoo:
    cubed = staticmethod(lambda: [unlisted.CubedAttention(16)])


number = 3
ready = torch.nn.Sequential(biggan_pytorch.Attention(16))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "factories.py").write_text(FACTORIES)
    (tmp_path / "needy.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield lambda *args: CliRunner().invoke(cli, ["swap", "--check", *args])
    sys.modules.pop("factories", None)


def test_model_of_a_factory_in_the_current_folder_is_reported(run):
    done = run("factories:generator")
    assert done.exit_code == 0, done.output
    assert "Generator: 16 of 16 modules swapped" in done.stdout
    assert "blocks.1.1" in done.stdout


def test_each_model_of_several_is_reported(run):
    done = run("factories:networks", "--json", "--no-spectral-norm")
    reports = json.loads(done.stdout)
    assert list(reports) == ["G", "D"]
    assert [row["status"] for report in reports.values() for row in report["rows"]] == ["swapped", "swapped"]


def test_model_that_is_there_already_is_reported(run):
    assert "Sequential: 5 of 5 modules swapped" in run("factories:ready").stdout


def test_unswappable_layer_is_told_of_and_fails_when_strict(run):
    done = run("factories:Zoo.cubed")
    assert done.exit_code == 0
    assert "no known form gives its numbers" in done.stdout
    done = run("factories:Zoo.cubed", "--strict")
    assert done.exit_code == 1
    assert "all that looks swappable must be swapped" in done.stderr


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("factories", "must be MODULE:FACTORY"),
        ("factories:", "must be MODULE:FACTORY"),
        ("no_such_module:generator", "there must be a module 'no_such_module'"),
        ("factories:gen", "must have a function 'gen'"),
        ("factories:number", "must have a function 'number'"),
        ("factories:torch.nn.Identity.__doc__", "must have a function"),
        ("factories:dict", "must have a function"),
    ],
)
def test_wrong_factory_is_a_usage_error_in_one_line(run, asked, message):
    done = run(asked)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_factory_that_makes_no_model_is_a_usage_error(run, tmp_path):
    (tmp_path / "empty.py").write_text("make = dict\n")
    done = run("empty:make")
    assert done.exit_code == 2
    assert "must return a torch.nn.Module" in done.stderr


def test_what_the_module_itself_lacks_is_told(run):
    done = run("needy:make")
    assert done.exit_code == 1
    assert "a_module_that_is_not_there" in done.stderr
