"""Spectral-normed layers against singular values and against torch's own, step by step."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from sagan_kernels.nn import fold_spectral_norm, spectral_norm, spectral_norms, unfold_spectral_norm
from sagan_kernels.nn.spectral_norm import SpectralNorm

LAYERS = {
    "linear": lambda: nn.Linear(7, 5),
    "row": lambda: nn.Linear(9, 1),
    "column": lambda: nn.Linear(1, 9),
    "convolution": lambda: nn.Conv2d(3, 9, 3),
    "convolution1d": lambda: nn.Conv1d(4, 3, 5),
    "convolution3d": lambda: nn.Conv3d(2, 5, 3),
    "grouped": lambda: nn.Conv2d(6, 4, 3, groups=2),
    "channels_last": lambda: nn.Conv2d(6, 5, 3).to(memory_format=torch.channels_last),
    "transposed1d": lambda: nn.ConvTranspose1d(3, 4, 4),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 4),
    "transposed3d": lambda: nn.ConvTranspose3d(2, 3, 2),
    "transposed_channels_last": lambda: nn.ConvTranspose2d(4, 6, 4).to(memory_format=torch.channels_last),
    "embedding": lambda: nn.Embedding(11, 8),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def matrix(weight, dim):
    return weight.detach().double().movedim(dim, 0).flatten(1)


def pair(make, seed=0, **settings):
    """The same layer normalized by torch and by us, from one state of the generator."""
    layers = []
    for normalize in (parametrizations.spectral_norm, spectral_norm):
        torch.manual_seed(seed)
        layers.append(normalize(make().double(), **settings))
    return layers


def vectors(layer):
    step = layer.parametrizations.weight[0]
    return step._u, step._v


@each_layer
def test_weight_has_largest_singular_value_one(name):
    layer = spectral_norm(LAYERS[name]()).double()
    for _ in range(200):
        weight = layer.weight
    dim = layer.parametrizations.weight[0].dim
    assert torch.linalg.svdvals(matrix(weight, dim))[0].item() == pytest.approx(1, abs=1e-6)


@each_layer
def test_hundred_steps_follow_torch(name):
    theirs, ours = pair(LAYERS[name])
    for mine, other in zip(vectors(ours), vectors(theirs), strict=True):
        torch.testing.assert_close(mine, other)
    for step in range(100):
        expected, got = theirs.weight, ours.weight
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
        assert got.stride() == expected.stride()
        grad = torch.randn_like(expected)
        originals = [layer.parametrizations.weight.original for layer in (theirs, ours)]
        grads = [torch.autograd.grad(w, o, grad)[0] for w, o in zip((expected, got), originals, strict=True)]
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-11)
        with torch.no_grad():
            for original in originals:
                original.sub_(0.05 * grads[0])
        if step % 10 == 9:
            theirs.eval(), ours.eval()
            torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-10, atol=1e-12)
            theirs.train(), ours.train()
    for mine, other in zip(vectors(ours), vectors(theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-10)


def test_settings_mean_what_they_mean_in_torch():
    for settings in ({"n_power_iterations": 3}, {"dim": 1}, {"dim": -1}, {"eps": 1e-4}):
        theirs, ours = pair(lambda: nn.Conv2d(4, 6, 3), **settings)
        torch.testing.assert_close(ours.weight, theirs.weight)
    theirs, ours = pair(lambda: nn.Conv2d(3, 5, 2), name="bias")
    torch.testing.assert_close(ours.bias, theirs.bias)
    assert list(ours.state_dict()) == list(theirs.state_dict())


@each_layer
def test_checkpoints_load_into_torch_and_back(name):
    theirs, ours = pair(LAYERS[name])
    for source, target in ((theirs, ours), (ours, theirs)):
        other = (
            spectral_norm(LAYERS[name]().double())
            if target is ours
            else parametrizations.spectral_norm(LAYERS[name]().double())
        )
        other.load_state_dict(source.state_dict(), strict=True)
        torch.testing.assert_close(other.eval().weight, source.eval().weight)
        source.train()


@pytest.mark.parametrize("name", ["linear", "convolution", "transposed", "embedding"])
def test_checkpoints_of_the_older_hook_load(name):
    legacy = torch.nn.utils.spectral_norm(LAYERS[name]().double())
    model = nn.Sequential(legacy)
    shape = legacy.weight_orig.shape
    x = (
        torch.arange(3)
        if name == "embedding"
        else torch.randn(2, shape[0 if name == "transposed" else 1], *[8] * (len(shape) - 2)).double()
    )
    for _ in range(3):
        model(x)
    ours = nn.Sequential(spectral_norm(LAYERS[name]().double()))
    saved = model.state_dict()
    ours.load_state_dict(saved, strict=True)
    torch.testing.assert_close(ours.eval()(x), model.eval()(x))
    assert "0.weight_orig" in saved


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_huge_and_tiny_weights_are_normalized(scale):
    torch.manual_seed(1)
    layer = nn.Linear(9, 6, bias=False)
    with torch.no_grad():
        layer.weight.mul_(scale)
    spectral_norm(layer)
    for _ in range(100):
        weight = layer.weight
    assert torch.linalg.svdvals(weight.detach().double())[0].item() == pytest.approx(1, rel=1e-4)
    (grad,) = torch.autograd.grad(weight.sum(), layer.parametrizations.weight.original)
    assert grad.isfinite().all()


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_zero_weight_stays_zero_and_recovers(impl, monkeypatch):
    monkeypatch.setenv("SAGAN_KERNELS_IMPL", impl)
    layer = nn.Linear(5, 3)
    nn.init.zeros_(layer.weight)
    spectral_norm(layer)
    x = torch.randn(4, 5)
    layer(x).square().sum().backward()
    assert torch.equal(layer.weight, torch.zeros(3, 5))
    original = layer.parametrizations.weight.original
    with torch.no_grad():
        original.sub_(original.grad)
        original.add_(torch.eye(3, 5))
    for _ in range(50):
        weight = layer.weight
    assert torch.linalg.svdvals(weight)[0].item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_normalized_in_float32(dtype):
    layer = spectral_norm(nn.Linear(40, 30).to(dtype))
    for _ in range(20):
        weight = layer.weight
    assert weight.dtype == dtype
    assert torch.linalg.svdvals(weight.detach().double())[0].item() == pytest.approx(1, abs=0.02)
    weight.float().square().sum().backward()
    assert layer.parametrizations.weight.original.grad.dtype == dtype


def test_cap_leaves_small_weights_alone_and_divides_large_ones():
    for scale, divided in ((0.01, False), (10.0, True)):
        layer = nn.Linear(6, 6).double()
        with torch.no_grad():
            layer.weight.copy_(torch.linalg.qr(torch.randn(6, 6).double())[0] * scale)
        spectral_norm(layer, cap=True)
        original = layer.parametrizations.weight.original
        expected = original / scale if divided else original
        torch.testing.assert_close(layer.weight, expected)
        grad = torch.randn_like(original)
        (got,) = torch.autograd.grad(layer.weight, original, grad)
        if not divided:
            torch.testing.assert_close(got, grad)


def test_several_singular_values_are_those_of_the_matrix():
    layer = nn.Conv2d(5, 8, 3).double()
    with torch.no_grad():  # well apart, as power iteration needs
        U, _, V = torch.linalg.svd(layer.weight.flatten(1), full_matrices=False)
        layer.weight.copy_((U @ torch.diag(2.0 ** -torch.arange(8).double()) @ V).view_as(layer.weight))
    spectral_norm(layer, num_svs=3)
    for _ in range(60):
        layer.weight  # noqa: B018
    expected = torch.tensor([1, 0.5, 0.25], dtype=torch.float64)
    torch.testing.assert_close(spectral_norms(layer)["weight"], expected)
    assert {"parametrizations.weight.0._u1", "parametrizations.weight.0._v2"} <= set(layer.state_dict())


def test_logged_norms_are_the_weights_largest_singular_values():
    model = nn.Sequential(
        spectral_norm(nn.Linear(6, 5)), parametrizations.spectral_norm(nn.Linear(5, 7)),
        nn.utils.spectral_norm(nn.Linear(7, 3)),
    )  # fmt: skip
    x = torch.randn(2, 6)
    for _ in range(300):
        model(x)
    weights = [
        model[0].parametrizations.weight.original,
        model[1].parametrizations.weight.original,
        model[2].weight_orig,
    ]
    norms = spectral_norms(model)
    assert list(norms) == ["0.weight", "1.weight", "2.weight"]
    for sigma, weight in zip(norms.values(), weights, strict=True):
        torch.testing.assert_close(sigma[0], torch.linalg.svdvals(weight.detach())[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("cap", [False, True])
@pytest.mark.parametrize("name", ["convolution", "transposed", "channels_last", "linear"])
def test_gradients_of_first_and_second_order(name, cap):
    layer = spectral_norm(LAYERS[name]().double(), cap=cap).eval()
    step = layer.parametrizations.weight[0]
    for scale in (1.0, 7.0):  # below and above the cap
        weight = (layer.parametrizations.weight.original.detach() * scale).requires_grad_()
        assert torch.autograd.gradcheck(step, weight)
        assert torch.autograd.gradgradcheck(step, weight)


def test_transforms_of_torch_func_pass_through():
    layer = spectral_norm(nn.Linear(4, 3).double()).eval()
    step, weight = layer.parametrizations.weight[0], layer.parametrizations.weight.original.detach()
    expected = torch.autograd.functional.jacobian(step, weight)
    torch.testing.assert_close(torch.func.jacrev(step)(weight), expected)
    torch.testing.assert_close(torch.func.jacfwd(step)(weight), expected)
    batch = torch.stack([weight, 2 * weight])
    torch.testing.assert_close(torch.func.vmap(step)(batch)[1], step(weight))


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("name", ["transposed", "channels_last"])
def test_gradients_may_be_batched(name, impl, monkeypatch):
    monkeypatch.setenv("SAGAN_KERNELS_IMPL", impl)
    layer = spectral_norm(LAYERS[name]().double())
    raw = layer.parametrizations.weight.original
    weight = layer.weight
    grads = torch.randn(3, *weight.shape, dtype=torch.float64)
    found = torch.autograd.grad(weight, raw, grads, is_grads_batched=True, create_graph=True)[0]
    once = torch.autograd.grad(weight, raw, grads, is_grads_batched=True, retain_graph=True)[0]
    each = torch.stack([torch.autograd.grad(weight, raw, g, create_graph=True)[0] for g in grads])
    torch.testing.assert_close(found, each)
    torch.testing.assert_close(once, each)
    second = (torch.autograd.grad(g.square().sum(), raw, retain_graph=True)[0] for g in (found, each))
    torch.testing.assert_close(*second)


def test_two_forwards_and_one_backward_have_each_their_own_vectors():
    theirs, ours = pair(lambda: nn.Linear(5, 4))
    a, b = torch.randn(3, 5).double(), torch.randn(3, 5).double()
    losses = [(layer(a).square().sum() - layer(b).square().sum()) for layer in (theirs, ours)]
    for loss in losses:
        loss.backward()
    for got, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad)


def test_checkpointed_forward_does_not_iterate_again():
    layer = spectral_norm(nn.Linear(5, 4).double())
    x = torch.randn(3, 5).double().requires_grad_()
    plain = copy.deepcopy(layer)
    expected = torch.autograd.grad(plain(x).square().sum(), [x, *plain.parameters()])
    out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    got = torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other)
    for mine, other in zip(vectors(layer), vectors(plain), strict=True):
        torch.testing.assert_close(mine, other)


def test_weight_may_be_assigned():
    layer, value = spectral_norm(nn.Linear(4, 3)), torch.randn(3, 4)
    layer.weight = value
    assert torch.equal(layer.parametrizations.weight.original, value)


def test_unfolding_draws_no_random_numbers():
    model = fold_spectral_norm(spectral_norm(nn.Linear(4, 3)), reversible=True)
    state = torch.get_rng_state()
    unfold_spectral_norm(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_compiles_without_a_break_and_moves_alike():
    layer = spectral_norm(nn.Conv2d(3, 4, 3))
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 5, 5)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), eager(x))
    for mine, other in zip(vectors(layer), vectors(eager), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("shape", [(16, 3), (17, 2), (5, 4), (3, 16)])
def test_compiled_gradients_take_the_vectors_of_their_forward(shape):
    """The compiler's partition recomputes narrow sums, which must not read u and v as the forward leaves them."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = spectral_norm(nn.Linear(shape[1], shape[0], bias=False))
    for vector in vectors(layer):
        vector.copy_(
            F.normalize(torch.randn_like(vector), dim=0)
        )  # far from converged: an iteration moves them
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager_decomp_partition", fullgraph=True)
    x = torch.randn(5, shape[1])
    for module, call in ((layer, compiled), (eager, eager)):
        call(x).square().sum().backward()
        assert module.parametrizations.weight.original.grad is not None
    torch.testing.assert_close(
        layer.parametrizations.weight.original.grad, eager.parametrizations.weight.original.grad
    )


