"""`sagan doctor` tells what is there, what runs, and what does not fit."""

import json
from importlib import metadata
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from sagan_kernels import doctor
from sagan_kernels.cli import cli


@pytest.fixture
def plain(monkeypatch):
    for name in doctor.SETTINGS:
        monkeypatch.delenv(name, raising=False)


def run(*arguments):
    result = CliRunner().invoke(cli, ["doctor", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_report_names_versions_devices_and_caches(plain):
    found = json.loads(run("--json"))
    assert found["packages"]["torch"] == metadata.version("torch")
    assert found["packages"]["safetensors"] == metadata.version("safetensors")
    assert len(found["devices"]) == 1 + torch.cuda.device_count()
    assert found["devices"][0]["runs"] == "torch"
    assert [cache["what"] for cache in found["caches"]] == ["Hugging Face Hub", "torch.hub", "Triton"]
    shown = run()
    assert metadata.version("torch") in shown
    assert "Hub: online" in shown


def test_home_and_secrets_are_not_shown(plain, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    shown = run()
    assert "HF_HOME=~/hub" in shown
    assert "Triton: ~/.triton/cache" in shown
    assert "hf_secret" not in shown
    assert str(tmp_path) not in shown


def test_offline_and_settings_are_told(plain, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("SAGAN_KERNELS_IMPL", "reference")
    found = doctor.report()
    assert found["devices"][0]["runs"] == "reference"
    assert "Hub: offline" in doctor.text(found)
    monkeypatch.setenv("SAGAN_KERNELS_IMPL", "cuda")
    device = doctor.report()["devices"][0]
    assert (device["runs"], "must be one of" in device["why"]) == ("nothing", True)


def test_what_does_not_fit_is_found(plain, monkeypatch, tmp_path):
    versions = {"torch": "2.12.0", "triton": "3.5.1", "torchvision": "0.27.0"}
    monkeypatch.setattr(doctor, "_imports", lambda name: False)
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name))
    monkeypatch.setattr(metadata, "requires", lambda name: ["triton==3.7.0; sys_platform != 'none'", "numpy"])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    not_a_folder = tmp_path / "file"
    not_a_folder.touch()
    monkeypatch.setattr(doctor, "cache_folder", lambda: str(not_a_folder / "cache"))
    told = "\n".join(doctor.findings())
    assert "triton must be 3.6 or newer, got 3.5.1; pip install -U triton" in told
    assert "goes with triton==3.7.0, got 3.5.1" in told
    assert "torchvision 0.27.0 cannot be imported beside torch" in told
    assert "TRITON_INTERPRET=1: Triton kernels run in Python" in told
    assert "cannot be written; set HF_HOME or TORCH_HOME" in told
    versions |= {"triton": "3.7.0", "torch": "2.10.0"}
    told = "\n".join(doctor.findings())
    assert "goes with" not in told
    assert "torch must be 2.11 or newer, got 2.10.0" in told


def test_a_cache_that_is_not_there_yet_is_judged_by_the_folder_above(tmp_path):
    cache = doctor._cache("a cache", Path(tmp_path) / "new" / "deep")
    assert cache["writable"]
    assert cache["free_gb"] > 0
