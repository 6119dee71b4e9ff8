"""The attention kernels themselves against float64, on a GPU or in Triton's interpreter, to the second order."""

import pytest
import torch
import torch.nn.functional as F

from sagan_kernels.ops import attention, configs

# (B, L, S, E, Ev): lengths and widths that no tile divides, one key, values wider than one launch takes
SHAPES = [(2, 70, 33, 5, 19), (1, 64, 64, 16, 32), (3, 5, 1, 1, 1), (1, 9, 70, 24, 150)]
LAYOUTS = ["NCHW", "NHWC", "sliced"]
NORMALIZE = ["keys", "queries"]
# relative to the largest element of the expected result; float16 has 11 bits, and a second order multiplies errors
TOLERANCES = {torch.float64: 1e-13, torch.float32: 4e-6, torch.float16: 4e-3}

# NumPy, in which the interpreter computes, warns of what the kernels are made for: NaN, inf, and overflow to 0
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def matrix(B, rows, width, dtype, layout, device):
    if layout == "NCHW":
        t = torch.randn(B, width, rows, device=device, dtype=dtype).mT
    elif layout == "NHWC":
        t = torch.randn(B, rows, width, device=device, dtype=dtype)
    else:  # every second position and channel of a larger map, from an odd offset
        t = torch.randn(B, 2 * width + 1, 2 * rows + 3, device=device, dtype=dtype)[:, 1::2, 3::2].mT
    return t.detach().requires_grad_()


def qkv(shape, device, dtype=torch.float64, layout="NHWC"):
    B, L, S, E, Ev = shape
    return [matrix(B, *d, dtype, layout, device) for d in [(L, E), (S, E), (S, Ev)]]


def dtypes(device):
    return [torch.float32, torch.float16] + ([torch.float64] if device == "cpu" else [])


def orders(inputs, normalize, impl, cotangents):
    """out, its first gradients, and the gradients of those in the direction of cotangents."""
    out = attention(*inputs, normalize=normalize, impl=impl)
    first = torch.autograd.grad(out, inputs, cotangents[0].to(out.dtype), create_graph=True)
    directions = [c.to(f.dtype) for c, f in zip(cotangents[1:], first, strict=True)]
    return out, first, torch.autograd.grad(first, inputs, directions)


def assert_near(actual, expected, tolerance):
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance * max(scale, 0.1))


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_match_float64_in_every_order(shape, layout, normalize, device):
    for dtype in dtypes(device):
        inputs = qkv(shape, device, dtype, layout)
        cotangents = [torch.randn(shape[0], shape[1], shape[4], device=device).to(dtype)]
        cotangents += [torch.randn_like(t) for t in inputs]
        exact = [t.detach().double().requires_grad_() for t in inputs]
        wanted = orders(exact, normalize, "reference", [c.double() for c in cotangents])
        found = orders(inputs, normalize, "triton", cotangents)
        tolerance = TOLERANCES[dtype]
        assert_near(found[0], wanted[0], tolerance)
        for actual, expected in zip(found[1], wanted[1], strict=True):
            assert_near(actual, expected, 2 * tolerance)
        for actual, expected in zip(found[2], wanted[2], strict=True):
            assert_near(actual, expected, 8 * tolerance)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels in float32 at most")
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_kernels_pass_gradcheck_and_gradgradcheck(normalize):
    inputs = qkv((1, 7, 5, 3, 4), "cpu", layout="NCHW")
    run = lambda *t: attention(*t, normalize=normalize, impl="triton")  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_huge_and_tiny_logits_lose_no_more_than_the_formula_in_float32(scale, device):
    q, k, v = (t.detach().float() for t in qkv((2, 70, 333, 5, 19), device))  # several tiles of keys
    q = q * scale
    q[:, 3] = 0  # a row of equal logits
    g = torch.randn(2, 70, 19, device=device)

    def out_and_gradients(dtype, impl):
        inputs = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        out = attention(*inputs, impl=impl)
        return [t.double() for t in (out, *torch.autograd.grad(out, inputs, g.to(dtype)))]

    exact = out_and_gradients(torch.float64, "reference")
    formula = out_and_gradients(torch.float32, "reference")
    found = out_and_gradients(torch.float32, "triton")
    # the gradient of key is a sum over queries, so float32's error in it grows with them; backward computes the scores
    # anew, as k qᵀ, and where that rounds otherwise a logit of 5e4 moves by 4e-3, and its probability with it
    floors = (1e-5, 1e-5, 1e-5 * max(1, scale), max(1e-5, 5e-6 * scale))
    for actual, plain, wanted, floor in zip(found, formula, exact, floors, strict=True):
        # a logit of 1e4 has an error of 1e-3 in float32 before any softmax is taken, whoever takes it
        assert (actual - wanted).abs().max() <= 4 * (plain - wanted).abs().max() + floor