def test_under_autocast_iterations_stay_in_float32():
    layer = spectral_norm(nn.Linear(33, 17))
    plain = copy.deepcopy(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.randn(2, 33))
    plain(torch.randn(2, 33))
    for mine, other in zip(vectors(layer), vectors(plain), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda: nn.Linear(3, 2), {"name": "wight"}, "must be a parameter, got none of that name; .* weight, bias"),
        (lambda: nn.Linear(3, 2, bias=False), {"name": "bias"}, "must be floating point.*got None"),
        (lambda: spectral_norm(nn.Linear(3, 2)), {}, "must not be normalized already"),
        (lambda: parametrizations.spectral_norm(nn.Linear(3, 2)), {}, "must not be normalized already"),
        (lambda: nn.utils.spectral_norm(nn.Linear(3, 2)), {}, "must not be normalized already"),
        (lambda: nn.Linear(3, 2), {"eps": 0.0}, r"eps must be above 0, got 0.0"),
        (lambda: nn.Linear(3, 2), {"eps": float("nan")}, "eps must be above 0"),
        (lambda: nn.Linear(3, 2), {"n_power_iterations": 0}, "must be a whole number of at least 1, got 0"),
        (lambda: nn.Linear(3, 2), {"n_power_iterations": 1.5}, "must be a whole number"),
        (lambda: nn.Linear(3, 2), {"dim": 2}, "dim must be one of the weight's 2 dimensions, got 2"),
        (lambda: nn.Linear(3, 2), {"num_svs": 3}, r"num_svs must be at most 2 for a matrix \(2, 3\), got 3"),
        (lambda: nn.Linear(3, 2), {"name": "bias", "cap": True}, "cap=True needs a matrix"),
        (lambda: nn.LazyLinear(2), {}, "must have values, got a lazy one"),
    ],
    ids=lambda value: "" if callable(value) else str(value),  # a function's text has its address
)  # fmt: skip
def test_bad_input_is_told_in_one_line(make, settings, message):
    with pytest.raises(ValueError, match=message) as told:
        spectral_norm(make(), **settings)
    assert "\n" not in str(told.value)


