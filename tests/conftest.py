"""Every test runs seeded, with uninitialized memory filled with NaN; without a GPU, Triton kernels are interpreted."""

import atexit
import os
import shutil
import tempfile

import pytest
import torch
from hub_routes import Account
from hub_server import HubServer

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

# the Hub's client reads these when it is first imported: no test can reach another Hub, or the user's own cache
_HUB, _HOME = HubServer(), tempfile.mkdtemp()
_HUB.start()
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ |= {"HF_ENDPOINT": _HUB.url, "HF_HOME": _HOME, "HF_HUB_DISABLE_XET": "1"}
for _name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN"):
    os.environ.pop(_name, None)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hub, empty, and a cache of the test's own; retries do not wait."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    _HUB.clear()
    yield _HUB
    assert not _HUB.unknown


torch.backends.cudnn.allow_tf32 = False  # the formulas that a GPU is compared with are to be float32's


@pytest.fixture
def ada(hub, monkeypatch, tmp_path):
    """The Hub with a user who may write to her own namespace, her token, and an empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    hub.tokens["secret"] = Account("ada", {"ada": "write", "lab": "read"})
    monkeypatch.setenv("HF_TOKEN", "secret")
    return hub


@pytest.fixture
def generator():
    """A tiny generator of three classes."""
    from hub_client import TINY

    from sagan_kernels.models import Generator

    return Generator(z_dim=5, **TINY).eval()


@pytest.fixture
def pushed(ada, generator, tmp_path):
    """The Hub with a repository of ada's that holds both networks, and an empty cache."""
    from hub_client import REPO, TINY

    from sagan_kernels.models import Discriminator

    generator.class_names = ["cat", "dog", "axolotl"]
    generator.push_to_hub(REPO)
    Discriminator(**TINY).push_to_hub(REPO)
    ada.requests.clear()
    shutil.rmtree(tmp_path / "cache")
    return ada


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _seeded_and_poisoned():
    torch.manual_seed(0)
    # deterministic mode fills torch.empty with NaN: an element that nobody writes is caught
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _no_implementation_from_outside(monkeypatch):
    monkeypatch.delenv("SAGAN_KERNELS_IMPL", raising=False)
