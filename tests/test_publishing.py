"""Zoo entries as repositories of the Hub: complete, licensed, loadable, or not published at all."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hub_server import Fault
from huggingface_hub import ModelCard
from PIL import Image

from sagan_kernels import publishing, sampling, zoo
from sagan_kernels.cli import cli
from sagan_kernels.models import Discriminator, Generator

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")

FILES = ["README.md", "attention.png", "config.json", "discriminator.safetensors", "generator.safetensors"]
NETWORK = "resolution = 32\nnum_classes = 3\nbase_channels = 8\nattention_at = [16]\n"
ENTRY = f"""[generator]
z_dim = 5
{NETWORK}[discriminator]
{NETWORK}[train]
batch_size = 4
lr_g = 3e-4
augment = ["translation"]
[data]
name = "Dots & bars"
license = "cc0-1.0"
[weights]
license = "mit"
score = "FID-dots-cnn"
fid = 1.25
num_images = 1200
seed = 7
compute = "2 hours on one core"
"""
CARD = """---
license: mit
---

# Tiny dots

A generator of dots.

![Samples](samples.png)

## Figures

FID-dots-cnn 1.250 over 1,200 samples, seed 7.

## Training

By hand.

### What was tried

Nothing else.

## Data

Dots, under `cc0-1.0`.

## Use and limits

For tests.

## Licence and citation

The weights are under `mit`. Zhang et al., arXiv:1805.08318.
"""


def add_entry(folder, name):
    (folder / f"{name}.toml").write_text(ENTRY)
    Generator(32, 3, z_dim=5, base_channels=8, attention_at=(16,)).save_pretrained(folder / name, list("abc"))
    Discriminator(32, 3, base_channels=8, attention_at=(16,)).save_pretrained(folder / name)
    (folder / name / "README.md").write_text(CARD)
    Image.new("RGB", (8, 8)).save(folder / name / "samples.png")
    return folder / name


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The folder of the one entry with weights in a zoo of two, and an empty working directory."""
    (tmp_path / "zoo").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "zoo" / "sagan_32_raw.toml").write_text(ENTRY.partition("[weights]")[0])
    monkeypatch.setattr(zoo, "zoo_folder", lambda: tmp_path / "zoo")
    monkeypatch.chdir(tmp_path / "here")
    return add_entry(tmp_path / "zoo", "sagan_32_tiny")


def sagan(*args, code=0):
    result = CliRunner().invoke(cli, ["publish", *args])
    assert result.exit_code == code, result.output
    return result.stdout


def refused(code, message, *args):
    """The command ends with one line that holds `message`."""
    result = CliRunner().invoke(cli, ["publish", *args])
    lines = [line for line in result.stderr.splitlines() if line.startswith("sagan: ")]
    assert (result.exit_code, len(lines)) == (code, 1), result.output
    assert message in lines[0]
    assert result.stdout == ""


def test_dry_run_writes_the_folder_and_asks_nobody(tiny, hub):
    told = sagan("sagan_32_tiny", "--repo", "ada/tiny", "--dry-run")
    assert told == f"ada/tiny: {Path('published/sagan_32_tiny')}\n"
    names = sorted(path.name for path in Path("published/sagan_32_tiny").iterdir())
    assert names == [*FILES, "sagan_32_tiny.toml", "samples.png"]
    assert not hub.requests


def test_card_says_what_the_entry_says(tiny):
    sagan("sagan_32_tiny", "--repo", "ada/tiny", "--dry-run", "--out", "out")
    card = ModelCard.load("out/sagan_32_tiny/README.md")
    data = card.data
    assert (data.license, data.to_dict()["data_license"]) == ("mit", "cc0-1.0")
    assert (data.library_name, data.pipeline_tag) == ("sagan-kernels", "unconditional-image-generation")
    assert set(data.tags) >= {"gan", "class-conditional"}
    (result,) = data.eval_results
    assert data.model_name == "sagan_32_tiny"
    assert (result.dataset_name, result.dataset_type) == ("Dots & bars", "dots-bars")
    assert (result.metric_name, result.metric_type, result.metric_value) == (
        "FID-dots-cnn",
        "fid-dots-cnn",
        1.25,
    )
    assert result.metric_args == {"num_images": 1200, "seed": 7}
    for part in ("# Tiny dots", "A generator of dots.", "2 hours on one core", "lr_g = 0.0003", "(samples.png)",
                 "(attention.png)", "### What was tried", "arXiv:1805.08318", "revision="):  # fmt: skip
        assert part in card.text, part
    for link in re.findall(r"\]\(([^)]+)\)", card.text):
        assert (Path("out/sagan_32_tiny") / link).is_file(), link


