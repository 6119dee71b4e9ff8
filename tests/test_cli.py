"""The sagan command: what it writes, what it says, and how it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from sagan_kernels import zoo
from sagan_kernels.cli import cli, parse_seeds
from sagan_kernels.models import Generator
from sagan_kernels.one_line_errors import OneLineErrors

ROOT = Path(__file__).parent.parent
NAMES = ["T-shirt/top", "Bag", "Ankle boot"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working directory, a zoo of two, and the weights of one."""
    (tmp_path / "zoo").mkdir()
    recipe = "[generator]\nresolution = 32\nnum_classes = 3\n"
    (tmp_path / "zoo" / "sagan_32_raw.toml").write_text(recipe)
    (tmp_path / "zoo" / "sagan_32_tiny.toml").write_text(recipe + '[weights]\nlicense = "cc0"\nfid = 12.5\n')
    torch.manual_seed(0)
    generator = Generator(32, 3, z_dim=5, base_channels=2, attention_at=(), image_channels=1)
    generator.save_pretrained(tmp_path / "zoo" / "sagan_32_tiny", NAMES)
    monkeypatch.setattr(zoo, "zoo_folder", lambda: tmp_path / "zoo")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "zoo" / "sagan_32_tiny"


def sagan(*args):
    return CliRunner().invoke(cli, args)


def names(folder="."):
    return sorted(path.name for path in Path(folder).iterdir())


def refused(code, message, *args):
    """The command ends with `code` and one line that holds `message`, and nothing else."""
    result = sagan(*args)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("sagan: ")
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", cli.commands)
def test_help_shows_each_example_on_a_line_of_its_own(command):
    result = sagan(command, "--help")
    assert result.exit_code == 0
    assert "\\b" not in result.stdout
    if command != "list":
        assert result.stdout.splitlines()[-1].startswith(f"  sagan {command} ")


def test_sample_writes_an_image_a_seed_named_by_seed_and_label():
    result = sagan("sample", "sagan_32_tiny", "--seeds", "1,4-5", "--label", "2", "--out", "here")
    assert result.exit_code == 0, result.output
    assert names("here") == [f"seed000{seed}_label2.png" for seed in (1, 4, 5)]
    assert "3 images in here" in result.stdout
    on = "cuda, implementation: triton" if torch.cuda.is_available() else "cpu, implementation: torch"
    assert f"s on {on}" in result.stdout
    with Image.open("here/seed0004_label2.png") as image:
        assert (image.size, image.mode) == ((32, 32), "L")


def test_a_file_name_says_how_to_draw_the_image_again():
    sagan("sample", "sagan_32_tiny", "--seeds", "0-3", "--batch-size", "3", "--out", "first")
    for path in Path("first").iterdir():
        seed, label = path.stem.removeprefix("seed").split("_label")
        sagan(
            "sample", "sagan_32_tiny", "--seeds", seed, "--label", NAMES[int(label)].upper(), "--out", "again"
        )
        with Image.open(path) as first, Image.open(Path("again") / path.name) as again:
            assert np.abs(np.asarray(first, int) - np.asarray(again, int)).max() <= 1


def test_default_folder_is_samples_unless_a_grid_is_asked_for():
    result = sagan("sample", "sagan_32_tiny", "--seeds", "0-9", "--grid", "deep/grid.png")
    assert result.exit_code == 0, result.output
    assert "grid of 10 images: " + str(Path("deep/grid.png")) in result.stdout
    assert not Path("samples").exists()
    assert sagan("sample", "sagan_32_tiny", "--seeds", "0").exit_code == 0
    assert len(names("samples")) == 1
    sagan("sample", "sagan_32_tiny", "--seeds", "0", "--grid", "grid.png", "--out", "both")
    assert len(names("both")) == 1
    assert Path("grid.png").exists()


def test_label_all_draws_a_row_a_class():
    result = sagan(
        "sample", "sagan_32_tiny", "--seeds", "3-4", "--label", "all", "--grid", "g.png", "--out", "o"
    )
    assert result.exit_code == 0, result.output
    assert "6 images in o" in result.stdout
    with Image.open("g.png") as sheet:
        assert sheet.size[0] > 2 * 102 + 50  # room for the class names
        assert sheet.size[1] == 6 + 3 * (96 + 20)


