"""torch.hub from a checkout that is not installed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sagan_kernels.models import Discriminator, Generator

ROOT = Path(__file__).parent.parent
NETWORK = "resolution = 32\nnum_classes = 3\nbase_channels = 2\nattention_at = []\n"

SCRIPT = """
import json, sys
import torch
from torch import hub

repo, cached = sys.argv[1:]
load = lambda *args, **options: hub.load(repo, *args, source="local", **options)
generator = load("sagan_32_tiny")
import sagan_kernels
try:
    load("sagan_32_raw")
    refusal = None
except ValueError as error:
    refusal = str(error)
try:
    load("sagan_32_tiny", revision="v1")
    other = None
except ValueError as error:
    other = str(error)
z = torch.arange(5.0).div(5)[None]
print(json.dumps({
    "from": sagan_kernels.__file__,
    "image": generator(z, torch.tensor([1])).flatten().tolist()[:5],
    "training": generator.training,
    "discriminator": type(load("sagan_32_tiny", part="discriminator", map_location="meta")).__name__,
    "fresh": load("sagan_32_raw", pretrained=False, num_classes=4).num_classes,
    "refusal": refusal,
    "other revision": other,
    "list": hub.list(cached, skip_validation=True, trust_repo=True, verbose=False),
    "help": hub.help(cached, "sagan_32_raw", skip_validation=True, trust_repo=True),
    "unwanted": sorted({"triton", "timm", "torchvision", "click", "PIL"} & set(sys.modules)),
}))
"""


@pytest.fixture(scope="module")
def answer(tmp_path_factory):
    """What a fresh Python got from torch.hub, and the generator it should have got."""
    home = tmp_path_factory.mktemp("home")
    repo = home / "hub" / "owner_repo_main"  # also where torch.hub keeps a clone of owner/repo:main
    shutil.copytree(
        ROOT / "sagan_kernels", repo / "sagan_kernels", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / "hubconf.py", repo)
    (repo / "zoo").mkdir()
    text = f"[generator]\nz_dim = 5\n{NETWORK}[discriminator]\n{NETWORK}"
    (repo / "zoo" / "sagan_32_raw.toml").write_text(text)
    (repo / "zoo" / "sagan_32_tiny.toml").write_text(text + "[weights]\n")
    generator = Generator(32, 3, z_dim=5, base_channels=2, attention_at=()).eval()
    generator.save_pretrained(repo / "zoo" / "sagan_32_tiny", list("abc"))
    Discriminator(32, 3, base_channels=2, attention_at=()).save_pretrained(repo / "zoo" / "sagan_32_tiny")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"TORCH_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(repo), "owner/repo:main"],
        cwd=home, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"repo": repo, "generator": generator}


def test_the_checkout_itself_is_what_runs(answer):
    assert Path(answer["from"]).is_relative_to(answer["repo"])
    assert answer["unwanted"] == []


def test_load_gives_the_trained_network_in_eval_mode(answer):
    with torch.no_grad():
        expected = answer["generator"](torch.arange(5.0).div(5)[None], torch.tensor([1])).flatten()[:5]
    torch.testing.assert_close(torch.tensor(answer["image"]), expected, rtol=1e-5, atol=1e-5)
    assert not answer["training"]


def test_parts_overrides_and_missing_weights(answer):
    assert answer["discriminator"] == "Discriminator"
    assert answer["fresh"] == 4
    assert "are there for sagan_32_tiny, got 'sagan_32_raw'" in answer["refusal"]


def test_a_function_an_entry_and_nothing_else_is_public(answer):
    assert answer["list"] == ["sagan_32_raw", "sagan_32_tiny"]
    assert "pretrained: with its trained weights" in answer["help"]


def test_a_revision_is_chosen_with_the_repository(answer):
    assert "revision must be None" in answer["other revision"]
    assert "torch.hub.load('owner/repository:v1', 'sagan_32_tiny')" in answer["other revision"]