def network():
    return nn.Sequential(
        spectral_norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), parametrizations.spectral_norm(nn.Conv2d(8, 4, 1)),
        nn.utils.spectral_norm(nn.ConvTranspose2d(4, 5, 2)),
    )  # fmt: skip


def test_folding_keeps_eval_outputs_and_leaves_plain_layers():
    model, x = network(), torch.randn(2, 3, 6, 6)
    model(x)
    expected = model.eval()(x)
    folded = fold_spectral_norm(model)
    torch.testing.assert_close(folded(x), expected, rtol=1e-6, atol=1e-6)
    assert set(folded.state_dict()) == {f"{i}.{name}" for i in (0, 2, 3) for name in ("weight", "bias")}
    assert type(folded[0]) is nn.Conv2d
    assert not folded[3]._forward_pre_hooks


def test_folding_with_a_cap_and_of_zero_weights():
    model = nn.Sequential(spectral_norm(nn.Linear(4, 4), cap=True), spectral_norm(nn.Linear(4, 3)))
    with torch.no_grad():
        model[1].parametrizations.weight.original.zero_()
    weights = [layer.weight.detach().clone() for layer in model.eval()]
    fold_spectral_norm(model)
    for layer, weight in zip(model, weights, strict=True):
        torch.testing.assert_close(layer.weight, weight)


