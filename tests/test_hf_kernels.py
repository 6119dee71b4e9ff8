"""The exported kernel repository, through Hugging Face's own loader, from a folder and from the Hub."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sagan_kernels.export_hf_kernels import BACKENDS, LAYER, export
from sagan_kernels.nn import SelfAttention2d
from sagan_kernels.ops import attention

kernels = pytest.importorskip("kernels")
BACKEND = "cuda" if torch.cuda.is_available() and not torch.version.hip else "cpu"


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return export(tmp_path_factory.mktemp("kernel") / "sagan-attention", repo="ada/sagan-attention")


def layer(device):
    torch.manual_seed(0)
    layer = SelfAttention2d(16).to(device)
    torch.nn.init.constant_(layer.gamma, 0.5)
    return layer, torch.randn(2, 16, 6, 8, device=device, requires_grad=True)


def results(layer, x):
    out = layer(x)
    first = torch.autograd.grad(out.square().sum(), [x, *layer.parameters()], create_graph=True)
    return [out, *first, *torch.autograd.grad(first[0].square().sum(), list(layer.parameters()))]


@pytest.mark.parametrize("mode", ["INFERENCE", "TRAINING", "TRAINING | TORCH_COMPILE"])
def test_kernelize_puts_the_layer_in_with_all_gradients(mode, repository, device):
    given, x = layer(device)
    expected = results(given, x)
    plain = given.forward
    local = kernels.LocalLayerRepository(repository, layer_name=LAYER)
    wanted = kernels.Mode.INFERENCE
    for name in mode.split(" | "):
        wanted = (
            getattr(kernels.Mode, name)
            if wanted == kernels.Mode.INFERENCE
            else wanted | getattr(kernels.Mode, name)
        )
    with kernels.use_kernel_mapping({LAYER: {BACKEND: local}}):
        model = kernels.kernelize(torch.nn.Sequential(given), mode=wanted, device=BACKEND, use_fallback=False)
    assert given.forward != plain
    assert type(given) is SelfAttention2d
    for got, want in zip(results(model[0], x), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_kernel_has_operators_of_its_own(repository, device):
    loaded = kernels.get_local_kernel(repository)
    q, k, v = (torch.randn(2, n, 5, device=device, requires_grad=True) for n in (7, 9, 9))
    torch.testing.assert_close(loaded.attention(q, k, v), attention(q, k, v))
    (slope,) = torch.autograd.grad(loaded.attention(q, k, v).sum(), q, create_graph=True)
    slope.square().sum().backward()
    assert loaded.attention is not attention
    assert loaded.attention.__module__.split(".")[0] == loaded.__name__


def test_kernel_is_loaded_from_the_hub(ada, repository):
    files = {
        path.relative_to(repository).as_posix(): path.read_bytes()
        for path in repository.rglob("*")
        if path.is_file()
    }
    ada.put("ada/sagan-attention", files)
    ada.put("ada/sagan-attention", files, revision="v1")
    loaded = kernels.get_kernel("ada/sagan-attention", version=1, trust_remote_code=True)
    q = torch.randn(1, 4, 3)
    torch.testing.assert_close(loaded.attention(q, q, q), attention(q, q, q))
    with pytest.raises(Exception, match="trust"):
        kernels.get_kernel("ada/sagan-attention", version=1)


def test_files_import_torch_and_each_other_only(repository):
    variants = {path.name: path for path in (repository / "build").iterdir()}
    assert set(variants) == {f"torch-{backend}" for backend in BACKENDS}
    allowed = set(sys.stdlib_module_names) | {"torch", "triton"}
    for backend, variant in variants.items():
        metadata = json.loads((variant / "metadata.json").read_text())
        assert f"torch-{metadata['backend']['type']}" == backend
        for path in variant.rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            imported = re.findall(r"^ *(?:from|import) ([a-z_]+)", text, re.M)
            code = re.sub(r'""".*?"""', "", text, flags=re.S)
            assert set(imported) <= allowed, path
            assert not re.search(r"\bsagan_kernels\b", code), path
    digest = kernels._rust.Digest.hash_variant(kernels._rust.DigestAlgorithm.SHA256, variants["torch-cpu"])
    kernels._rust.Metadata.read_from_file(variants["torch-cpu"] / "metadata.json").digest.validate(digest)


def test_command_writes_again_and_keeps_what_is_not_its_own(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "sagan_kernels.export_hf_kernels", *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent
        )

    for version in (1, 2):
        assert run(tmp_path / "out", "--version", version).returncode == 0
    metadata = json.loads((tmp_path / "out/build/torch-cuda/metadata.json").read_text())
    assert metadata["version"] == 2
    assert "version=2" in (tmp_path / "out/README.md").read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    refused = run(tmp_path / "mine")
    assert refused.returncode == 1
    assert "must be a new folder or an earlier export" in refused.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
