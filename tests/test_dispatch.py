"""Choosing an implementation."""

import pytest
import torch

from sagan_kernels.ops import choose, dispatch


def test_silence_means_the_fastest_that_runs():
    assert choose(None, torch.zeros(1)) == "torch"


def test_environment_wins_over_the_argument(monkeypatch):
    monkeypatch.setenv("SAGAN_KERNELS_IMPL", "reference")
    assert choose("torch", torch.zeros(1)) == "reference"
    assert choose(None, torch.zeros(1)) == "reference"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the reasons are those of a machine without a GPU")
def test_refused_implementation_says_why(monkeypatch):
    assert choose("triton", torch.zeros(1)) == "triton"  # the tests run Triton's interpreter
    with pytest.raises(NotImplementedError, match="interpreter computes bfloat16 wrongly; leave impl=None"):
        choose("triton", torch.zeros(1, dtype=torch.bfloat16))
    with pytest.raises(NotImplementedError, match="the tensor is on meta"):
        choose("triton", torch.zeros(1, device="meta"))
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(
        NotImplementedError, match=r"impl='triton': Triton kernels run on GPUs, .* cpu; leave"
    ):
        choose("triton", torch.zeros(1))


def test_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr(dispatch, "_INSTALLED", False)
    with pytest.raises(NotImplementedError, match="the package triton is not installed"):
        choose("triton", torch.zeros(1))
    assert choose(None, torch.zeros(1)) == "torch"


def test_unknown_word_names_where_it_came_from(monkeypatch):
    with pytest.raises(ValueError, match="impl: must be one of triton, torch, reference, got 'cuda'"):
        choose("cuda", torch.zeros(1))
    monkeypatch.setenv("SAGAN_KERNELS_IMPL", "fast")
    with pytest.raises(ValueError, match="SAGAN_KERNELS_IMPL: must be one of"):
        choose(None, torch.zeros(1))