def test_folding_is_undone_from_a_saved_state():
    model, x = network(), torch.randn(2, 3, 6, 6)
    with torch.no_grad():  # the older hook's weights cannot be copied after a forward with a graph
        for _ in range(3):
            model(x)
    saved = fold_spectral_norm(copy.deepcopy(model.eval()), reversible=True).state_dict()
    assert {"0.weight_sigma", "2.weight_u", "3.weight_v"} <= set(saved)
    other = fold_spectral_norm(network(), reversible=True)
    other.load_state_dict(saved, strict=True)
    back = unfold_spectral_norm(other)
    assert list(back.state_dict()) == list(model.state_dict())
    for key, value in model.state_dict().items():
        torch.testing.assert_close(back.state_dict()[key], value)
    torch.testing.assert_close(back.eval()(x), model(x))
    torch.testing.assert_close(back.train()(x), model.train()(x))
    with pytest.raises(ValueError, match="folded with reversible=True"):
        unfold_spectral_norm(back)


def test_folding_a_copy_leaves_the_original_and_other_copies_at_work():
    model = nn.Sequential(spectral_norm(nn.Linear(4, 4)))
    other = copy.deepcopy(model)
    fold_spectral_norm(copy.deepcopy(model))
    x = torch.randn(2, 4)
    model(x).sum().backward()
    other(x).sum().backward()
    assert "0.parametrizations.weight.original" in model.state_dict()


def test_folding_does_not_advance_the_power_iteration():
    layer = spectral_norm(nn.Linear(6, 6)).train()
    u = layer.parametrizations.weight[0]._u.clone()
    folded = fold_spectral_norm(copy.deepcopy(layer))
    expected = layer.eval().weight
    assert torch.equal(layer.parametrizations.weight[0]._u, u)
    torch.testing.assert_close(folded.weight, expected)
    assert folded.training


def test_other_parametrizations_are_left_alone():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    fold_spectral_norm(layer)
    assert "parametrizations.weight.original0" in layer.state_dict()
    both = spectral_norm(nn.Linear(3, 3))
    parametrize.register_parametrization(both, "bias", nn.Tanh())
    bias, weight = both.bias.detach().clone(), both.eval().weight.detach()
    again = copy.deepcopy(both)
    fold_spectral_norm(both)
    torch.testing.assert_close(both.bias, bias)
    torch.testing.assert_close(both.weight, weight)
    assert list(both.parametrizations) == ["bias"]
    assert isinstance(again.parametrizations.weight[0], SpectralNorm)
    torch.testing.assert_close(again.weight, weight)