def test_published_entry_is_loaded_by_its_own_usage(ada, tiny):
    told = sagan("sagan_32_tiny", "--repo", "ada/tiny")
    assert (
        told == f"sagan_32_tiny: {ada.url}/ada/tiny/commit/{ada.repositories['ada/tiny'].branches['main']}\n"
    )
    card = ada.content("ada/tiny", "README.md").decode()
    (usage,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert usage.count("\n") == 3
    names: dict = {}
    exec(usage, names)
    assert len(names["images"]) == 8
    for cls in (Generator, Discriminator):
        first, again = cls.from_pretrained("sagan_32_tiny"), cls.from_pretrained("ada/tiny")
        assert again.class_names == ["a", "b", "c"]
        for key, value in first.state_dict().items():
            assert torch.equal(value, again.state_dict()[key])


def test_publishing_again_commits_only_what_changed(ada, tiny):
    sagan("sagan_32_tiny", "--repo", "ada/tiny", "--private")
    assert ada.repositories["ada/tiny"].private
    before = dict(ada.repositories["ada/tiny"].branches)
    sagan("sagan_32_tiny", "--repo", "ada/tiny")
    assert ada.repositories["ada/tiny"].branches == before
    (tiny / "README.md").write_text(CARD.replace("For tests.", "For all."))
    assert "/discussions/1" in sagan("sagan_32_tiny", "--repo", "ada/tiny", "--create-pr")
    assert ada.repositories["ada/tiny"].branches["main"] == before["main"]
    assert b"For all." in ada.content("ada/tiny", "README.md", "refs/pr/1")


def test_all_is_one_command_and_nothing_is_pushed_before_all_are_complete(ada, tiny):
    other = add_entry(tiny.parent, "sagan_32_zebra")
    (other / "README.md").unlink()
    refused(1, "sagan_32_zebra/README.md must be there", "--all", "--repo", "ada")
    assert not ada.repositories
    (other / "README.md").write_text(CARD)
    sagan("--all", "--repo", "ada")
    assert set(ada.repositories) == {"ada/sagan-32-tiny", "ada/sagan-32-zebra"}
    assert Generator.from_pretrained("ada/sagan-32-zebra").z_dim == 5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["sagan_32_tyni", "--repo", "a/b"], "did you mean 'sagan_32_tiny'"),
        (["sagan_32_raw", "--repo", "a/b"], "are there for sagan_32_tiny, got 'sagan_32_raw'"),
        (["sagan_32_tiny", "--repo", "b"], "--repo: must be namespace/name, got 'b'"),
        (["sagan_32_tiny", "--repo", "../b"], "--repo: must be namespace/name, got '../b'"),
        (["sagan_32_tiny", "--repo", "b", "--all"], "either a NAME or --all, got both"),
        (["--repo", "a/b"], "either a NAME or --all, got neither"),
        (["--all", "--repo", "a/b"], "--repo: must be a namespace with --all, got 'a/b'"),
        (["sagan_32_tiny"], "Missing option '--repo'"),
    ],
    ids=str,
)
def test_usage_errors_are_one_line_and_code_2(tiny, hub, args, message):
    refused(2, message, *args)
    assert not hub.requests


