"""Grouped spectral norm against torch's own layers in whole networks, on every implementation."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from sagan_kernels.models import Discriminator
from sagan_kernels.nn import (
    SpectralNormGroup,
    fold_spectral_norm,
    group_spectral_norm,
    spectral_norm,
    spectral_norms,
    ungroup_spectral_norm,
)
from sagan_kernels.nn.spectral_norm import find_spectral_norms

STYLES = {"torch": parametrizations.spectral_norm, "ours": spectral_norm, "hook": nn.utils.spectral_norm}
# NumPy, in which the interpreter computes, warns of overflow and NaN in lanes that nobody reads
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
each_style = pytest.mark.parametrize("style", STYLES)
each_impl = pytest.mark.parametrize("impl", ["torch", "triton", "reference"])


class Critic(nn.Module):
    """Odd shapes of every kind of layer; one layer is used twice."""

    def __init__(self, normalize):
        super().__init__()
        self.first = normalize(nn.Conv2d(3, 5, 3, padding=1))
        self.twice = normalize(nn.Conv2d(5, 5, 1))
        self.last_channels = normalize(nn.Conv2d(5, 7, 3, stride=2)).to(memory_format=torch.channels_last)
        self.transposed = normalize(nn.ConvTranspose2d(7, 4, 2))
        self.labels = normalize(nn.Embedding(6, 4))
        self.logit = normalize(nn.Linear(4, 1))

    def forward(self, x, y):
        x = self.twice(torch.tanh(self.twice(torch.tanh(self.first(x)))))
        x = torch.tanh(self.transposed(torch.tanh(self.last_channels(x)))).sum((2, 3))
        return self.logit(x).squeeze(1) + (self.labels(y) * x).sum(1)


def critic(style="ours", seed=0):
    torch.manual_seed(seed)
    return Critic(STYLES[style]).double()


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, 5, 5, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0, 2, 5, 2])


class once_a_forward:
    """torch's layers with one iteration a forward of the model: parametrize.cached, and a hook called once."""

    def __init__(self, model):
        self.model = model

    def __call__(self, x, y):
        taken = []
        for found in find_spectral_norms(self.model):
            if found.hooked:
                found.step(found.module, None)
                taken.append((found.module, found.module._forward_pre_hooks.copy()))
                found.module._forward_pre_hooks.clear()
        with parametrize.cached():
            out = self.model(x, y)
        for module, hooks in taken:
            module._forward_pre_hooks.update(hooks)
        return out


def assert_same(mine, other, **tolerances):
    assert list(mine) == list(other)
    for key, value in other.items():
        torch.testing.assert_close(mine[key], value, **tolerances, msg=lambda text, key=key: f"{key}: {text}")


def train(model, call, steps=10, penalty=0.1):
    """Hinge-like loss with two forwards before one backward, and R1."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for step in range(steps):
        (real, y), (fake, _) = batch(step), batch(100 + step)
        real.requires_grad_()
        optimizer.zero_grad()
        out = call(real, y)
        (slope,) = torch.autograd.grad(out.sum(), real, create_graph=True)
        loss = (1 - out).relu().mean() + (1 + call(fake, y)).relu().mean() + penalty * slope.square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@each_impl
@each_style
def test_training_follows_torch(style, impl):
    plain, grouped = critic(style), critic(style)
    group = group_spectral_norm(grouped, impl=impl)
    assert len(group) == 6
    expected = train(plain, once_a_forward(plain))
    got = train(grouped, grouped)
    assert got == pytest.approx(expected, rel=1e-8)
    assert_same(grouped.state_dict(), plain.state_dict(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(grouped.eval()(*batch()), plain.eval()(*batch()))


@each_impl
def test_gradients_of_second_order_go_through(impl):
    plain, grouped = critic(), critic()
    group_spectral_norm(grouped, impl=impl)
    results = []
    for model in (plain.eval(), grouped.eval()):
        parameters = list(model.parameters())
        first = torch.autograd.grad(model(*batch()).square().sum(), parameters, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), parameters))
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)


@each_style
def test_iterates_once_a_forward_or_once_a_change(style):
    x, y = batch()
    for every, moves in (("forward", True), ("step", False)):
        model = critic(style)
        group_spectral_norm(model, every=every)
        model(x, y)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        model(x, y)
        moved = [
            not torch.equal(before[key], value)
            for key, value in model.state_dict().items()
            if key.endswith("_u")
        ]
        assert any(moved) is moves, every
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
            before = {key: value.clone() for key, value in model.state_dict().items()}
            model(x, y)
        after = model.state_dict()
        assert any(not torch.equal(before[key], after[key]) for key in before if key.endswith("_u"))
        model.eval()(x, y)
        assert all(torch.equal(after[key], value) for key, value in model.state_dict().items())


class ThroughData(torch.optim.Optimizer):
    """Writes as optimizers before PyTorch 1.5 did, which no version counter sees."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.data.mul_(1.01).add_(0.05)