def test_truncation_changes_the_image():
    for out, options in (("full", []), ("cut", ["--truncation", "0.3"])):
        result = sagan("sample", "sagan_32_tiny", "--seeds", "2", "--label", "0", "--out", out, *options)
        assert result.exit_code == 0, result.output
    assert Path("full/seed0002_label0.png").read_bytes() != Path("cut/seed0002_label0.png").read_bytes()


def test_a_model_folder_is_sampled_like_a_name(folder):
    assert sagan("sample", str(folder), "--seeds", "7", "--label", "0", "--out", "o").exit_code == 0


def test_an_unconditional_model_takes_no_label():
    Generator(32, 0, z_dim=5, base_channels=2, attention_at=()).save_pretrained("plain")
    assert sagan("sample", "./plain", "--seeds", "3", "--out", "o", "--grid", "g.png").exit_code == 0
    assert names("o") == ["seed0003.png"]
    refused(2, "must be left out for an unconditional model, got '0'", "sample", "./plain", "--label", "0")


def test_list_shows_names_weights_and_scores():
    result = sagan("list")
    assert result.exit_code == 0
    assert [line.split() for line in result.stdout.splitlines()[1:]] == [
        ["sagan_32_raw", "32", "3", "no"],
        ["sagan_32_tiny", "32", "3", "yes", "fid", "12.5"],
    ]


def test_list_speaks_json():
    rows = json.loads(sagan("list", "--json").stdout)
    assert rows[0] == {
        "name": "sagan_32_raw", "resolution": 32, "num_classes": 3, "pretrained": False, "weights": {},
    }  # fmt: skip
    assert rows[1]["weights"] == {"license": "cc0", "fid": 12.5}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["sagan_32_tyni"], "got 'sagan_32_tyni'; did you mean 'sagan_32_tiny' or 'sagan_32_raw'?"),
        (["sagan_32_raw"], "pretrained weights are there for sagan_32_tiny, got 'sagan_32_raw'"),
        (["sagan_32_tiny", "--label", "3"], "--label: must be 0 to 2, got 3"),
        (["sagan_32_tiny", "--label", "-1"], "--label: must be 0 to 2, got -1"),
        (["sagan_32_tiny", "--label", "Ankel boot"], "got 'Ankel boot'; did you mean 'Ankle boot'?"),
        (["sagan_32_tiny", "--label", "9.5"], "must be 0 to 2 or a class name, got '9.5'; T-shirt/top, Bag"),
        (["sagan_32_tiny", "--truncation", "0"], "--truncation: must be positive, got 0.0"),
        (["sagan_32_tiny", "--truncation", "-1"], "--truncation: must be positive, got -1.0"),
        (["sagan_32_tiny", "--truncation", "nan"], "--truncation: must be positive, got nan"),
        (["sagan_32_tiny", "--truncation", "x"], "'--truncation': 'x' is not a valid float"),
        (["sagan_32_tiny", "--batch-size", "0"], "'--batch-size': 0 is not in the range"),
        (["sagan_32_tiny", "--grid", "grid.gif"], "--grid: must end in .png, got 'grid.gif'"),
        (["sagan_32_tiny", "--sedes", "3"], "--sedes"),
        ([], "Missing argument 'MODEL'"),
    ],
    ids=str,
)
def test_usage_errors_are_one_line_and_code_2(args, message):
    refused(2, message, "sample", *args)
    assert not Path("samples").exists()


def test_an_unknown_command_is_one_line_and_code_2():
    refused(2, "No such command 'smaple'", "smaple")


@pytest.mark.parametrize("text", ["", "x", "1,,2", "1-", "-3", "6-4", "1.5", "1-2-3", "²", "1;2", "9" * 30])
def test_a_seed_list_that_is_none_is_refused(text):
    refused(2, "--seeds: must be numbers below 10**18 and rising ranges such as 1,4-6, got ", "sample", "sagan_32_tiny",
            f"--seeds={text}")  # fmt: skip


