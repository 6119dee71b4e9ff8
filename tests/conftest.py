"""Every test runs seeded, with uninitialized memory filled with NaN; without a GPU, Triton kernels are interpreted."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


torch.backends.cudnn.allow_tf32 = False  # the formulas that a GPU is compared with are to be float32's


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