@pytest.mark.parametrize("copied", [False, True])
def test_steps_through_data_count_as_changes(copied):
    model = critic()
    group_spectral_norm(model, every="step")
    model = copy.deepcopy(model) if copied else model
    model(*batch())
    u = model.first.parametrizations.weight[0]._u
    for parameters, moves in ((model.parameters(), True), (nn.Linear(2, 2).parameters(), False)):
        before = u.clone()
        ThroughData(parameters).step()
        model(*batch())
        assert torch.equal(u, before) is not moves


def test_frozen_part_stays_as_it_is():
    model = critic()
    group_spectral_norm(model)
    model.first.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model(*batch())
    moved = {
        key.split(".")[0] for key, value in model.state_dict().items() if not torch.equal(before[key], value)
    }
    assert moved == {"twice", "last_channels", "transposed", "labels", "logit"} - {"logit"} | (
        {"logit"} & moved
    )
    assert "first" not in moved


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_frozen_weights_give_results_outside_the_graph(impl):
    plain, model = critic(), critic()
    group_spectral_norm(model, impl=impl)
    for m in (plain, model):
        m.first.requires_grad_(False)  # FreezeD
        m.labels.requires_grad_(False)
    seen = []
    model.twice.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].requires_grad))
    x, y = batch()
    model(x, y).sum().backward()
    once_a_forward(plain)(x, y).sum().backward()
    assert seen == [False, True]  # nothing before the first layer that learns
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


@each_style
def test_keys_checkpoints_and_optimizers_stay(style):
    plain, grouped = critic(style), critic(style, seed=5)
    parameters = list(grouped.parameters())
    keys = list(grouped.state_dict())
    group_spectral_norm(grouped)
    assert list(grouped.state_dict()) == keys == list(plain.state_dict())
    assert all(a is b for a, b in zip(parameters, grouped.parameters(), strict=True))
    grouped(*batch())
    grouped.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(grouped.eval()(*batch()), plain.eval()(*batch()))
    plain.load_state_dict(grouped.state_dict(), strict=True)


@each_impl
@each_style
def test_no_pointer_is_stale(style, impl):
    model = critic(style)
    group_spectral_norm(model, impl=impl)
    model(*batch())

    def check(source):
        plain = critic(style)
        plain.load_state_dict({key: value.double() for key, value in source.state_dict().items()})
        got = source.eval()(
            *(t.to(next(source.parameters()).dtype) if t.is_floating_point() else t for t in batch())
        )
        torch.testing.assert_close(got.double(), plain.eval()(*batch()), rtol=1e-5, atol=1e-5)

    other = critic(style, seed=3).state_dict()
    model.load_state_dict({key: value.clone() for key, value in other.items()}, assign=True)
    check(model)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter)
    for buffer in model.buffers():
        buffer.set_(torch.nn.functional.normalize(torch.randn_like(buffer), dim=0))
    check(model)
    check(model.float())
    check(model.to(memory_format=torch.channels_last))
    check(model.double())


