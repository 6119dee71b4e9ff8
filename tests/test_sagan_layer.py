"""The whole attention layer in every form and implementation, against the formula in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrizations

from sagan_kernels import reference
from sagan_kernels.nn import PaperSelfAttention2d, SelfAttention2d, spectral_norm
from sagan_kernels.ops import configs, sagan_attention
from sagan_kernels.ops.sagan_layer import project_pool

IMPLS = ["triton", "torch"]
# a GPU computes in float32 at most, the interpreter in float64
DEVICE, DTYPE, TOLERANCE = (
    ("cuda", torch.float32, 1e-3) if torch.cuda.is_available() else ("cpu", torch.float64, 1e-9)
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, within the interpreter


def assert_same(found, expected, **keywords):
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE, **keywords)


def random(*shape, dtype=DTYPE, **keywords):
    return torch.randn(*shape, dtype=dtype, device=DEVICE, **keywords)


def weights(C, E, Ev, biases, out=True, dtype=DTYPE):
    shapes = {"query": (E, C), "key": (E, C), "value": (Ev, C)} | ({"out": (C, Ev)} if out else {})
    given = {f"{n}_weight": random(*s, 1, 1, dtype=dtype) / s[1] ** 0.5 for n, s in shapes.items()}
    given.setdefault("out_weight", None)
    if biases:
        given |= {f"{n}_bias": random(s[0], dtype=dtype) for n, s in shapes.items()}
    return given | {"gamma": torch.full((1,), 0.7, dtype=dtype, device=DEVICE)}


FORMS = {
    "released": dict(C=24, E=3, Ev=12, biases=False),
    "biased": dict(C=24, E=3, Ev=12, biases=True),
    "paper": dict(C=19, E=2, Ev=19, biases=True, out=False),
    "wide": dict(C=8, E=4, Ev=130, biases=False),  # no fused layer, and values in parts
}


def call(impl, x, given, **keywords):
    given = dict(given)
    head = [given.pop(f"{n}_weight") for n in ("query", "key", "value", "out")]
    return sagan_attention(x, *head, given.pop("gamma"), **given, impl=impl, **keywords)


@pytest.mark.parametrize("normalize", ["keys", "queries"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("impl", IMPLS)
def test_layer_matches_the_formula_to_the_second_order(impl, form, memory_format, normalize):
    pool = form != "paper"
    given = weights(**FORMS[form])
    x = random(2, FORMS[form]["C"], 7, 6).contiguous(memory_format=memory_format)
    leaves = [x, *(t for t in given.values() if t is not None)]
    for t in leaves:
        t.requires_grad_()
    results = []
    for word in (impl, "reference"):
        out = call(word, x, given, pool=pool, normalize=normalize)
        first = torch.autograd.grad(out, leaves, torch.ones_like(out), create_graph=True)
        penalty = sum(f.square().sum() for f in first)
        results.append((out, first, torch.autograd.grad(penalty, leaves)))
    assert_same(*results)
    with torch.no_grad():
        assert_same(call(impl, x, given, pool=pool, normalize=normalize), results[1][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fused_layer_is_as_exact_as_its_dtype(dtype):
    assert configs.layer_tiling(64, 8, 32, "ieee", "sm_90") is not None
    given, x = weights(64, 8, 32, False, dtype=torch.float64), random(2, 64, 9, 8, dtype=torch.float64)
    expected = call("reference", x, given)
    with torch.no_grad():
        found = call("triton", x.to(dtype), {n: t if t is None else t.to(dtype) for n, t in given.items()})
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_fused_layer_reads_maps_whose_rows_are_not_dense():
    given, x = weights(24, 3, 12, True), random(2, 24, 6, 4)
    for view in (x.mT, random(2, 24, 6, 9)[..., ::2]):
        assert_same(call("triton", view, given), call("reference", view, given))


def test_a_bias_alone_gets_its_gradient():
    given, x = weights(24, 3, 12, True), random(2, 24, 4, 4)
    for name in ("query_bias", "key_bias", "value_bias", "out_bias"):
        given[name].requires_grad_()
        found, expected = (
            torch.autograd.grad(call(impl, x, given).square().sum(), given[name])
            for impl in ("triton", "reference")
        )
        assert_same(found, expected)
        given[name].requires_grad_(False)


@pytest.mark.parametrize("pool", [True, False])
def test_biases_may_be_strided(pool):
    given, x = weights(24, 3, 12, True), random(2, 24, 4, 4)
    for name in ("query_bias", "key_bias", "value_bias", "out_bias"):
        given[name] = torch.stack([given[name], torch.full_like(given[name], 9.0)], 1)[:, 0]
    assert_same(call("triton", x, given, pool=pool), call("reference", x, given, pool=pool))
    weight, bias = given["value_weight"].flatten(1), given["value_bias"]
    assert_same(project_pool(x, weight, bias), project_pool(x, weight, bias.clone()))


def test_fused_unpooled_layer_projects_the_query_once(monkeypatch):
    from sagan_kernels.ops import attention

    widths = []
    projected = attention.__globals__["_projected"]
    monkeypatch.setitem(
        attention.__globals__, "_projected", lambda m, w, b: widths.append(len(w)) or projected(m, w, b)
    )
    given, x = weights(24, 3, 12, True), random(2, 24, 5, 4)
    assert_same(call("triton", x, given, pool=False), call("reference", x, given, pool=False))
    assert widths == [15]  # key and value


@pytest.mark.parametrize("impl", IMPLS)
def test_float16_keeps_a_small_gamma(impl):
    # gamma · weight would be subnormal, of few bits
    given = weights(32, 4, 8, False, dtype=torch.float16) | {"gamma": torch.tensor([1e-4]).half().to(DEVICE)}
    given["out_weight"] = given["out_weight"] / 16
    x = random(2, 32, 6, 6, dtype=torch.float16)
    leaves = [t.requires_grad_() for t in (x, *given.values())]
    found = torch.autograd.grad(10 * call(impl, x, given).float().square().sum(), leaves)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    expected = torch.autograd.grad(
        10 * call("reference", exact[0], dict(zip(given, exact[1:], strict=True))).square().sum(), exact
    )
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= 4e-3 * b.norm()


@pytest.mark.parametrize(("batch", "channels"), [(16, 192), (15, 192), (16, 184)])
def test_wide_small_maps_of_many_images_are_convolved_on_a_cpu(batch, channels, monkeypatch):
    from sagan_kernels.ops import attention

    products = []
    by_matrices = attention.__globals__["_layer_by_matrices"]
    monkeypatch.setitem(
        attention.__globals__, "_layer_by_matrices", lambda *a: products.append(1) or by_matrices(*a)
    )
    given = weights(channels, 24, 96, True, dtype=torch.float64)
    given = {name: t.cpu() for name, t in given.items()}
    x = torch.randn(batch, channels, 5, 4, dtype=torch.float64, requires_grad=True)
    found, expected = (
        torch.autograd.grad(call(impl, x, given).square().sum(), x)[0] for impl in ("torch", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert len(products) == (batch < 16 or channels < 192)


def test_wide_offsets_change_nothing(monkeypatch):
    from sagan_kernels.ops import sagan_layer

    given, x = weights(24, 3, 12, False), random(2, 24, 6, 4)
    expected = call("triton", x, given)
    monkeypatch.setattr(sagan_layer, "reach", lambda tensor: 2**31)
    assert_same(call("triton", x, given), expected)


def test_older_hooks_normalize_and_train_the_weights():
    module, x = SelfAttention2d(16).to(DEVICE, DTYPE), random(2, 16, 6, 6)
    torch.nn.init.constant_(module.gamma, 0.7)
    for name in ("query", "key", "value", "out"):
        torch.nn.utils.spectral_norm(getattr(module, name), n_power_iterations=30)
    convolved = module.query(x)  # the convolution itself, called
    layer = module(x)
    layer.square().sum().backward()
    for name in ("query", "key", "value", "out"):
        conv = getattr(module, name)
        assert conv.weight_orig.grad.abs().max() > 0
        weight = conv.weight.detach().flatten(1)
        torch.testing.assert_close(torch.linalg.matrix_norm(weight, 2).item(), 1.0, rtol=2e-2, atol=0)
        assert not 0.98 < torch.linalg.matrix_norm(conv.weight_orig.flatten(1), 2) < 1.02
    assert_same(F.conv2d(x, module.query.weight), convolved)


def test_fused_layer_runs_only_where_no_derivative_can_be_taken(monkeypatch):
    from sagan_kernels.ops import attention

    calls = []
    fused = attention.__globals__["sagan_forward"]
    monkeypatch.setitem(attention.__globals__, "sagan_forward", lambda *a: calls.append(1) or fused(*a))
    given, x = weights(24, 3, 12, False), random(1, 24, 4, 4)
    call("triton", x, given)
    assert len(calls) == 1
    call("triton", x.clone().requires_grad_(), given)
    tangent = torch.func.jvp(lambda x: call("triton", x, given), (x,), (torch.ones_like(x),))[1]
    assert len(calls) == 1
    expected = torch.func.jvp(lambda x: call("reference", x, given), (x,), (torch.ones_like(x),))[1]
    assert_same(tangent, expected)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [(2, 2), (7, 5), (33, 4)])  # at 2×2 a weight has more elements than the maps
def test_pooled_projection_matches_conv_and_max_pool(size, channels_last):
    x = random(2, 5, *size)
    x = (x.contiguous(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
    w = random(70, 5, requires_grad=True)
    b = random(70, requires_grad=True)
    found, expected = project_pool(x, w, b), F.max_pool2d(F.conv2d(x, w[..., None, None], b), 2)
    expected = reference.positions(expected)
    assert_same(found, expected)
    g = torch.randn_like(expected)
    assert_same(torch.autograd.grad(found, (x, w, b), g), torch.autograd.grad(expected, (x, w, b), g))


def test_ties_go_to_the_first_in_scan_order_and_nan_wins():
    x = torch.zeros(1, 1, 4, 4, dtype=DTYPE, device=DEVICE)
    x[0, 0, 0, 3] = float("nan")
    x.requires_grad_()
    one = torch.ones(1, 1, dtype=DTYPE, device=DEVICE)
    found, expected = project_pool(x, one, None), F.max_pool2d(x, 2).flatten(2).mT
    assert_same(found, expected, equal_nan=True)
    g = torch.arange(1.0, 5.0, dtype=DTYPE, device=DEVICE).view(1, 4, 1)
    assert_same(torch.autograd.grad(found, x, g), torch.autograd.grad(expected, x, g))


def test_pooled_projection_is_an_operator_with_every_derivative():
    x, w, b = (random(*s, requires_grad=True) for s in [(2, 3, 4, 5), (4, 3), (4,)])
    if torch.float64 == DTYPE:
        assert torch.autograd.gradcheck(project_pool, (x, w, b), fast_mode=True, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(project_pool, (x, w, b), fast_mode=True)
    torch.library.opcheck(torch.ops.sagan_kernels.project_pool.default, (x, w, b))
    plain = lambda x, w, b: reference.positions(F.max_pool2d(F.conv2d(x, w[..., None, None], b), 2))  # noqa: E731
    for dims in [(0, None, None), (None, 0, 0)]:
        pairs = zip((x, w, b), dims, strict=True)
        many = [t.detach() if d is None else torch.stack([t, 2 * t]).detach() for t, d in pairs]
        assert_same(
            torch.func.vmap(project_pool, in_dims=dims)(*many), torch.func.vmap(plain, in_dims=dims)(*many)
        )


def test_fused_layer_passes_opcheck():
    given, x = weights(24, 3, 12, True), random(2, 24, 4, 4)
    query, out = given["query_weight"].flatten(1), given["out_weight"].flatten(1)
    args = (x, query, given["query_bias"], random(2, 4, 3), random(2, 4, 12), out, None, given["gamma"])
    torch.library.opcheck(torch.ops.sagan_kernels.sagan_forward.default, args)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_in_x_propagates_as_in_the_reference(impl):
    given, x = weights(24, 3, 12, False), random(2, 24, 5, 4)
    x[0, 3, 2, 1] = float("nan")
    assert_same(call(impl, x, given), call("reference", x, given), equal_nan=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_batch_gives_an_empty_result(impl):
    given, x = weights(24, 3, 12, False), torch.zeros(0, 24, 4, 4, dtype=torch.float64, requires_grad=True)
    out = call(impl, x, given)
    assert out.shape == x.shape
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.shape == x.shape


@pytest.mark.parametrize("impl", IMPLS)
def test_in_place_relu_may_follow_the_layer(impl):
    given, x = weights(24, 3, 12, False), random(1, 24, 4, 4, requires_grad=True)
    found = torch.autograd.grad(call(impl, x, given).relu_().square().sum(), x)
    assert_same(found, torch.autograd.grad(call("reference", x, given).relu().square().sum(), x))


@pytest.mark.parametrize(
    "style", [parametrizations.spectral_norm, torch.nn.utils.spectral_norm, spectral_norm]
)
def test_every_style_of_spectral_norm_applies_to_the_projections(style, monkeypatch):
    module, x = SelfAttention2d(16).to(DEVICE, DTYPE), random(2, 16, 6, 6)
    torch.nn.init.constant_(module.gamma, 0.7)
    for name in ("query", "key", "value", "out"):
        style(getattr(module, name))
    module.eval()
    monkeypatch.setenv("SAGAN_KERNELS_IMPL", "triton")
    found = module(x)
    monkeypatch.setenv("SAGAN_KERNELS_IMPL", "reference")
    assert_same(found, module(x))


def test_paper_form_is_the_formula_of_the_text():
    module, x = PaperSelfAttention2d(16).to(DEVICE, DTYPE), random(2, 16, 5, 3)
    torch.nn.init.constant_(module.gamma, 0.7)
    f, g, h = (m(x).flatten(2) for m in (module.key, module.query, module.value))
    beta = torch.softmax(torch.einsum("bci,bcj->bij", f, g), 1)  # equation 1: normalized over i, for each j
    expected = 0.7 * torch.einsum("bij,bci->bcj", beta, h).unflatten(2, (5, 3)) + x
    assert_same(module(x), expected)
    assert {n for n, _ in module.named_parameters()} == {
        "gamma", "query.weight", "query.bias", "key.weight", "key.bias", "value.weight", "value.bias",
    }  # fmt: skip


@pytest.mark.parametrize("layer", [SelfAttention2d, PaperSelfAttention2d])
def test_attention_map_rows_are_those_the_layer_uses(layer):
    module, x = layer(16).to(DEVICE, DTYPE), random(2, 16, 6, 5)
    torch.nn.init.constant_(module.gamma, 1.0)
    full = module.attention_map(x)
    pooled = layer is SelfAttention2d
    assert full.shape == ((2, 30, 3, 2) if pooled else (2, 30, 6, 5))
    assert_same(full.sum((2, 3)), torch.ones(2, 30, dtype=DTYPE, device=DEVICE))
    chosen = torch.tensor([29, 0, 13])
    assert_same(module.attention_map(x, chosen), full[:, chosen])
    value = module.value(x)
    value = F.max_pool2d(value, 2) if pooled else value
    o = torch.einsum("blhw,bchw->bcl", full, value).unflatten(2, (6, 5))
    assert_same(module(x), x + (module.out(o) if pooled else o))


@pytest.mark.parametrize("positions", [[30], [-1], [0.5], [[1]], [True] * 30])
def test_positions_outside_the_map_are_refused(positions):
    with pytest.raises(ValueError, match="positions must be 1-D integers from 0 to 29"):
        SelfAttention2d(16).attention_map(torch.zeros(1, 16, 6, 5), torch.tensor(positions))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 24, 4)}, ValueError, r"x must be \(B, C, H, W\) .* got \(3, 24, 4\)"),
        ({"x": torch.zeros(3, 24, 4, 1)}, ValueError, "H and W at least 2"),
        ({"x": torch.zeros(1, 24, 4, 4, dtype=torch.int64)}, TypeError, "x must be floating-point, got torch.int64"),
        ({"key_weight": torch.zeros(4, 24, 1, 1)}, ValueError, r"key_weight must be \(3, 24, 1, 1\) for x"),
        ({"key_weight": torch.zeros(3, 24, 3, 3)}, ValueError, r"key_weight must be \(3, 24, 1, 1\) for x"),
        ({"out_weight": torch.zeros(12, 24, 1, 1)}, ValueError, r"out_weight must be \(24, 12, 1, 1\)"),
        ({"out_weight": None}, ValueError, r"value_weight must be \(C, C\), got \(12, 24\)"),
        ({"gamma": torch.zeros(24)}, ValueError, r"gamma must have one element, got \(24,\)"),
        ({"gamma": torch.zeros((), device="meta")}, ValueError, "gamma must be on cpu as x is, got meta"),
        ({"gamma": torch.zeros((), dtype=torch.int64)}, TypeError, "gamma must be floating-point"),
        ({"query_weight": torch.zeros(())}, ValueError, r"query_weight must be \(E, C, 1, 1\), got \(\)"),
        ({"query_bias": torch.zeros(3, 1)}, ValueError, r"query_bias must be \(3,\)"),
        ({"query_bias": torch.zeros(4)}, ValueError, r"query_bias must be \(3,\)"),
        ({"value_weight": torch.zeros(12, 24, 1, 1).double()}, ValueError, "value_weight must be torch.float32 as x"),
        ({"value_weight": torch.zeros(12, 24, 1, 1, device="meta")}, ValueError, "must be on cpu as x is, got meta"),
        ({"normalize": "rows"}, ValueError, "normalize must be 'keys' or 'queries', got 'rows'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change, error, message):
    given = weights(24, 3, 12, False, dtype=torch.float32) | {"x": torch.zeros(1, 24, 4, 4)} | change
    with pytest.raises(error, match=f"sagan_attention: .*{message}"):
        call(None, given.pop("x"), given)
