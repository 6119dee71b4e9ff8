"""Attention in tiles against float64 autograd of the formula, at lengths and budgets that no tile divides."""

import pytest
import torch

from sagan_kernels import reference
from sagan_kernels.ops import attention, attention_tiles

# (B, L, S, E, Ev): lengths and widths that no tile divides, then every axis at one, then at none
SHAPES = [(3, 13, 7, 3, 5), (2, 36, 9, 8, 32), (1, 1, 1, 1, 1), (1, 17, 1, 4, 1), (2, 1, 19, 1, 6)]
EMPTY = [(0, 4, 3, 2, 5), (2, 0, 3, 2, 5), (2, 4, 0, 2, 5)]
# one row a tile, rows in unequal parts, several images a tile, everything in one tile
BUDGETS = [1, 40, 200, attention_tiles.TILE_SCORES]


def tensors(shape, dtype=torch.float64, scale=1.0):
    """query, key, value and grad_out."""
    B, L, S, E, Ev = shape
    sizes = [(L, E), (S, E), (S, Ev), (L, Ev)]
    return [(scale * torch.randn(B, *size, dtype=torch.float64)).to(dtype) for size in sizes]


def through_autograd(inputs, directions):
    """The results of all five functions by float64 autograd of the formula, as one flat list."""
    q, k, v, g = [t.double().detach().requires_grad_() for t in inputs]
    directions = [t.double() for t in directions]
    out = reference.attention(q, k, v)
    grads = torch.autograd.grad(out, (q, k, v), g, create_graph=True)
    second = torch.autograd.grad(grads, (q, k, v, g), directions)
    _, tangent = torch.autograd.functional.jvp(reference.attention, (q, k, v), tuple(directions))
    by_query = torch.softmax(k @ q.mT, dim=-1).mT @ v
    return [t.detach() for t in (out, *grads, *second, tangent, by_query)]


def in_tiles(inputs, directions, budget):
    """The same list in tiles."""
    return [
        attention_tiles.forward(*inputs[:3], budget=budget),
        *attention_tiles.backward(*inputs, budget=budget),
        *attention_tiles.double_backward(*inputs, *directions, budget=budget),
        attention_tiles.tangent(*inputs[:3], *directions, budget=budget),
        attention_tiles.over_queries(*inputs[:3], budget=budget),
    ]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
def test_every_function_matches_autograd_of_the_formula(shape, budget):
    inputs, directions = tensors(shape), tensors(shape)[:3]
    found = in_tiles(inputs, directions, budget)
    torch.testing.assert_close(found, through_autograd(inputs, directions), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "digit"), [(torch.float32, 2e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)]
)
def test_short_dtypes_lose_only_the_rounding_of_the_result(dtype, digit):
    inputs, directions = tensors(SHAPES[1], dtype), tensors(SHAPES[1], dtype)[:3]
    found = in_tiles(inputs, directions, 200)
    assert {t.dtype for t in found} == {dtype}
    for mine, exact in zip(found, through_autograd(inputs, directions), strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=digit, atol=digit * exact.abs().max().item())


def test_each_result_has_the_dtype_of_its_tensor():
    q, k, v, g = tensors(SHAPES[0])
    mixed = [q.half(), k.float(), v.bfloat16(), g.float()]
    assert attention_tiles.forward(*mixed[:3]).dtype == torch.bfloat16
    assert [t.dtype for t in attention_tiles.backward(*mixed)] == [t.dtype for t in mixed[:3]]
    assert [t.dtype for t in attention_tiles.double_backward(*mixed, *mixed[:3])] == [t.dtype for t in mixed]


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_strides_change_no_result_and_results_are_contiguous(layout):
    def laid_out(t):
        if layout == "transposed":
            return t.mT.contiguous().mT
        if layout == "strided":
            return torch.stack([t, t], dim=-1)[..., 0]
        return t[:1].expand_as(t)

    inputs, directions = tensors(SHAPES[0]), tensors(SHAPES[0])[:3]
    inputs, directions = [laid_out(t) for t in inputs], [laid_out(t) for t in directions]
    found = in_tiles(inputs, directions, 40)
    assert all(t.is_contiguous() for t in found)
    torch.testing.assert_close(found, through_autograd(inputs, directions), rtol=1e-12, atol=1e-12)


def test_results_share_no_memory_with_the_arguments():
    inputs, directions = tensors((1, 1, 1, 1, 1)), tensors((1, 1, 1, 1, 1))[:3]
    before = [t.clone() for t in inputs + directions]
    for result in in_tiles(inputs, directions, 40):
        result.fill_(7.0)
    torch.testing.assert_close(inputs + directions, before, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_nan_and_infinity_propagate_as_in_the_formula(name, bad):
    inputs, directions = tensors(SHAPES[0]), tensors(SHAPES[0])[:3]
    inputs[["query", "key", "value"].index(name)][1, 2, 1] = bad
    expected = through_autograd(inputs, directions)[:4]
    found = in_tiles(inputs, directions, 40)[:4]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_scores_beyond_the_range_of_exp_stay_finite():
    inputs = tensors(SHAPES[1], torch.float32, scale=30.0)
    expected = reference.attention(*[t.double() for t in inputs[:3]])
    found = attention_tiles.forward(*inputs[:3], budget=40)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-2)


