"""The attention operators under torch.func, forward mode, compile, export, checkpointing and autocast."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sagan_kernels import reference
from sagan_kernels.nn import PaperSelfAttention2d, SelfAttention2d
from sagan_kernels.ops import attention

IMPLS = ["triton", "torch"]
# a GPU computes in float32 at most, the interpreter in float64
DEVICE, DTYPE, TOLERANCE = (
    ("cuda", torch.float32, 1e-3) if torch.cuda.is_available() else ("cpu", torch.float64, 1e-9)
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, within the interpreter


@pytest.fixture(autouse=True)
def _tiles_at_every_size(monkeypatch):
    """Small maps take the operators too, not the formula."""
    from sagan_kernels.ops import attention_tiles

    monkeypatch.setattr(attention_tiles, "stores_map", lambda *_: False)


def qkv(B=2, L=7, S=5, E=3, Ev=4, dtype=DTYPE):
    return [torch.randn(B, *d, dtype=dtype, device=DEVICE) for d in [(L, E), (S, E), (S, Ev)]]


def by(impl, **keywords):
    return lambda q, k, v: attention(q, k, v, impl=impl, **keywords)


def assert_same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("normalize", ["keys", "queries"])
@pytest.mark.parametrize("impl", IMPLS)
def test_func_grad_jvp_and_vmap_agree_with_the_formula(impl, normalize):
    q, k, v = qkv()
    directions = tuple(torch.randn_like(t) for t in (q, k, v))
    many = torch.randn(3, *q.shape, dtype=q.dtype, device=DEVICE)
    results = []
    for f in (by(impl, normalize=normalize), by("reference", normalize=normalize)):
        loss = lambda *t, f=f: f(*t).square().sum()  # noqa: E731
        grad = torch.func.grad(loss, argnums=(0, 1, 2))
        along = lambda *t, f=f: torch.func.jvp(f, t, directions)[1].square().sum()  # noqa: E731
        results.append(
            {
                "jvp": torch.func.jvp(f, (q, k, v), directions)[1],
                "grad": grad(q, k, v),
                "forward over reverse": torch.func.jvp(grad, (q, k, v), directions)[1],
                "vmap of a query": torch.func.vmap(f, in_dims=(0, None, None))(many, k, v),
                "vmap of a gradient": torch.func.vmap(grad, in_dims=(0, None, None))(many, k, v),
                "vmap from the last dimension": torch.func.vmap(f, in_dims=(3, None, None))(
                    many.movedim(0, 3), k, v
                ),
            }
            | ({"reverse over forward": torch.func.grad(along)(q, k, v)} if normalize == "keys" else {})
        )
    assert_same(*results)


@pytest.mark.parametrize("normalize", ["keys", "queries"])
@pytest.mark.parametrize("impl", IMPLS)
def test_tensors_that_outlive_their_transform_are_read(impl, normalize):
    # the backward pass of vjp runs after the transform has ended, on what it saved within
    inputs, grad = qkv(), torch.randn(2, 7, 4, dtype=DTYPE, device=DEVICE)
    results = []
    for f in (by(impl, normalize=normalize), by("reference", normalize=normalize)):
        leaked = []
        torch.func.grad(lambda t, into=leaked: into.append(2 * t) or t.sum())(inputs[0])
        pulled = torch.func.vjp(f, *inputs)[1]
        with torch.no_grad():
            results.append((pulled(grad), f(*leaked, *inputs[1:])))
    assert_same(*results)


@pytest.mark.parametrize("normalize", ["keys", "queries"])
@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_may_be_batched(impl, normalize):
    inputs = [t.requires_grad_() for t in qkv()]
    results = []
    for f in (by(impl, normalize=normalize), by("reference", normalize=normalize)):
        out = f(*inputs)
        torch.manual_seed(1)
        grads = torch.randn(3, *out.shape, dtype=DTYPE, device=DEVICE)
        first = torch.autograd.grad(out, inputs, grads, is_grads_batched=True, create_graph=True)
        directions = [torch.randn(2, *g.shape, dtype=DTYPE, device=DEVICE) for g in first]
        results.append((first, torch.autograd.grad(first, inputs, directions, is_grads_batched=True)))
    assert_same(*results)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (SelfAttention2d, (2, 16, 6, 5)),
        (PaperSelfAttention2d, (2, 16, 6, 5)),
        (SelfAttention2d, (2, 64, 3, 4)),
    ],
)  # in the last a weight has more elements than the maps
@pytest.mark.parametrize("impl", IMPLS)
def test_layer_gives_vjps_and_batched_gradients(impl, layer, shape, memory_format, monkeypatch):
    module = layer(shape[1]).to(DEVICE, DTYPE)
    torch.nn.init.constant_(module.gamma, 0.7)
    x = (
        torch.randn(shape, dtype=DTYPE, device=DEVICE)
        .contiguous(memory_format=memory_format)
        .requires_grad_()
    )
    grads = torch.randn(3, *x.shape, dtype=DTYPE, device=DEVICE)
    results = []
    for word in (impl, "reference"):
        monkeypatch.setenv("SAGAN_KERNELS_IMPL", word)
        batched = torch.autograd.grad(module(x), [x, *module.parameters()], grads, is_grads_batched=True)
        parameters = {n: p.detach() for n, p in module.named_parameters()}
        call = lambda p, x: torch.func.functional_call(module, p, (x,))  # noqa: E731
        results.append((batched, torch.func.vjp(call, parameters, x.detach())[1](grads[0])))
    assert_same(*results)


@pytest.mark.parametrize("impl", IMPLS)
def test_hessian_by_two_reverse_passes(impl):
    q, k, v = qkv(1, 3, 4, 2, 3)
    hessian = [
        torch.func.jacrev(torch.func.jacrev(lambda t, f=f: f(t, k, v).square().sum()))(q)
        for f in (by(impl), by("reference"))
    ]
    assert_same(*hessian)


@pytest.mark.parametrize("impl", IMPLS)
def test_dual_tensors_carry_a_tangent(impl):
    q, k, v = qkv()
    direction = torch.randn_like(k)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(k, direction)
        found = torch.autograd.forward_ad.unpack_dual(attention(q, dual, v, impl=impl)).tangent
    assert_same(found, torch.func.jvp(lambda k: reference.attention(q, k, v), (k,), (direction,))[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_operators_pass_opcheck(impl):
    q, k, v = (t.requires_grad_() for t in qkv())
    ops = torch.ops.sagan_kernels
    torch.library.opcheck(ops.attention_forward.default, (q, k, v, impl))
    torch.library.opcheck(ops.attention_over_queries.default, (q, k, v, impl))
    out, lse = (t.detach() for t in ops.attention_forward(q, k, v, impl))
    g = torch.randn_like(out).requires_grad_()
    torch.library.opcheck(ops.attention_backward.default, (q, k, v, out, lse, g, impl))
    a, b, c = (torch.randn_like(t) for t in (q, k, v))
    torch.library.opcheck(ops.attention_tangent.default, (q, k, v, out, lse, a, b, c, impl))
    args = (*(t.detach() for t in (q, k, v)), out, lse, g.detach(), a, a, b, c, impl)
    torch.library.opcheck(ops.attention_double_backward.default, args)


@pytest.mark.parametrize("normalize", ["keys", "queries"])
@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_whole_with_gradients(impl, normalize):
    torch._dynamo.reset()
    f = by(impl, normalize=normalize)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    inputs = [t.mT.contiguous().mT.requires_grad_() for t in qkv()]  # channels first
    found = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    assert_same(
        found, torch.autograd.grad(by("reference", normalize=normalize)(*inputs).square().sum(), inputs)
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_penalty_inside_compile_is_right(impl):
    torch._dynamo.reset()

    def penalty(q, k, v, f):
        (slope,) = torch.autograd.grad(f(q, k, v).square().sum(), q, create_graph=True)
        return slope.square().sum()

    inputs = [t.requires_grad_() for t in qkv()]
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(lambda *t: penalty(*t, by(impl)), fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(*inputs), inputs)
    assert_same(found, torch.autograd.grad(penalty(*inputs, by("reference")), inputs))


@pytest.mark.parametrize(
    "size", [(6, 5), (32, 32)]
)  # maps that eager stores on a CPU, or from some batch on not
@pytest.mark.parametrize("impl", IMPLS)
def test_exports_with_a_free_batch(impl, size, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("SAGAN_KERNELS_IMPL", impl)
    module = SelfAttention2d(16).eval().to(DEVICE)
    torch.nn.init.constant_(module.gamma, 0.7)
    batch = torch.export.Dim("batch", min=2, max=64)
    example = torch.randn(3, 16, *size, device=DEVICE)
    program = torch.export.export(module, (example,), dynamic_shapes={"x": {0: batch}})
    x = torch.randn(2, 16, *size, device=DEVICE)
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_module_compiles_whole_with_gradients(impl, monkeypatch):
    monkeypatch.setenv("SAGAN_KERNELS_IMPL", impl)
    torch._dynamo.reset()
    module, x = SelfAttention2d(16).to(DEVICE, DTYPE), torch.randn(2, 16, 6, 5, device=DEVICE, dtype=DTYPE)
    torch.nn.init.constant_(module.gamma, 0.7)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_(), *module.parameters()]
    found = torch.autograd.grad(compiled(x).square().sum(), leaves)
    assert_same(found, torch.autograd.grad(module(x).square().sum(), leaves))
    with torch.no_grad():
        assert_same(compiled(x), module(x))


def test_layers_of_free_sizes_compile_whole():
    torch.manual_seed(0)
    torch._dynamo.reset()
    # the second width makes the number of channels a free size
    for layer in (SelfAttention2d(32), SelfAttention2d(64)):
        torch.nn.init.constant_(layer.gamma, 0.5)
        x = torch.randn(2, layer.query.in_channels, 9, 7)
        expected = layer(x)
        layer.compile(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(layer(x), expected)


def test_forward_mode_within_compile_is_right_or_refused():
    torch._dynamo.reset()
    q, k, v = qkv()
    along = lambda f: lambda q: torch.func.jvp(lambda t: f(t, k, v), (q,), (torch.ones_like(q),))[1]  # noqa: E731
    found = torch.compile(along(by(None)), fullgraph=True, backend="aot_eager")(q)
    assert_same(found, along(by("reference"))(q))
    with pytest.raises(
        Exception, match=r"within torch\.compile, torch\.func and forward mode have no kernels"
    ):
        torch.compile(along(by("triton")), fullgraph=True, backend="aot_eager")(q)


def test_reverse_over_forward_of_attention_over_queries_is_refused_by_name():
    q, k, v = qkv()
    along = lambda q: torch.func.jvp(by("torch", normalize="queries"), (q, k, v), (q, k, v))[1].sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match="forward mode of normalize='queries'"):
        torch.func.grad(along)(q)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("impl", IMPLS)
def test_layer_under_autocast_takes_wide_and_narrow_inputs(impl, dtype, grad, monkeypatch):
    module, x = SelfAttention2d(16).to(DEVICE), torch.randn(2, 16, 6, 5, device=DEVICE)
    torch.nn.init.constant_(module.gamma, 0.7)
    expected = module(x)
    monkeypatch.setenv("SAGAN_KERNELS_IMPL", impl)
    with torch.set_grad_enabled(grad), torch.autocast(DEVICE, torch.float16):
        found = module(x.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(DEVICE == "cuda", reason="bfloat16 is refused by the interpreter only")
def test_autocast_to_a_dtype_the_kernels_lack_is_refused(monkeypatch):
    monkeypatch.setenv("SAGAN_KERNELS_IMPL", "triton")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(NotImplementedError, match="bfloat16"):
        SelfAttention2d(16)(torch.zeros(1, 16, 4, 4))


def test_autocast_that_leaves_dtypes_apart_is_refused():
    q, k, v = qkv(dtype=torch.float32)
    with (
        torch.autocast(DEVICE, torch.float16),
        pytest.raises(ValueError, match=r"one dtype, got torch\.float16 and"),
    ):
        attention(q.double(), k, v)


@pytest.mark.parametrize("impl", IMPLS)
def test_checkpointing_gives_the_same_gradients(impl):
    inputs = [t.requires_grad_() for t in qkv()]
    f = by(impl)
    found = torch.autograd.grad(checkpoint(f, *inputs, use_reentrant=False).square().sum(), inputs)
    assert_same(found, torch.autograd.grad(f(*inputs).square().sum(), inputs))


@pytest.mark.parametrize("impl", IMPLS)
def test_output_may_be_modified_in_place(impl):
    inputs = [t.requires_grad_() for t in qkv()]
    found = torch.autograd.grad(attention(*inputs, impl=impl).relu_().square().sum(), inputs)
    assert_same(found, torch.autograd.grad(reference.attention(*inputs).relu().square().sum(), inputs))


def test_autocast_casts_as_a_convolution_does():
    q, k, v = (t.requires_grad_() for t in qkv(dtype=torch.float32))
    with torch.autocast(DEVICE, torch.bfloat16):
        out = attention(q, k, v, impl="torch")
    assert out.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(out.float().square().sum(), q)
    assert grad.dtype == torch.float32
    exact = attention(q, k, v, impl="reference")
    torch.testing.assert_close(out.float(), exact, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(
        grad, torch.autograd.grad(exact.square().sum(), q)[0], rtol=1e-1, atol=1e-1
    )  # fmt: skip
    with torch.autocast(DEVICE, torch.float16):
        assert attention(q, k, v, impl="triton").dtype == torch.float16


@pytest.mark.parametrize(
    ("normalize", "passes"),
    [
        ("keys", ["attention_forward", "attention_backward", "attention_double_backward"]),
        # a backward pass over queries is itself a forward and a backward of keys over queries
        (
            "queries",
            [
                "attention_over_queries",
                "attention_forward",
                "attention_backward",
                "attention_double_backward",
            ],
        ),
    ],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_second_order_runs_no_backward_for_nothing(impl, normalize, passes, monkeypatch):
    from sagan_kernels.ops import attention_autograd

    names = []
    call = attention_autograd._call
    monkeypatch.setattr(attention_autograd, "_call", lambda name, *a: names.append(name) or call(name, *a))
    inputs = [t.requires_grad_() for t in qkv()]
    (slope,) = torch.autograd.grad(
        by(impl, normalize=normalize)(*inputs).sum(), inputs[:1], create_graph=True
    )
    torch.autograd.grad(slope.square().sum(), inputs)
    assert names == passes


@pytest.mark.filterwarnings(
    "ignore"
)  # tracing is deprecated, and warns of sizes that are part of what was traced
@pytest.mark.parametrize("layer", [SelfAttention2d, PaperSelfAttention2d])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_traces_by_the_older_compiler(impl, grad, layer, monkeypatch):
    monkeypatch.setenv("SAGAN_KERNELS_IMPL", impl)
    module = layer(16).to(DEVICE, DTYPE)
    torch.nn.init.constant_(module.gamma, 0.7)
    x = torch.randn(2, 16, 6, 5, device=DEVICE, dtype=DTYPE)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(module, x, check_trace=False)
        assert_same(traced(2 * x), module(2 * x))


def test_shapes_are_found_without_data():
    module = SelfAttention2d(16).to("meta")
    x = torch.empty(2, 16, 64, 64, device="meta", requires_grad=True)
    (slope,) = torch.autograd.grad(module(x).sum(), x)
    assert slope.shape == x.shape