def test_seed_lists_are_parsed():
    assert parse_seeds("1, 4-6,4") == [1, 4, 5, 6, 4]
    with pytest.raises(ValueError, match="at most 1000000 seeds"):
        parse_seeds("5,0-999999999999")


def test_failures_are_one_line_and_code_1(folder):
    path = folder / "generator.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    refused(1, "the file is truncated or altered", "sample", "sagan_32_tiny")
    path.write_bytes(whole)
    text = (folder / "config.json").read_text("utf-8")
    (folder / "config.json").write_text(text.replace('"format_version": 1', '"format_version": 2'), "utf-8")
    refused(1, "format_version must be at most 1, got 2", "sample", "sagan_32_tiny")
    (folder / "config.json").write_text(text.replace('"sha256"', '"sha"'), "utf-8")
    refused(1, "must have the key 'sha256'", "sample", "sagan_32_tiny")
    (folder / "config.json").write_text(text, "utf-8")
    path.rename(folder / "generator.pt")
    refused(1, "generator.pt, a pickle, refused", "sample", "sagan_32_tiny")
    assert not Path("samples").exists()


def test_a_folder_that_cannot_be_made_is_code_1(monkeypatch):
    Path("file").write_text("")
    refused(1, "could not be written", "sample", "sagan_32_tiny", "--out", "file/below")

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    refused(
        1,
        "could not be written, Permission denied; the old file",
        "sample",
        "sagan_32_tiny",
        "--grid",
        "g.png",
    )


def test_a_disk_that_fills_up_leaves_the_old_picture(monkeypatch):
    assert sagan("sample", "sagan_32_tiny", "--seeds", "0", "--grid", "g.png").exit_code == 0
    before = Path("g.png").read_bytes()

    def fill(image, path, *_):
        path.write_bytes(b"\x89PNG half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill)
    refused(1, "g.png: could not be written, No space left", "sample", "sagan_32_tiny", "--grid", "g.png")
    assert Path("g.png").read_bytes() == before
    assert names() == ["g.png", "zoo"]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("a\nb"), 1, "a b"),
        (PermissionError(13, "Permission denied", "x.png"), 1, "x.png: Permission denied"),
        (RuntimeError("out of memory"), 1, "RuntimeError: out of memory; SAGAN_TRACEBACK=1 shows where"),
        (AssertionError(), 1, "AssertionError: ; SAGAN_TRACEBACK=1 shows where"),
        (ValueError(), 1, "ValueError"),
        (click.UsageError("no"), 2, "no"),
    ],
    ids=repr,
)
def test_any_command_of_the_group_fails_in_one_line(error, code, line, monkeypatch):
    @click.group(cls=OneLineErrors)
    def group():
        pass

    @group.command()
    def fail():
        raise error

    result = CliRunner().invoke(group, ["fail"])
    assert (result.exit_code, result.stderr) == (code, f"sagan: {line}\n")
    monkeypatch.setenv("SAGAN_TRACEBACK", "1")
    result = CliRunner().invoke(group, ["fail"])
    assert result.exit_code == code
    assert "Traceback" in result.stderr


def test_an_interrupt_ends_with_one_line_and_code_130(monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("sagan_kernels.sampling.draw", interrupt)
    result = sagan("sample", "sagan_32_tiny")
    assert (result.exit_code, result.stderr.strip()) == (130, "sagan: interrupted")


def test_the_installed_form_of_the_command_gives_its_exit_code():
    run = [sys.executable, "-c", "from sagan_kernels.cli import cli; cli()", "sample", "no_such_model"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "sagan: from_pretrained: must be a zoo entry or a model folder, got 'no_such_"
    )
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("device", ["meta", "nonsense"])
def test_a_device_that_cannot_run_is_a_usage_error(device):
    refused(2, f"--device: must be one that PyTorch has here, such as cpu, got {device!r}", "sample",
            "sagan_32_tiny", "--device", device)  # fmt: skip