def test_autocast_around_the_call_changes_nothing():
    inputs, directions = tensors(SHAPES[1], torch.float32), tensors(SHAPES[1], torch.float32)[:3]
    plain = in_tiles(inputs, directions, 200)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = in_tiles(inputs, directions, 200)
    torch.testing.assert_close(found, plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shape", "budget", "expected"),
    [
        ((8, 1024, 256), 1 << 18, (1, 1024)),  # an image
        ((16, 256, 64), 1 << 18, (16, 256)),  # the batch
        ((5, 10, 10), 200, (2, 10)),  # two images, and one is left
        ((8, 4096, 1024), 1 << 18, (1, 256)),
        ((1, 4096, 4096), 1 << 18, (1, 256)),  # the rows stay where S passes 1024
        ((1, 13, 7), 40, (1, 5)),  # 5 + 5 + 3
        ((1, 13, 7), 1, (1, 1)),
        ((2, 0, 3), 40, (2, 1)),
        ((2, 4, 0), 40, (2, 4)),
    ],
)
def test_tile_shape_is_a_function_of_the_shape(shape, budget, expected):
    assert attention_tiles.tile_shape(*shape, budget) == expected


def test_small_maps_are_stored_and_large_ones_are_not():
    assert attention_tiles.stores_map(16, 256, 64)
    assert not attention_tiles.stores_map(8, 1024, 256)


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # of PyTorch 2.11
@pytest.mark.parametrize("name", ["forward", "backward", "double_backward"])
def test_no_single_allocation_is_of_the_size_of_the_map(name):
    L = S = 2048
    q, k, v, g = tensors((1, L, S, 4, 4), torch.float32)
    arguments = {"forward": (q, k, v), "backward": (q, k, v, g), "double_backward": (q, k, v, g, q, k, v)}[
        name
    ]
    with torch.profiler.profile(profile_memory=True) as profile:
        getattr(attention_tiles, name)(*arguments, budget=1 << 16)
    allocated = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < allocated <= 4 * (1 << 17) * 4 < L * S * 4


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("layout", ["rows", "NCHW", "NHWC"])
def test_whole_map_is_the_formula_and_lies_as_asked(layout, learns, grad):
    torch.manual_seed(0)
    query, key, value = leaves = [
        torch.randn(3, width, rows).double().requires_grad_(learns)
        for rows, width in ((35, 5), (12, 5), (12, 7))
    ]
    if layout == "NHWC":
        query, key, value = (t.mT.contiguous().mT for t in leaves)
    with torch.set_grad_enabled(grad):
        if layout == "rows":
            out = attention_tiles.whole(query.mT, key.mT, value.mT)
        else:
            out = attention_tiles.whole_maps(query, key, value).mT
    expected = reference.attention(*(t.mT for t in leaves))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)
    assert (out.mT if layout == "NCHW" else out).is_contiguous()
    assert out.requires_grad == (learns and grad)
    if out.requires_grad:
        found, wanted = (torch.autograd.grad(o.square().sum(), leaves) for o in (out, expected))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("budget", [7, 100, 1000])
def test_tiled_result_lies_as_asked(budget):
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(3, width, rows).double().mT for rows, width in ((35, 5), (12, 5), (12, 7))
    )
    out = attention_tiles.forward(query, key, value, budget=budget, lies_as_value=True)
    torch.testing.assert_close(out, reference.attention(query, key, value), rtol=0, atol=1e-14)
    assert out.mT.is_contiguous()
    rows = attention_tiles.forward(query, key, value.contiguous(), budget=budget, lies_as_value=True)
    assert rows.is_contiguous()


@pytest.mark.parametrize("learns", [False, True])
def test_small_results_are_contiguous_whatever_the_arguments(learns):
    query, key, value = (
        torch.randn(2, width, rows).mT.requires_grad_(learns) for rows, width in ((9, 4), (5, 4), (5, 6))
    )
    assert attention(query, key, value).is_contiguous()


def test_one_tile_is_told_by_size_and_dtype():
    float32 = [torch.float32] * 3
    assert attention_tiles.is_one_tile(4, 256, 256, *float32)
    assert not attention_tiles.is_one_tile(4, 257, 256, *float32)
    assert not attention_tiles.is_one_tile(1, 3, 3, *[torch.bfloat16] * 3)  # summed in float32
    assert not attention_tiles.is_one_tile(1, 3, 3, torch.float64, *float32)
