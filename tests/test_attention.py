"""The attention operators and module against SDPA, float64 and the layer written out by hand."""

import pytest
import torch
import torch.nn.functional as F

from sagan_kernels import reference
from sagan_kernels.nn import SelfAttention2d
from sagan_kernels.ops import attention, sagan_attention

# (B, L, S, E, Ev): a SAGAN layer at 16×16, lengths and widths no tile divides, one key, E > Ev
SHAPES = [(2, 256, 64, 8, 32), (1, 100, 25, 5, 19), (3, 49, 49, 16, 7), (2, 9, 1, 3, 4)]


def qkv(shape, dtype=torch.float32, grad=True):
    B, L, S, E, Ev = shape
    return [torch.randn(B, *d, dtype=dtype, requires_grad=grad) for d in [(L, E), (S, E), (S, Ev)]]


def layer(channels=16, dtype=torch.float64):
    module = SelfAttention2d(channels).to(dtype)
    torch.nn.init.constant_(module.gamma, 0.7)
    return module


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_matches_unscaled_sdpa(shape):
    q, k, v = qkv(shape, torch.float64)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    torch.testing.assert_close(reference.attention(q, k, v), expected)


@pytest.mark.parametrize("impl", ["torch", "reference", None])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_matches_float64(shape, grad, impl):
    q, k, v = qkv(shape, grad=grad)
    expected = reference.attention(q.double(), k.double(), v.double()).float()
    torch.testing.assert_close(attention(q, k, v, impl=impl), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_attention_without_gradient_survives_huge_logits_and_strided_views(scale):
    x = torch.randn(2, 40, 6, 6)[:, ::2].to(memory_format=torch.channels_last)
    q, k, v = (reference.positions(t) for t in (x[:, :4] * scale, x[:, 4:8], x[:, 8:]))
    expected = reference.attention(q.double(), k.double(), v.double()).float()
    torch.testing.assert_close(attention(q, k, v), expected, rtol=1e-5, atol=1e-5)


def test_attention_differentiates_twice():
    inputs = qkv((2, 6, 5, 3, 4), torch.float64)
    assert torch.autograd.gradcheck(attention, inputs)
    assert torch.autograd.gradgradcheck(attention, inputs)


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (2, 3)])
def test_layer_matches_the_formula_written_out(size):
    module, x = layer(), torch.randn(2, 16, *size, dtype=torch.float64)
    theta, phi, g, o = (
        w.flatten(1).detach()
        for w in (module.query.weight, module.key.weight, module.value.weight, module.out.weight)
    )
    H, W = x.shape[2:]
    flat = x.flatten(2)
    pool = lambda t: F.max_pool2d(t.unflatten(2, (H, W)), 2).flatten(2)  # noqa: E731
    beta = torch.einsum("bcl,bcs->bls", theta @ flat, pool(phi @ flat)).softmax(2)
    expected = x + 0.7 * (o @ torch.einsum("bcs,bls->bcl", pool(g @ flat), beta)).unflatten(2, (H, W))
    torch.testing.assert_close(module(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected)
        torch.testing.assert_close(module(x.to(memory_format=torch.channels_last)), expected)


def test_layer_gradients_match_finite_differences():
    module, x = layer(8), torch.randn(1, 8, 4, 5, dtype=torch.float64, requires_grad=True)
    weights = [p for p in module.parameters() if p.requires_grad]

    def run(x, *weights):
        q, k, v, o = (w for w in weights if w.ndim == 4)
        gamma = next(w for w in weights if w.ndim == 0)
        return sagan_attention(x, q, k, v, o, gamma)

    assert torch.autograd.gradcheck(run, (x, *weights))
    assert torch.autograd.gradgradcheck(run, (x, *weights), fast_mode=True)


def test_module_starts_as_the_identity_and_may_be_followed_by_an_in_place_relu():
    module, x = SelfAttention2d(16), torch.randn(2, 16, 6, 6)
    y = module(x)
    torch.testing.assert_close(y, x)
    torch.nn.init.constant_(module.gamma, 0.5)
    module(x.requires_grad_()).relu_().sum().backward()
    assert x.grad.isfinite().all()
    assert module.query.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("channels", [0, 4, 12, 60])
def test_channels_that_eight_does_not_divide_are_refused(channels):
    with pytest.raises(ValueError, match=f"channels must be a positive multiple of 8, got {channels}"):
        SelfAttention2d(channels)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 4, 8), (1, 4, 16), (1, 4, 32)], r"same width E, got query \(1, 4, 8\), key \(1, 4, 16\)"),
        ([(1, 4, 8), (1, 5, 8), (1, 4, 32)], "same length S"),
        ([(2, 4, 8), (1, 4, 8), (1, 4, 32)], "batch sizes must be equal"),
        ([(4, 8), (1, 4, 8), (1, 4, 32)], "must be 3-D"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes, message):
    with pytest.raises(ValueError, match=message):
        attention(*(torch.zeros(s) for s in shapes))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({1: torch.zeros(1, 4, 8).long()}, TypeError, "key must be floating-point, got torch.int64"),
        ({2: torch.zeros(1, 4, 8).double()}, ValueError, "one dtype, got torch.float32 and torch.float64"),
        ({2: torch.zeros(1, 4, 8, device="meta")}, ValueError, "on one device, got cpu and meta"),
    ],
)
def test_kinds_that_do_not_fit_are_named(change, error, message):
    inputs = [change.get(i, torch.zeros(1, 4, 8)) for i in range(3)]
    with pytest.raises(error, match=message):
        attention(*inputs)


def test_unknown_normalization_is_refused():
    with pytest.raises(ValueError, match="normalize must be 'keys' or 'queries', got 'rows'"):
        attention(*qkv(SHAPES[1]), normalize="rows")


def test_distributed_tensors_are_refused_with_what_to_do():
    class DTensor(torch.Tensor):
        pass

    q, k, v = qkv(SHAPES[1], grad=False)
    with pytest.raises(TypeError, match=r"key must be a plain tensor, got a DTensor; .* full_tensor\(\)"):
        attention(q, k.as_subclass(DTensor), v)


@pytest.mark.parametrize("sizes", [(0, 4, 5), (2, 0, 5), (2, 4, 0)])
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_empty_tensors_give_what_the_formula_gives(impl, sizes):
    B, L, S = sizes
    inputs = qkv((B, L, S, 3, 4))
    out = attention(*inputs, impl=impl)
    torch.testing.assert_close(out, reference.attention(*inputs))
    torch.autograd.grad(out.sum(), inputs)


def test_feature_map_too_small_to_pool_is_refused():
    with pytest.raises(ValueError, match=r"H and W at least 2, got \(2, 16, 1, 4\)"):
        SelfAttention2d(16)(torch.zeros(2, 16, 1, 4))
