"""The CPU tiles against float64 autograd of the formula, with tiles from one row to everything."""

import pytest
import torch

from sagan_kernels import reference
from sagan_kernels.ops import attention_tiles as tiles

SHAPES = [(3, 12, 7, 3, 5), (2, 5, 1, 4, 2), (1, 1, 9, 1, 1)]
TILES = [1, 20, 84, 200, tiles.TILE]  # less than a row, some rows, an image, two images, all


def random(shape, dtype=torch.float64):
    B, L, S, E, Ev = shape
    return [torch.randn(B, w, n, dtype=dtype).mT for n, w in [(L, E), (S, E), (S, Ev), (L, Ev)]]


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_pass_matches_autograd_of_the_formula(shape, tile):
    q, k, v, g = (t.requires_grad_() for t in random(shape))
    a, b, c = (torch.randn_like(t) for t in (q, k, v))
    out = reference.attention(q, k, v)
    first = torch.autograd.grad(out, (q, k, v), g, create_graph=True)
    second = torch.autograd.grad(first, (q, k, v, g), (a, b, c))
    moved = torch.func.jvp(reference.attention, (q, k, v), (a, b, c))[1]
    with torch.no_grad():
        torch.testing.assert_close(tiles.forward(q, k, v, tile=tile), out)
        torch.testing.assert_close(tiles.backward(q, k, v, g, tile=tile), first)
        torch.testing.assert_close(tiles.double_backward(q, k, v, g, a, b, c, tile=tile), second)
        torch.testing.assert_close(tiles.tangent(q, k, v, a, b, c, tile=tile), moved)
        torch.testing.assert_close(
            tiles.over_queries(q, k, v, tile=tile), reference.attention(q, k, v, normalize="queries")
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_lose_only_the_rounding_of_the_result(dtype):
    q, k, v, g = (t.to(dtype) for t in random((2, 60, 50, 8, 16)))
    exact = [t.double() for t in (q, k, v, g)]
    found, wanted = tiles.backward(q, k, v, g), tiles.backward(*exact)
    for actual, expected in zip(found, wanted, strict=True):
        assert actual.dtype == dtype
        rounded = expected.to(dtype).double()
        torch.testing.assert_close(actual.double(), rounded, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_propagate_as_in_the_formula(value):
    for place in range(3):
        inputs = random((2, 12, 7, 3, 5))[:3]
        inputs[place][0, 0, 0] = value
        torch.testing.assert_close(
            tiles.forward(*inputs, tile=20), reference.attention(*inputs), equal_nan=True
        )


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((8, 64, 16), (8, 64)),
        ((8, 1024, 256), (1, 1024)),
        ((1, 4096, 4096), (1, 64)),
        ((2, 3, 10**9), (1, 1)),
    ],
)
def test_tile_geometry(sizes, expected):
    assert tiles.tile_shape(*sizes, 2**18) == expected


def test_tiles_never_exceed_what_they_may_hold():
    for B, L, S in [(3, 1000, 77), (64, 100, 25), (5, 4096, 1024)]:
        images, rows = tiles.tile_shape(B, L, S)
        assert images * rows * S <= tiles.TILE
        assert images == 1 or rows == L


@pytest.mark.parametrize("order", ["forward", "backward", "double_backward"])
def test_memory_does_not_grow_with_the_map(order):
    peaks = []
    for L in (1024, 4096):
        q, k, v, g = (torch.randn(1, L, w) for w in (4, 4, 8, 8))
        arguments = {"forward": [q, k, v], "backward": [q, k, v, g], "double_backward": [q, k, v, g, q, k, v]}
        largest = 0

        class Largest(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                nonlocal largest
                out = func(*args, **(kwargs or {}))
                for t in torch.utils._pytree.tree_leaves(out):
                    if isinstance(t, torch.Tensor):
                        largest = max(largest, t.untyped_storage().nbytes())
                return out

        with Largest():
            getattr(tiles, order)(*arguments[order])
        peaks.append(largest)
    assert peaks[0] == peaks[1] <= 4 * 4 * tiles.TILE