def test_padding_of_a_tile_stays_out_of_sums_when_all_logits_are_very_negative(device):
    # with lse = -1e4, an unmasked column of zeros has exp(+1e4) = inf, and inf · 0 is NaN
    q, k, v = (torch.randn(1, n, w, device=device) for n, w in [(70, 5), (33, 5), (33, 7)])
    q, k = q.abs() * 1e2, -k.abs() * 1e2
    inputs = [t.requires_grad_() for t in (q, k, v)]
    out, first, second = orders(
        inputs, "keys", "triton", [torch.randn(1, 70, 7, device=device), *map(torch.randn_like, inputs)]
    )
    for tensor in (out, *first, *second):
        assert tensor.isfinite().all()
    torch.testing.assert_close(
        torch.autograd.grad(attention(*inputs, impl="reference"), v, torch.ones_like(out))[0],
        torch.autograd.grad(attention(*inputs, impl="triton"), v, torch.ones_like(out))[0],
        rtol=1e-2, atol=1e-2,
    )  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_propagate_as_in_the_reference(value, device):
    for place in range(3):
        inputs = [t.detach().float() for t in qkv((1, 70, 33, 5, 19), device)]
        inputs[place][0, 2, 1] = value
        found, wanted = (attention(*inputs, impl=impl) for impl in ("triton", "reference"))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_scores_of_minus_infinity_before_finite_ones_do_not_poison_the_row(device):
    q, k, v = torch.ones(1, 3, 1, device=device), torch.zeros(1, 130, 1, device=device), None
    k[:, :100] = -float("inf")  # fills the first tile
    v = torch.randn(1, 130, 4, device=device)
    torch.testing.assert_close(
        attention(q, k, v, impl="triton"), v[:, 100:].mean(1, keepdim=True).expand(1, 3, 4)
    )


def test_keys_of_minus_infinity_get_the_gradients_of_the_formula(device):
    q, k, v = torch.ones(1, 70, 1, device=device), torch.zeros(1, 33, 1, device=device), None
    k[:, 20:] = -float("inf")
    v = torch.randn(1, 33, 4, device=device)
    grads = []
    for impl in ("triton", "reference"):
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        grads.append(torch.autograd.grad(attention(*inputs, impl=impl).square().sum(), inputs[1:]))
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def test_keys_wider_than_the_kernels_hold_are_refused_or_left_to_tiles(device):
    q, k, v = (torch.randn(1, n, w, device=device) for n, w in [(5, 257), (4, 257), (4, 3)])
    with pytest.raises(
        NotImplementedError, match="width 256 at most, got E 257; leave impl=None to use 'torch'"
    ):
        attention(q, k, v, impl="triton")
    torch.testing.assert_close(attention(q, k, v), attention(q, k, v, impl="reference"))


@pytest.mark.parametrize("width", [65, 200, 256])
def test_widest_keys_are_held(width, device):
    inputs = qkv((1, 9, 7, width, 20), device, torch.float32)
    cotangents = [torch.randn(1, 9, 20, device=device), *map(torch.randn_like, inputs)]
    found, wanted = (
        orders([t * 0.1 for t in inputs], "keys", impl, cotangents) for impl in ("triton", "reference")
    )
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_offsets_beyond_32_bits_are_computed_in_64(device, monkeypatch):
    from sagan_kernels.ops import attention_launch

    inputs = qkv((2, 70, 33, 5, 19), device, torch.float32, "NCHW")
    expected = orders(inputs, "keys", "triton", [torch.ones(2, 70, 19, device=device), *inputs])
    asked = []
    monkeypatch.setattr(attention_launch, "reach", lambda tensor: asked.append(tensor) or 2**31)
    found = orders(inputs, "keys", "triton", [torch.ones(2, 70, 19, device=device), *inputs])
    assert asked
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_reach_counts_the_farthest_element_of_one_image():
    from sagan_kernels.ops.attention_launch import reach

    t = torch.empty(0, device="meta").as_strided((3, 1000, 64), (10**9, 1, 3 * 10**7))
    assert reach(t) > 63 * 3 * 10**7
    assert reach(torch.empty(5, 4096, 64)) < 2**20


def test_results_do_not_change_from_run_to_run(device):
    inputs = qkv((2, 70, 33, 5, 19), device, torch.float32)
    cotangents = [torch.randn(2, 70, 19, device=device), *map(torch.randn_like, inputs)]
    torch.testing.assert_close(
        orders(inputs, "keys", "triton", cotangents), orders(inputs, "keys", "triton", cotangents), rtol=0, atol=0
    )  # fmt: skip