@each_style
def test_copies_work_by_themselves_after_a_training_forward(style):
    model = critic(style)
    group_spectral_norm(model)
    model(*batch()).sum().backward()
    ema = copy.deepcopy(model)
    assert_same(ema.state_dict(), model.state_dict(), rtol=0, atol=0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in ema.parameters():
            parameter.mul_(0.5).add_(0.1)
    ema(*batch())
    assert_same(model.state_dict(), before, rtol=0, atol=0)
    plain = critic(style)
    plain.load_state_dict(ema.state_dict())
    torch.testing.assert_close(ema.eval()(*batch()), plain.eval()(*batch()))
    part = copy.deepcopy(model.first).eval()
    torch.testing.assert_close(part(batch()[0]), model.first.eval()(batch()[0]))


def test_whole_models_with_the_older_hook_are_pickled():
    model = critic("hook")
    group_spectral_norm(model, every="step")
    model(*batch()).sum().backward()
    again = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(again.eval()(*batch()), model.eval()(*batch()))
    assert type(ungroup_spectral_norm(again).first._forward_pre_hooks) is type(model.first._forward_pre_hooks)


@each_style
def test_ungroup_restores_everything(style):
    plain, model = critic(style), critic(style)
    kinds = [type(module) for module in model.modules()]
    group = group_spectral_norm(model)
    model(*batch())
    once_a_forward(plain)(*batch())
    assert group.ungroup() is model
    assert [type(module) for module in model.modules()] == kinds
    assert not [*model._forward_hooks, *model._forward_pre_hooks, *model._forward_hooks_always_called]
    assert not [f for f in find_spectral_norms(model) if set(vars(f.step)) & {"given", "seen", "converted"}]
    assert_same(model.state_dict(), plain.state_dict())
    for layer, other in ((model.first, plain.first),):  # iterates at every access again
        for _ in range(2):
            torch.testing.assert_close(layer(batch()[0]), other(batch()[0]))
    assert_same(model.state_dict(), plain.state_dict())
    ungroup_spectral_norm(model)
    group_spectral_norm(model)
    ungroup_spectral_norm(nn.Sequential(model))
    assert [type(module) for module in model.modules()] == kinds


def test_layers_used_outside_the_model_follow_their_weights():
    model = critic()
    group_spectral_norm(model)
    x, _ = batch()
    model.first(x)
    u = model.first.parametrizations.weight[0]._u.clone()
    model.first(x)
    assert torch.equal(model.first.parametrizations.weight[0]._u, u)  # the weight has not changed
    for _ in range(200):
        with torch.no_grad():
            model.first.parametrizations.weight.original.mul_(1.001)
        weight = model.first.weight
    assert torch.linalg.svdvals(weight.detach().flatten(1))[0].item() == pytest.approx(1, abs=1e-6)
    weight.sum().backward()


@each_style
def test_activation_checkpoints_do_not_iterate_again(style):
    plain, model = critic(style), critic(style)
    group_spectral_norm(model)
    group_spectral_norm(plain)
    x, y = batch()
    expected = torch.autograd.grad(plain(x, y).square().sum(), list(plain.parameters()))
    out = torch.utils.checkpoint.checkpoint(model, x, y, use_reentrant=False)
    got = torch.autograd.grad(out.square().sum(), list(model.parameters()))
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other)
    assert_same(model.state_dict(), plain.state_dict())