@pytest.mark.parametrize(
    ("path", "old", "new", "message"),
    [
        ("README.md", None, None, "README.md must be there, got nothing; write the card first"),
        ("samples.png", None, None, "samples.png must be there, got nothing"),
        ("generator.safetensors", None, None, "generator.safetensors: must be there"),
        ("discriminator.safetensors", None, None, "discriminator.safetensors: must be there"),
        ("README.md", "## Data", "## Datum", "README.md must have the section 'Data', got"),
        ("README.md", "For tests.", "", "README.md must have the section 'Use and limits'"),
        ("README.md", "1.250", "0.250", "must say 1.250 under 'Figures'"),
        ("README.md", "seed 7", "seed 8", "must say seed 7 under 'Figures'"),
        ("README.md", "`mit`", "free", "must say `mit` under 'Licence and citation'"),
        ("README.md", "`cc0-1.0`", "mine", "must say `cc0-1.0` under 'Data'"),
        ("../sagan_32_tiny.toml", 'license = "mit"\n', "", "must have 'license' in [weights]"),
        ("../sagan_32_tiny.toml", 'license = "cc0-1.0"\n', "", "must have 'license' in [data]"),
        ("../sagan_32_tiny.toml", 'license = "mit"', 'license = ""', "must have 'license' in [weights]"),
        ("../sagan_32_tiny.toml", "seed = 7\n", "", "must have 'seed' in [weights]"),
        (
            "../sagan_32_tiny.toml",
            'compute = "2 hours on one core"\n',
            "",
            "must have 'compute' in [weights]",
        ),
    ],
    ids=str,
)
def test_an_incomplete_entry_is_not_published(ada, tiny, path, old, new, message):
    file = tiny / path
    if old is None:
        file.unlink()
    else:
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))
    refused(1, message, "sagan_32_tiny", "--repo", "ada/tiny")
    refused(1, message, "sagan_32_tiny", "--repo", "ada/tiny", "--dry-run")
    assert not ada.requests
    assert not Path("published").exists()


def test_a_hub_that_refuses_is_told_in_one_line(ada, tiny):
    refused(1, "publish: lab/tiny must be open to your token", "sagan_32_tiny", "--repo", "lab/tiny")
    ada.faults.append(Fault("PUT", "/lfs/", status=500, times=99))
    refused(1, "publish: ada/tiny must be served, got 500", "sagan_32_tiny", "--repo", "ada/tiny")
    ada.faults.clear()
    sagan("sagan_32_tiny", "--repo", "ada/tiny")  # the same command again finishes the work


def test_an_entry_without_attention_or_classes_has_a_card_too(ada, tiny):
    for part in ("generator", "discriminator"):
        (tiny / f"{part}.safetensors").unlink()
    (tiny / "config.json").unlink()
    Generator(32, 0, z_dim=5, base_channels=2, attention_at=()).save_pretrained(tiny)
    Discriminator(32, 0, base_channels=2, attention_at=()).save_pretrained(tiny)
    sagan("sagan_32_tiny", "--repo", "ada/tiny")
    card = ada.content("ada/tiny", "README.md").decode()
    assert "attention.png" not in card
    assert "class-conditional" not in card
    assert "label" not in card
    exec(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0], {})


def test_attention_picture_glows_where_the_map_is_largest():
    generator = Generator(32, 3, z_dim=5, base_channels=8, attention_at=(8, 16)).eval()
    picture = publishing.attention_picture(generator, images=3)
    assert picture is not None
    sheet, largest = picture
    assert 1 / 64 < largest <= 1
    seen = []
    generator.attention["16"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    z = torch.stack([sampling.latent(i, i, 5) for i in range(3)])
    with torch.no_grad():
        generator(z, torch.arange(3))
        layer, x = generator.attention["16"], seen[0]
        query, key = layer.query(x), torch.nn.functional.max_pool2d(layer.key(x), 2)
        maps = torch.einsum("bchw,bcyx->bhwyx", query, key).flatten(3).softmax(3)
    np.testing.assert_allclose(
        largest, maps.amax(3).flatten().quantile(0.5, interpolation="midpoint"), rtol=1e-4
    )
    pixels = np.asarray(sheet, int)
    left, step = 6, 102
    for row in range(3):
        for column, y in enumerate((4, 8, 12), start=1):
            panel = pixels[6 + row * step :, left + column * step :][:96, :96]
            assert (panel[y * 6 + 3, 8 * 6 + 3] == (255, 0, 0)).all()
            top = int(maps[row, y, 8].argmax())
            cell = panel[top // 8 * 12 :, top % 8 * 12 :][:12, :12].reshape(-1, 3)
            assert ((cell == (255, 255, 0)).all(1) | (cell == (255, 0, 0)).all(1)).all()


@pytest.mark.parametrize("name", zoo.list_models(pretrained=True))
def test_shipped_entries_are_complete(name, tmp_path):
    folder = publishing.write_folder(name, f"ada/{name}", tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [*FILES, f"{name}.toml", "samples.png"]
    card = ModelCard.load(folder / "README.md")
    entry = zoo.entry(name)
    assert entry.weights is not None
    assert card.data.license == entry.weights["license"]
    assert card.data.eval_results[0].metric_value == entry.weights["fid"]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12e6