def test_gradient_of_zero_stride_is_read_in_place(device):
    inputs = qkv((2, 70, 33, 5, 19), device, torch.float32)
    found = torch.autograd.grad(attention(*inputs, impl="triton").sum(), inputs)  # sum expands one number
    wanted = torch.autograd.grad(attention(*inputs, impl="reference").sum(), inputs)
    for actual, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_r1_penalty_through_a_linear_head_is_right(device):
    # with a linear head the incoming gradient needs no gradient itself, which silences once_differentiable
    grads = []
    for impl in ("triton", "reference"):
        torch.manual_seed(1)
        q, k, v = qkv((2, 30, 20, 4, 6), device, torch.float32)
        head = torch.randn(6, device=device, requires_grad=True)
        score = (attention(q, k, v, impl=impl) @ head).sum()
        slopes = torch.autograd.grad(score, (q, k, v), create_graph=True)
        penalty = sum(s.square().sum() for s in slopes)
        grads.append(torch.autograd.grad(penalty, (q, k, v, head)))
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert wanted.abs().max() > 1e-3


def test_third_order_raises(device):
    inputs = qkv((1, 6, 5, 3, 4), device, torch.float32)
    grads = attention(*inputs, impl="triton").square().sum()
    for _ in range(2):
        grads = torch.autograd.grad(grads, inputs[0], create_graph=True)[0].square().sum()
    with pytest.raises(NotImplementedError, match=r"third order, .* impl='reference' has every order"):
        torch.autograd.grad(grads, inputs[0])


def test_nothing_of_size_ls_is_allocated(device):
    # the interpreter computes in NumPy: what PyTorch allocates are the inputs, outputs and row statistics alone
    B, L, S, E, Ev = 1, 256, 192, 4, 8
    inputs = qkv((B, L, S, E, Ev), device, torch.float32)
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
        orders(
            inputs, "keys", "triton", [torch.randn(B, L, Ev, device=device), *map(torch.randn_like, inputs)]
        )
    assert largest == L * Ev * 4


def test_padded_sdpa_agrees_on_a_layer_of_real_size(device):
    q, k, v = (t.detach() for t in qkv((1, 256, 64, 16, 64), device, torch.float32, "NCHW"))
    expected = F.scaled_dot_product_attention(F.pad(q, (0, 48)), F.pad(k, (0, 48)), v, scale=1.0)
    torch.testing.assert_close(attention(q, k, v, impl="triton"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("splits", [2, 5])
@pytest.mark.parametrize("Ev", [7, 130])  # the wider in parts
def test_split_column_passes_add_up(splits, Ev, device, monkeypatch):
    # of five spans of two tiles the last one is beyond all queries
    inputs = qkv((2, 410, 35, 5, Ev), device, dtypes(device)[0], "NCHW")
    cotangents = [torch.randn(2, 410, Ev, device=device).to(inputs[0].dtype), *map(torch.randn_like, inputs)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    wanted = orders(exact, "keys", "reference", [c.double() for c in cotangents])
    asked = []
    monkeypatch.setattr(configs, "column_splits", lambda kernel, *sizes: asked.append(kernel) or splits)
    found = orders(inputs, "keys", "triton", cotangents)
    assert {*asked} == {"column", "double_column"}
    tolerance = TOLERANCES[inputs[0].dtype]
    for order, several in ((1, 2), (2, 8)):
        for actual, expected in zip(found[order], wanted[order], strict=True):
            assert_near(actual, expected, several * tolerance)


def test_only_small_grids_are_split():
    assert configs.column_splits("column", 64, 4096, 1024, 16, 64, "half", "sm_90") == 1
    assert configs.column_splits("column", 1, 4096, 1024, 16, 64, "half", "sm_90") > 4
    assert configs.column_splits("column", 1, 100, 25, 16, 64, "half", "sm_90") == 1


@pytest.mark.parametrize("shape", [(0, 20, 10, 4, 6), (2, 0, 10, 4, 6)])
def test_operators_take_empty_inputs(shape, device):
    B, L, S, E, Ev = shape
    rows, maps = [torch.zeros(B, n, w, device=device) for n, w in [(L, E), (S, E), (S, Ev)]], (B, L, Ev)
    ops = torch.ops.sagan_kernels
    out, lse = ops.attention_forward(*rows, "triton")
    grads = ops.attention_backward(*rows, out, lse, torch.zeros(maps, device=device), "triton")
    second = ops.attention_double_backward(*rows, out, lse, out, grads[0], *rows, "triton")
    for t, like in zip((*grads, *second), (*rows, *rows, out), strict=True):
        assert t.shape == like.shape
        assert not t.any()