class Blocks(nn.Module):
    """Two layers; the second one may be an activation checkpoint within the model."""

    def __init__(self, normalize, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (normalize(nn.Linear(5, 5).double()) for _ in range(2))
        self.reentrant = reentrant

    def forward(self, x):
        x = torch.tanh(self.first(x))
        if self.reentrant is None:
            return self.second(x)
        return torch.utils.checkpoint.checkpoint(self.second, x, use_reentrant=self.reentrant)


@each_impl
@pytest.mark.parametrize("reentrant", [True, False])
@each_style
def test_checkpointed_parts_give_the_same_gradients(style, reentrant, impl):
    grads = []
    for checkpointed in (None, reentrant):
        model = Blocks(STYLES[style], checkpointed)
        group_spectral_norm(model, impl=impl)
        model(torch.ones(3, 5).double()).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other)


class GradWithin(nn.Module):
    """Asks for gradients in the middle of its forward, as a penalty inside a model does."""

    def __init__(self, normalize):
        super().__init__()
        torch.manual_seed(0)
        self.layer = normalize(nn.Linear(5, 5).double())

    def forward(self, x):
        with torch.enable_grad():
            return self.layer(x).square().sum()


@each_impl
@each_style
def test_gradients_within_a_forward_without_any(style, impl):
    grads = []
    for grouped in (False, True):
        model = GradWithin(STYLES[style])
        if grouped:
            group_spectral_norm(model, impl=impl)
        with torch.no_grad():
            loss = model(torch.ones(3, 5).double())
        loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("fold", [False, True])
def test_optimizers_step_after_a_layer_has_left(fold):
    model, other = critic(), nn.Linear(2, 2)
    group_spectral_norm(model)
    model(*batch())
    if fold:
        fold_spectral_norm(model.first)
    else:
        parametrize.remove_parametrizations(model.first, "weight")
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), 0.1).step()
    model(*batch())


class FloatHead(nn.Module):
    """Switches autocast off for its last layer."""

    def __init__(self, normalize):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = normalize(nn.Linear(5, 6)), normalize(nn.Linear(6, 1))

    def forward(self, x):
        x = torch.tanh(self.body(x))
        with torch.autocast("cpu", enabled=False):
            return self.head(x.float())


@each_style
def test_part_without_autocast_gets_full_precision(style):
    plain, grouped = FloatHead(STYLES[style]), FloatHead(STYLES[style])
    group_spectral_norm(grouped)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, got = plain(torch.ones(2, 5)), grouped(torch.ones(2, 5))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(grouped.state_dict(), plain.state_dict())
    torch.testing.assert_close(grouped.head.eval().weight, plain.head.eval().weight)
    got.sum().backward()


@each_style
def test_true_replicas_normalize_by_themselves(style):
    model = nn.Sequential(STYLES[style](nn.Linear(5, 3).double()))
    group_spectral_norm(model)
    expected = model.eval()(torch.ones(2, 5).double())
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():  # as torch.nn.parallel.replicate puts them together
        for name, child in module._modules.items():
            replica._modules[name] = replicas[child]
        for name, parameter in module._parameters.items():
            if parameter is not None:
                setattr(replica, name, parameter.detach().clone())
        for name, buffer in module._buffers.items():
            replica._buffers[name] = buffer.clone()
    torch.testing.assert_close(replicas[model](torch.ones(2, 5).double()), expected)


def test_interrupted_forward_leaves_nothing_stale():
    model = critic()
    group_spectral_norm(model)
    handle = model.logit.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        model(*batch())
    handle.remove()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        plain = critic()
        plain.load_state_dict(model.state_dict())
        torch.testing.assert_close(model.eval()(*batch()), plain.eval()(*batch()))


def test_torch_may_take_a_layer_out_of_the_group():
    model = critic()
    group = group_spectral_norm(model)
    parametrize.remove_parametrizations(model.first, "weight")
    model(*batch()).sum().backward()
    assert len(group) == 5
    hooked = critic("hook")
    group = group_spectral_norm(hooked)
    nn.utils.remove_spectral_norm(hooked.first)
    hooked(*batch()).sum().backward()
    assert len(group) == 5


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.parametrize(
    "style", ["torch", "ours"]
)  # neither follows the attributes that the older hook sets
def test_traced_and_exported_models_compute_the_same(style):
    model = critic(style).eval()
    group_spectral_norm(model)
    expected = model(*batch())
    torch.testing.assert_close(torch.export.export(model, batch()).module()(*batch()), expected)
    torch.testing.assert_close(torch.jit.trace(model, batch())(*batch()), expected)


