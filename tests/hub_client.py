"""What the tests of loading and pushing share: a tiny network, and how a refusal and a cache must look."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from sagan_kernels.models import Generator

TINY = {"resolution": 32, "num_classes": 3, "base_channels": 2, "attention_at": ()}

REPO = "ada/tiny"

WEIGHTS = "/resolve/.*safetensors"


def same(first, second):
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def refused(kind, match, *args, cls=Generator, **options):
    """Loading ends with one line that holds `match`."""
    with pytest.raises(kind, match=match) as caught:
        cls.from_pretrained(*(args or (REPO,)), **options)
    assert "\n" not in str(caught.value)
    return caught.value


def cached(pattern="*"):
    """Whole files in the cache, and nothing half."""
    files = [path for path in Path(constants.HF_HUB_CACHE).rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix == ".incomplete"]
    return [path for path in files if path.match(pattern) and "blobs" not in path.parts]
