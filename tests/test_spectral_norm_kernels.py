"""The spectral-norm kernels themselves, on a GPU or in Triton's interpreter, against singular values and torch."""

import collections

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from sagan_kernels.ops import configs
from sagan_kernels.ops.spectral_norm import spectral_normalize
from sagan_kernels.ops.spectral_norm_launch import Plans
from sagan_kernels.ops.spectral_norm_layout import Rule, layout

# NumPy, in which the interpreter computes, warns of overflow and of NaN in lanes that nobody reads
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
# small tiles, so that small weights have several of every kind, full and partial
SMALL = configs.SpectralNormTiling(rows=8, row_span=32, columns=16, column_span=16, block=512, block_t=2)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 4e-3}


def shapes(device, dtype):
    """Weights that no tile divides and some that tiles do; (C, 27), one row, one column, every layout in memory."""

    def tensor(*size, memory_format=torch.contiguous_format):
        scale = size[1] ** -0.5
        return (
            torch.randn(*size, device=device)
            .mul_(scale)
            .to(dtype)
            .to(memory_format=memory_format)
            .requires_grad_()
        )

    last = torch.channels_last
    return [
        (tensor(20, 3, 3, 3), 0), (tensor(17, 33), 0), (tensor(5, 40, 1, 1), 0), (tensor(1, 70), 0), (tensor(70, 1), 0),
        (tensor(6, 5, 4, 4), 1), (tensor(12, 5, 1, 1), 1), (tensor(24, 16), 1), (tensor(64, 64), 0),
        (tensor(8, 6, 3, 3, memory_format=last), 0), (tensor(6, 5, 4, 4, memory_format=last), 1), (tensor(3, 3), 0),
        (tensor(4, 3, 3, 3, 3), 0), (tensor(96, 27), 0),
    ]  # fmt: skip


def vectors(weights, dims, device, dtype):
    us = [
        nn.functional.normalize(torch.randn(w.shape[d], device=device), dim=0).to(dtype)
        for w, d in zip(weights, dims, strict=True)
    ]
    vs = [
        nn.functional.normalize(torch.randn(w.numel() // w.shape[d], device=device), dim=0).to(dtype)
        for w, d in zip(weights, dims, strict=True)
    ]
    return us, vs


def dtypes(device):
    return [torch.float32, torch.float16] + ([torch.float64] if device == "cpu" else [])


def as_matrix(weight, dim):
    return weight.detach().double().movedim(dim, 0).flatten(1)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(configs, "SPECTRAL_NORM", SMALL)


@pytest.mark.parametrize("order", ["uv", "vu"])
@pytest.mark.parametrize(("iterate", "n"), [(True, 1), (True, 3), (False, 1)], ids=["one", "three", "eval"])
def test_kernels_match_the_formula(iterate, n, order, device):
    for dtype in dtypes(device) if n == 1 else dtypes(device)[-1:]:
        torch.manual_seed(0)
        weights, dims = zip(*shapes(device, dtype), strict=True)
        rules = [Rule(dim, order, n, cap=i % 3 == 2) for i, dim in enumerate(dims)]
        us, vs = vectors(weights, dims, device, dtype)
        exact = [w.detach().double().requires_grad_() for w in weights]
        exact_us, exact_vs = [u.double().clone() for u in us], [v.double().clone() for v in vs]
        expected = spectral_normalize(exact, exact_us, exact_vs, rules, iterate=iterate, impl="reference")
        got = spectral_normalize(weights, us, vs, rules, iterate=iterate, impl="triton")
        grads = [torch.randn_like(out) for out in got]
        wanted = torch.autograd.grad(expected, exact, [grad.double() for grad in grads])
        found = torch.autograd.grad(got, weights, grads)
        for mine, other in ((got, expected), (us, exact_us), (vs, exact_vs), (found, wanted)):
            for a, b in zip(mine, other, strict=True):
                # without iterations σ is uᵀWv of any vectors, whose terms cancel
                several = 20 if mine is found or (not iterate and device != "cpu") else 1
                atol = TOLERANCE[dtype] * max(b.abs().max().item(), 1) * several
                torch.testing.assert_close(a.double(), b, rtol=0, atol=atol)
        assert all(out.stride() == weight.stride() for out, weight in zip(got, weights, strict=True))


def test_hundred_steps_follow_torch_and_end_at_the_singular_value(device, monkeypatch):
    monkeypatch.setattr(configs, "SPECTRAL_NORM", configs.SpectralNormTiling())
    torch.manual_seed(0)
    dtype = torch.float64 if device == "cpu" else torch.float32
    layers = [
        parametrizations.spectral_norm(layer.to(device, dtype))
        for layer in (nn.Conv2d(3, 10, 3), nn.Linear(9, 1), nn.ConvTranspose2d(5, 4, 2), nn.Embedding(11, 6))
    ]
    steps = [layer.parametrizations.weight[0] for layer in layers]
    weights = [layer.parametrizations.weight.original for layer in layers]
    us, vs = ([getattr(step, name).clone() for step in steps] for name in ("_u", "_v"))
    rules = [Rule(step.dim) for step in steps]
    plans = Plans()
    for _ in range(100):
        expected = [layer.weight for layer in layers]
        got = spectral_normalize(weights, us, vs, rules, iterate=True, impl="triton", plans=plans)
        for mine, other in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-9 if device == "cpu" else 1e-4)
        with torch.no_grad():
            for weight in weights:
                weight.add_(torch.randn_like(weight), alpha=0.01)
    for mine, step in zip(us, steps, strict=True):
        torch.testing.assert_close(mine, step._u, rtol=1e-4, atol=1e-8 if device == "cpu" else 1e-3)
    for _ in range(100):
        got = spectral_normalize(weights, us, vs, rules, iterate=True, impl="triton", plans=plans)
    for out, rule in zip(got, rules, strict=True):
        assert torch.linalg.svdvals(as_matrix(out, rule.dim))[0].item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e20])
