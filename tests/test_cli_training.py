"""`sagan train`, `sagan evaluate` and `sagan features` from the command line, on a tiny recipe and data set."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from sagan_kernels import Generator, zoo
from sagan_kernels.cli import cli
from sagan_kernels.features import FeatureNet, save_feature_net

NETWORK = "resolution = 32\nnum_classes = 2\nimage_channels = 1\nbase_channels = 8\nattention_at = [16]\n"
RECIPE = f"""
[generator]
{NETWORK}z_dim = 4
widths = [1, 1, 1, 1]
[discriminator]
{NETWORK}widths = [1, 1, 1, 1]
[train]
batch_size = 4
total_kimg = 0.008
score_every = 1
score_images = 4
grid_every = 2
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A recipe, a pack of forty images in two classes, a folder of them, and a zoo with a feature network."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(RECIPE)
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 1), np.uint8)
    np.savez(tmp_path / "pack.npz", images=images, labels=np.arange(40) % 2, class_names=["even", "odd"])
    for i, image in enumerate(images):
        path = tmp_path / "images" / ("odd" if i % 2 else "even") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(path)
    (tmp_path / "zoo" / "features").mkdir(parents=True)
    save_feature_net(
        FeatureNet("tiny-cnn", 1, 2, width=2), tmp_path / "zoo" / "features" / "tiny-cnn.safetensors"
    )
    monkeypatch.setattr(zoo, "zoo_folder", lambda: tmp_path / "zoo")
    return tmp_path


def sagan(*args):
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def refused(code, message, *args):
    result = sagan(*args)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert result.stderr.splitlines()[-1].startswith("sagan: ")
    assert "Traceback" not in result.output


@pytest.mark.parametrize("data", ["pack.npz", "images"])
def test_trained_model_can_be_sampled_and_scored(folder, data):
    result = sagan("train", "tiny.toml", "--data", data, "--features", "tiny-cnn")
    assert result.exit_code == 0, result.output
    assert "networks in runs/tiny/best" in result.stdout
    assert Generator.from_pretrained("runs/tiny/best").class_names == ["even", "odd"]
    assert sagan("sample", "runs/tiny/best", "--label", "odd", "--seeds", "0-1").exit_code == 0
    result = sagan(
        "evaluate", "runs/tiny/best", "--data", data, "--features", "tiny-cnn", "--images", 8, "--json",
        "--neighbors", "near.png",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)
    assert scores["score"] == "FID-tiny-cnn"
    assert scores["samples"]["num_images"] == 8
    assert scores["held_out"]["num_images"] == 4
    with Image.open("near.png") as sheet:
        assert sheet.width > 96


def test_training_again_goes_on_and_changes_nothing(folder):
    assert sagan("train", "tiny.toml", "--data", "pack.npz").exit_code == 0
    before = (folder / "runs" / "tiny" / "metrics.jsonl").read_bytes()
    assert sagan("train", "tiny.toml", "--data", "pack.npz").exit_code == 0
    assert (folder / "runs" / "tiny" / "metrics.jsonl").read_bytes() == before


def test_feature_network_is_trained_to_a_file(folder):
    result = sagan(
        "features", "mine", "--data", "pack.npz", "--channels", 1, "--epochs", 1, "--out", "mine.safetensors"
    )
    assert result.exit_code == 0, result.output
    assert "accuracy on 4 held-out images" in result.stdout
    assert (folder / "mine.safetensors").is_file()


def test_skipping_broken_images_is_asked_for(folder):
    (folder / "images" / "odd" / "1.png").write_bytes(b"\x89PNG nothing")
    refused(1, "1.png: must be an image", "train", "tiny.toml", "--data", "images")
    assert sagan("train", "tiny.toml", "--data", "images", "--broken", "skip").exit_code == 0


@pytest.mark.parametrize(
    ("code", "message", "args"),
    [
        (2, "none.toml: must be a TOML file", ["train", "none.toml", "--data", "pack.npz"]),
        (1, "nowhere must be a folder or an .npz file", ["train", "tiny.toml", "--data", "nowhere"]),
        (1, "empty must hold images", ["train", "tiny.toml", "--data", "empty"]),
        (1, "text.npz: must be an .npz pack", ["train", "tiny.toml", "--data", "text.npz"]),
        (2, "must be one of tiny-cnn", ["train", "tiny.toml", "--data", "pack.npz", "--features", "other"]),
        (2, "did you mean 'lr_g'", ["train", "typo.toml", "--data", "pack.npz"]),
        (2, "must be a zoo entry or a model folder", ["evaluate", "nobody", "--data", "pack.npz"]),
        (2, "--out: must end in .safetensors", ["features", "x", "--data", "pack.npz", "--out", "x.bin"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_input_is_one_line(folder, code, message, args):
    (folder / "empty").mkdir()
    (folder / "text.npz").write_text("no pack")
    (folder / "typo.toml").write_text(RECIPE + "lr_gg = 1\n")
    refused(code, message, *args)


def test_failure_in_mid_training_is_a_line_of_its_own(folder):
    (folder / "wild.toml").write_text(RECIPE + "lr_g = 1e30\nlr_d = 1e30\n")
    refused(1, "start again in another folder", "train", "wild.toml", "--data", "pack.npz")


def test_data_of_other_classes_is_not_scored(folder):
    assert sagan("train", "tiny.toml", "--data", "pack.npz").exit_code == 0
    images = np.zeros((60, 32, 32, 1), np.uint8)
    np.savez("other.npz", images=images, labels=np.arange(60) % 2, class_names=["odd", "even"])
    refused(1, "class 0 of the data must be the generator's 'even', got 'odd'",
            "evaluate", "runs/tiny/best", "--data", "other.npz", "--features", "tiny-cnn")  # fmt: skip


def test_feature_network_of_other_classes_does_not_score_a_training(folder):
    save_feature_net(FeatureNet("five-cnn", 1, 5, width=2), "five.safetensors")
    refused(1, "the feature network must be of 1 channels and 2 classes, got five-cnn with 1 and 5",
            "train", "tiny.toml", "--data", "pack.npz", "--features", "five.safetensors")  # fmt: skip
    assert not (folder / "runs").exists()