def test_sparse_gradients_of_embeddings_are_taken():
    grads = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(spectral_norm(nn.Embedding(6, 4, sparse=sparse)))
        group_spectral_norm(model)
        model(torch.tensor([1, 1, 5])).square().sum().backward()
        grads.append(model[0].parametrizations.weight.original.grad)
    torch.testing.assert_close(*grads)


def test_nothing_stays_alive():
    model = critic()
    group = group_spectral_norm(model)
    seen = []
    model.first.register_forward_pre_hook(lambda layer, _: seen.append(weakref.ref(layer.weight)))
    model(*batch()).sum().backward()
    model(*batch())
    gc.collect()
    assert [reference() for reference in seen] == [None, None]
    references = [weakref.ref(model), weakref.ref(group)]
    del model, group
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_shared_parameters_and_modules_get_the_sum_of_gradients():
    def build():
        torch.manual_seed(0)
        a, b = (spectral_norm(nn.Linear(5, 5).double()) for _ in range(2))
        b.parametrizations.weight.original = a.parametrizations.weight.original
        return nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), a)

    plain, grouped = build().eval(), build().eval()
    group_spectral_norm(grouped)
    x = torch.randn(3, 5).double()
    for model in (plain, grouped):
        model(x).square().sum().backward()
    for mine, other in zip(grouped.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_autocast_gets_its_dtype_where_it_would_convert(impl):
    model = critic().float()
    group_spectral_norm(model, impl=impl)
    seen = {}
    for name in ("first", "labels"):
        getattr(model, name).register_forward_pre_hook(
            lambda m, _, name=name: seen.update({name: m.weight.dtype})
        )
    x, y = batch()
    exact = copy.deepcopy(model).eval()(x.float(), y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model.eval()(x.float(), y)
    assert seen == {"first": torch.bfloat16, "labels": torch.float32}
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.05)
    out.float().sum().backward()
    assert model.first.parametrizations.weight.original.grad.dtype == torch.float32


@pytest.mark.parametrize("overlap", [False, True])
def test_gradients_arrive_layer_by_layer_with_overlap(overlap):
    model, arrived = critic(), []
    group_spectral_norm(model, overlap=overlap)
    out = model(*batch())
    model.logit.parametrizations.weight.original.register_post_accumulate_grad_hook(
        lambda _: arrived.append("last")
    )
    model.first.bias.register_post_accumulate_grad_hook(lambda _: arrived.append("first"))
    out.sum().backward()
    assert arrived == (["last", "first"] if overlap else ["first", "last"])


@each_impl
def test_overlap_gives_the_same_gradients(impl):
    grads = []
    for overlap in (False, True):
        model = critic()
        group_spectral_norm(model, overlap=overlap, impl=impl)
        model(*batch()).sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other)


def test_replicas_normalize_by_themselves():
    model = critic()
    group_spectral_norm(model)
    plain = critic()
    for found in find_spectral_norms(model):
        found.step.__dict__["given"] = torch.full_like(found.weight, torch.nan)  # another device's
        found.step._is_replica = True
    model._is_replica = True
    torch.testing.assert_close(model.eval()(*batch()), plain.eval()(*batch()))