def test_any_scale_has_a_defined_result(scale, device):
    torch.manual_seed(0)
    weight = (torch.randn(9, 30, device=device) * scale).requires_grad_()
    us, vs = vectors([weight], [0], device, torch.float32)
    before = us[0].clone()
    for _ in range(60):
        (out,) = spectral_normalize([weight], us, vs, [Rule()], iterate=True, impl="triton")
    (grad,) = torch.autograd.grad(out.sum(), weight)
    assert grad.isfinite().all()
    if scale:
        assert torch.linalg.svdvals(out.double())[0].item() == pytest.approx(1, rel=1e-3)
    else:
        assert torch.equal(out, torch.zeros_like(out))
        assert torch.equal(us[0], before)
        assert torch.equal(grad, torch.ones_like(grad))


def test_launches_do_not_depend_on_the_number_of_layers(device, monkeypatch):
    from sagan_kernels.ops import spectral_norm_launch

    launches = collections.Counter()
    launch = spectral_norm_launch.launch

    def count(kernel, *args):
        launches[kernel.fn.__name__] += 1
        launch(kernel, *args)

    monkeypatch.setattr(spectral_norm_launch, "launch", count)
    counts = []
    for layers in (1, 9):
        launches.clear()
        weights = [torch.randn(5 + i, 7, device=device, requires_grad=True) for i in range(layers)]
        us, vs = vectors(weights, [0] * layers, device, torch.float32)
        rules = [Rule(order="uv" if i % 2 else "vu") for i in range(layers)]
        outs = spectral_normalize(weights, us, vs, rules, iterate=True, impl="triton")
        forward = sum(launches.values())
        torch.autograd.grad(sum(out.sum() for out in outs), weights)
        counts.append((forward, sum(launches.values()) - forward))
    assert counts == [(3, 2), (3, 2)]


def test_results_repeat_bit_for_bit_and_some_gradients_may_be_missing(device):
    weights = [torch.randn(33, 50, device=device, requires_grad=True) for _ in range(3)]
    us, vs = vectors(weights, [0] * 3, device, torch.float32)
    runs = []
    for _ in range(2):
        outs = spectral_normalize(
            weights,
            [u.clone() for u in us],
            [v.clone() for v in vs],
            [Rule()] * 3,
            iterate=True,
            impl="triton",
        )
        loss = (outs[0] * torch.arange(50, device=device)).sum() + outs[2].square().sum()
        runs.append([*outs, *torch.autograd.grad(loss, weights, allow_unused=True)])
    assert runs[0][4] is None
    assert all(a is b or torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_gradients_in_other_strides_are_put_in_order(device):
    weight = torch.randn(6, 5, 3, 3, device=device).to(memory_format=torch.channels_last).requires_grad_()
    us, vs = vectors([weight], [0], device, torch.float32)
    grad = torch.randn(6, 5, 3, 3, device=device)
    found = []
    for impl in ("triton", "reference"):
        (out,) = spectral_normalize([weight], us, vs, [Rule()], iterate=False, impl=impl)
        found.append(torch.autograd.grad(out, weight, grad)[0])
    torch.testing.assert_close(*found)


def test_unaligned_weights_are_read_right(device):
    flat = torch.randn(1000, device=device)
    weight = flat[1:641].view(20, 32)  # rows divide by vectors, and the first element is not at 16 bytes
    us, vs = vectors([weight], [0], device, torch.float32)
    got, expected = (
        spectral_normalize(
            [weight], [u.clone() for u in us], [v.clone() for v in vs], [Rule()], iterate=True, impl=impl
        )[0]
        for impl in ("triton", "reference")
    )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("weight", "dim", "expected"),
    [
        (torch.empty(6, 5, 3, 3), 0, (1, 6, 45, 45)),
        (torch.empty(6, 5, 3, 3), 1, (6, 5, 9, 54)),
        (torch.empty(6, 5, 3, 3).to(memory_format=torch.channels_last), 0, (1, 6, 45, 5)),
        (torch.empty(6, 5, 3, 3).to(memory_format=torch.channels_last), 1, (54, 5, 1, 54)),
        (torch.empty(7, 4), 1, (7, 4, 1, 7)),
        (torch.empty(1, 9), 0, (1, 1, 9, 9)),
        (torch.empty(4, 7).t(), 0, (4, 7, 1, 4)),
        (torch.empty(6, 10)[:, ::2], 0, None),
        (torch.empty(1, 1).expand(3, 4), 0, None),
    ],
)
def test_layouts_in_memory(weight, dim, expected):
    assert layout(weight.size(), weight.stride(), dim) == expected


def test_weights_with_gaps_are_normalized_by_the_formula(device):
    weight = torch.randn(6, 10, device=device)[:, ::2]
    us, vs = vectors([weight], [0], device, torch.float32)
    for _ in range(200):
        (out,) = spectral_normalize([weight], us, vs, [Rule()], iterate=True, impl="triton")
    assert torch.linalg.svdvals(out)[0].item() == pytest.approx(1, abs=1e-4)
