"""Choosing an implementation."""

import pytest
import torch

from sagan_kernels.ops import choose


def test_silence_means_the_fastest_that_runs():
    assert choose(None, torch.zeros(1)) == "torch"


def test_environment_wins_over_the_argument(monkeypatch):
    monkeypatch.setenv("SAGAN_KERNELS_IMPL", "reference")
    assert choose("torch", torch.zeros(1)) == "reference"
    assert choose(None, torch.zeros(1)) == "reference"


def test_refused_implementation_says_why():
    with pytest.raises(NotImplementedError, match=r"impl='triton': .* leave impl=None"):
        choose("triton", torch.zeros(1))


def test_unknown_word_names_where_it_came_from(monkeypatch):
    with pytest.raises(ValueError, match="impl: must be one of triton, torch, reference, got 'cuda'"):
        choose("cuda", torch.zeros(1))
    monkeypatch.setenv("SAGAN_KERNELS_IMPL", "fast")
    with pytest.raises(ValueError, match="SAGAN_KERNELS_IMPL: must be one of"):
        choose(None, torch.zeros(1))