class Outer(nn.Module):
    """A model whose grouped part is inside what is compiled."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        return self.model(x, y)


# Dynamo looks at the gradient of every tensor that a graph gets
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("outer", [False, True])
@each_style
def test_compiles_without_a_break(style, outer):
    model, eager = critic(style).float(), critic(style).float()
    group_spectral_norm(model)
    group_spectral_norm(eager)
    compiled = torch.compile(Outer(model) if outer else model, backend="aot_eager", fullgraph=True)
    x, y = batch()
    for _ in range(2):
        out, expected = compiled(x.float(), y), eager(x.float(), y)
        torch.testing.assert_close(out, expected)
        out.sum().backward()
        expected.sum().backward()
    for mine, other in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)
    assert_same(model.state_dict(), eager.state_dict())


def test_a_failing_forward_leaves_nothing_behind():
    model = critic()
    group_spectral_norm(model)
    with pytest.raises(RuntimeError):
        model(torch.randn(1, 2, 5, 5).double(), torch.tensor([0]))
    assert all(found.step.given is None for found in find_spectral_norms(model))


def test_our_discriminator_and_its_folded_form():
    torch.manual_seed(0)
    model = Discriminator(32, 3, base_channels=8)
    group = group_spectral_norm(model)
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([0, 2])
    model(x, y).sum().backward()
    assert set(group.sigma()) == set(spectral_norms(model))
    assert len(group) == len(group.sigma()) > 10
    expected = model.eval()(x, y)
    torch.testing.assert_close(fold_spectral_norm(copy.deepcopy(model))(x, y), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(x, y), expected)
    folded_part = fold_spectral_norm(model.blocks[0])  # the rest of the group goes on
    assert not list(find_spectral_norms(folded_part))
    torch.testing.assert_close(model(x, y), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def process_group():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist
    dist.destroy_process_group()


# the name that every PyTorch supported here knows
@pytest.mark.filterwarnings("ignore:`broadcast_buffers` is deprecated")
@each_style
@pytest.mark.parametrize("broadcast", [False, True])
def test_distributed_data_parallel_gets_the_same_gradients(style, broadcast, process_group):
    plain, model = critic(style), critic(style)
    for network in (plain, model):
        group_spectral_norm(network, every="step")
    parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=broadcast)
    arrived = []
    handles = {"last": model.logit, "first": model.first}
    for name, layer in handles.items():
        parameter = layer.weight_orig if style == "hook" else layer.parametrizations.weight.original
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    (real, y), (fake, _) = batch(0), batch(1)
    for call in (plain, parallel):
        (call(real, y).sum() - call(fake, y).square().sum()).backward()
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    assert arrived == ["last", "first"]


def test_sharded_parameters_are_refused(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    model = critic()
    mesh = init_device_mesh("cpu", (1,))
    original = model.first.parametrizations.weight.original
    model.first.parametrizations.weight.original = nn.Parameter(distribute_tensor(original.detach(), mesh))
    with pytest.raises(TypeError, match=r"first\.weight must be a whole tensor, got a sharded one"):
        group_spectral_norm(model)


def test_bad_input_is_told_in_one_line():
    with pytest.raises(ValueError, match="must have spectral-normed layers, got none in Sequential"):
        group_spectral_norm(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="every must be one of forward, step, got 'epoch'"):
        group_spectral_norm(critic(), every="epoch")
    with pytest.raises(ValueError, match="impl must be one of"):
        group_spectral_norm(critic(), impl="cuda")
    model = critic()
    group = SpectralNormGroup(model)
    assert repr(group) == "SpectralNormGroup(6 layers of Critic, every='forward')"
    with pytest.raises(ValueError, match=r"must be in one group, got 0\.first\.weight in another"):
        group_spectral_norm(nn.Sequential(model))
    with torch.no_grad():
        model.first.parametrizations.weight.original = nn.Parameter(torch.randn(9, 3, 3, 3).double())
    with pytest.raises(
        ValueError, match=r"first.weight must have as many rows .* got a weight \(9, 3, 3, 3\)"
    ):
        model(*batch())
    model = critic()
    group_spectral_norm(model)
    model.logit.parametrizations.weight.original = nn.Parameter(torch.randn(1, 4, device="meta"))
    with pytest.raises(
        ValueError, match=r"logit\.weight must be on one device with its u and v, got meta, cpu and cpu"
    ):
        model(*batch())
