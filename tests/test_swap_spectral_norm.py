"""Hosts' spectral norms: the numbers that are right stay, the bugs go, and come back on request."""

import copy
import pickle

import pytest
import torch
from hosts import biggan_pytorch, heykeetae, rosinality, studiogan, torchgan, voletiv
from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm

from sagan_kernels import swap_layers, unswap_layers
from sagan_kernels.nn import group_spectral_norm
from sagan_kernels.nn.spectral_norm_group import groups_in

MATCH = {"rtol": 1e-10, "atol": 1e-10}


def wrapped(wrapper, kind):
    modules = {
        "conv": lambda: nn.Conv2d(3, 5, 3),
        "transposed": lambda: nn.ConvTranspose2d(3, 5, 4, 2),
        "linear": lambda: nn.Linear(7, 4),
        "embedding": lambda: nn.Embedding(6, 4),
    }
    return wrapper(modules[kind]()).double()


def fitting_input(kind):
    if kind == "embedding":
        return torch.tensor([0, 3, 3])
    return torch.randn((2, 7) if kind == "linear" else (2, 3, 6, 6), dtype=torch.float64)


wrappers = pytest.mark.parametrize("wrapper", [heykeetae.SpectralNorm, torchgan.SpectralNorm2d])
kinds = pytest.mark.parametrize("kind", ["conv", "transposed", "linear", "embedding"])


def vectors(module):
    """u and v, wherever they are kept."""
    found = [t for key, t in module.state_dict().items() if key.endswith(("_u", "_v")) or key in "uv"]
    assert found
    return [t.clone() for t in found]


def by_formula(module, x):
    """The result of one forward with vectors that are constants, and the weight."""
    weight = next(p for name, p in module.named_parameters() if name.endswith("_bar"))
    matrix = weight.flatten(1)
    v = heykeetae.unit(matrix.detach().T @ vectors(module)[0])
    u = heykeetae.unit(matrix.detach() @ v)
    plain = copy.copy(module.module)
    plain.__dict__.pop("weight", None)
    plain._parameters = plain._parameters | {"weight": weight / (u @ matrix @ v)}
    return plain.forward(x), weight


@wrappers
@kinds
def test_fixed_wrapper_trains_as_its_host_where_each_forward_has_its_backward(wrapper, kind):
    made, twin = wrapped(wrapper, kind), wrapped(wrapper, kind)
    twin.load_state_dict(made.state_dict())
    (row,) = swap_layers(twin)
    assert row.status == "swapped"
    assert row.error < 1e-12
    assert isinstance(twin, wrapper)
    x = fitting_input(kind)
    for each in (made, twin):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            each(x).square().sum().backward()
            optimizer.step()
    for key, tensor in made.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[key], tensor, **MATCH, msg=key)


@wrappers
@kinds
def test_fixed_wrapper_has_right_gradients_after_two_forwards(wrapper, kind):
    x = fitting_input(kind)
    errors = {}
    for fixed in (False, True):
        torch.manual_seed(3)
        made = wrapped(wrapper, kind)
        if fixed:
            swap_layers(made)
        y, weight = by_formula(made, x)
        expected = torch.autograd.grad(y.square().sum(), weight)[0]
        loss = made(x).square().sum()
        made(x)  # as a discriminator's forward on generated images follows that on real ones
        errors[fixed] = (torch.autograd.grad(loss, weight)[0] - expected).abs().max().item()
    assert errors[True] < 1e-10
    assert errors[False] > 1e-3


@wrappers
def test_fixed_wrapper_rests_in_eval_mode_at_the_hosts_first_numbers(wrapper):
    made, twin = wrapped(wrapper, "conv"), wrapped(wrapper, "conv")
    twin.load_state_dict(made.state_dict())
    swap_layers(twin)
    x = fitting_input("conv")
    before = vectors(twin)
    first, again = twin.eval()(x), twin(x)
    torch.testing.assert_close(first, made.eval()(x), **MATCH)
    assert torch.equal(first, again)
    assert not torch.equal(made(x), first)
    assert all(torch.equal(a, b) for a, b in zip(vectors(twin), before, strict=True))


@wrappers
def test_fixed_wrapper_can_be_copied_after_a_training_forward(wrapper):
    made = wrapped(wrapper, "conv")
    x = fitting_input("conv")
    made(x)
    with pytest.raises(RuntimeError, match="deepcopy protocol"):
        copy.deepcopy(made)
    swap_layers(made)
    made(x)
    made.eval()
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        torch.testing.assert_close(other(x), made(x), **MATCH)


@wrappers
def test_fixed_wrapper_has_second_derivatives(wrapper):
    made = wrapped(wrapper, "linear")
    swap_layers(made)
    x = fitting_input("linear").requires_grad_()
    y, weight = by_formula(made, x)
    penalties = []
    for result in (y, made(x)):
        (slope,) = torch.autograd.grad(result.pow(3).sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(slope.square().sum(), weight)[0])
    torch.testing.assert_close(penalties[1], penalties[0], **MATCH)


@wrappers
def test_faithful_keeps_the_bugs_and_says_so(wrapper):
    made = wrapped(wrapper, "conv")
    (row,) = swap_layers(made, faithful=True)
    assert row.status == "kept"
    assert row.reason.startswith("faithful: u and v moved in eval mode")
    assert type(made) is wrapper


def test_wrapper_that_computes_something_else_is_refused():
    class SpectralNorm(heykeetae.SpectralNorm):
        def forward(self, *args):
            return 2 * super().forward(*args)

    (row,) = swap_layers(wrapped(SpectralNorm, "conv"))
    assert row.status == "refused"
    assert "numbers differ" in row.reason


def test_wrapper_around_an_unknown_module_is_refused():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 3))

    (row,) = swap_layers(heykeetae.SpectralNorm(Scale()))
    assert row.status == "refused"
    assert "it wraps a Scale" in row.reason


def test_unswapped_wrapper_is_the_host_again():
    made = heykeetae.Discriminator()
    keys = list(made.state_dict())
    swap_layers(made)
    assert list(made.state_dict()) == keys
    unswap_layers(made)
    assert {type(part) for part in made.modules()} >= {heykeetae.SpectralNorm, heykeetae.Self_Attn}
    assert not [part for part in made.modules() if type(part).__module__.startswith("sagan_kernels")]


def test_second_swap_leaves_a_fixed_norm():
    made = heykeetae.Discriminator()
    swap_layers(made)
    assert {row.status for row in swap_layers(made)} == {"already swapped"}


def test_hook_rests_in_eval_mode_and_trains_as_before():
    made, twin = (rosinality.spectral_norm(nn.Conv2d(3, 5, 3)).double() for _ in range(2))
    twin.load_state_dict(made.state_dict())
    (row,) = swap_layers(twin)
    assert (row.variant, row.status) == ("hook of its own", "swapped")
    x = fitting_input("conv")
    for each in (made, twin):
        each(x).square().sum().backward()
    torch.testing.assert_close(twin.weight_orig.grad, made.weight_orig.grad, **MATCH)
    torch.testing.assert_close(twin.weight_u, made.weight_u, **MATCH)
    made.eval(), twin.eval()
    first, again = twin(x), twin(x)
    torch.testing.assert_close(first, made(x), **MATCH)
    assert torch.equal(first, again)
    unswap_layers(twin)
    assert type(next(iter(twin._forward_pre_hooks.values()))) is rosinality.SpectralNorm


def test_hook_is_kept_when_faithful():
    (row,) = swap_layers(rosinality.spectral_norm(nn.Conv2d(3, 5, 3)), faithful=True)
    assert row.reason == "faithful: u moved in eval mode"


def test_several_singular_values_are_left_to_the_host():
    made = biggan_pytorch.SNConv2d(3, 5, 3)
    made.num_svs = 2
    (row,) = swap_layers(made)
    assert (row.variant, row.status) == ("method W_", "kept")
    assert "several singular values" in row.reason


def test_method_that_computes_something_else_is_left_to_the_host():
    class SNConv2d(biggan_pytorch.SNConv2d):
        def W_(self):
            return super().W_() * 0.5

    made = nn.Sequential(SNConv2d(3, 5, 3), biggan_pytorch.SNConv2d(5, 5, 3))
    report = swap_layers(made)
    assert [row.status for row in report] == ["kept", "swapped"]
    assert "its numbers differ by" in report.rows[0].reason
    made(torch.randn(1, 3, 6, 6)).sum().backward()


class Mimicry(nn.Linear):
    """mimicry's own spectral norm, which it has beside torch's."""

    def __init__(self, *widths):
        super().__init__(*widths)
        self.register_buffer("sn_u", torch.randn(1, widths[1]))
        self.register_buffer("sn_sigma", torch.ones(1))

    def sn_weights(self):
        W = self.weight.view(self.weight.shape[0], -1)
        with torch.no_grad():
            v = nn.functional.normalize(self.sn_u @ W)
            u = nn.functional.normalize(v @ W.t())
        sigma = (u @ (W @ v.t())).squeeze()
        if self.training:
            with torch.no_grad():
                self.sn_sigma[:] = sigma
                self.sn_u[:] = u
        return self.weight / sigma

    def forward(self, x):
        return nn.functional.linear(x, self.sn_weights(), self.bias)


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (biggan_pytorch.Discriminator, (torch.randn(2, 3, 32, 32), torch.arange(2))),
        (biggan_pytorch.Generator, (torch.randn(2, 6), torch.arange(2))),
        (lambda: nn.Sequential(Mimicry(5, 4), nn.Tanh(), Mimicry(4, 6)), (torch.randn(3, 5),)),
    ],
)
def test_methods_of_hosts_are_grouped_with_the_numbers_of_their_network(make, inputs):
    inputs = tuple(t.double() if t.is_floating_point() else t for t in inputs)
    host, twin = make().double(), make().double()
    twin.load_state_dict(host.state_dict())
    attributes = [set(part.__dict__) for part in twin.modules()]
    report = swap_layers(twin, attention=False, inputs=inputs)
    assert {row.status for row in report} == {"swapped"}
    assert max(row.error for row in report) < 1e-9
    sizes = [len(group) for group in groups_in(twin)]
    for training in (True, False, True):
        host.train(training), twin.train(training)
        for _ in range(2):
            (host(*inputs).square().sum() + host(-inputs[0], *inputs[1:]).sum()).backward()
            (twin(*inputs).square().sum() + twin(-inputs[0], *inputs[1:]).sum()).backward()
        for ours, theirs in zip(twin.parameters(), host.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, **MATCH)
        for key, tensor in host.state_dict().items():
            torch.testing.assert_close(twin.state_dict()[key], tensor, **MATCH, msg=key)
    assert [len(group) for group in groups_in(twin)] == sizes
    assert sum(sizes) > 1
    unswap_layers(twin)
    assert [type(part) for part in twin.modules()] == [type(part) for part in host.modules()]
    assert [set(part.__dict__) for part in twin.modules()] == attributes


def test_grouped_method_outside_its_network_is_the_hosts():
    network = biggan_pytorch.Discriminator()
    host = copy.deepcopy(network)
    swap_layers(network)
    label = torch.arange(2)
    for _ in range(2):
        torch.testing.assert_close(network.embed(label), host.embed(label), rtol=0, atol=0)
    torch.testing.assert_close(network.embed.u0, host.embed.u0, rtol=0, atol=0)


def test_grouped_methods_can_be_copied_pickled_and_moved():
    made = biggan_pytorch.Discriminator()
    swap_layers(made)
    inputs = torch.randn(2, 3, 32, 32), torch.arange(2)
    made(*inputs).sum().backward()
    made.eval()
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        torch.testing.assert_close(other(*inputs), made(*inputs))
        other.double()
        torch.testing.assert_close(other(inputs[0].double(), inputs[1]).float(), made(*inputs))
        unswap_layers(other)
        assert type(other.embed) is biggan_pytorch.SNEmbedding


def test_norms_of_torch_are_grouped_with_the_numbers_of_their_network():
    inputs = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.arange(2)
    host, twin = studiogan.Discriminator().double(), studiogan.Discriminator().double()
    twin.load_state_dict(host.state_dict())
    report = swap_layers(twin, attention=False, inputs=inputs)
    assert {(row.variant, row.status) for row in report} == {("torch's hook", "swapped")}
    assert len(report.rows) == 16
    assert max(row.error for row in report) < 1e-9
    assert len(groups_in(twin)) == 1
    for each in (host, twin):
        loss = each(*inputs).sum() - each(-inputs[0], inputs[1]).sum()  # two forwards: two iterations
        loss.backward()
    for ours, theirs in zip(twin.parameters(), host.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, **MATCH)
    for key, tensor in host.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[key], tensor, **MATCH, msg=key)
    unswap_layers(twin)
    assert not groups_in(twin)
    assert {type(hook) for part in twin.modules() for hook in part._forward_pre_hooks.values()} == {
        SpectralNorm
    }


def test_layer_used_twice_in_a_forward_is_found_and_not_grouped():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = studiogan.sn(nn.Linear(4, 4))
            self.second = studiogan.sn(nn.Linear(4, 4))

        def forward(self, x):
            return self.second(self.first(self.first(x)))

    made = Twice()
    report = swap_layers(made, inputs=(torch.randn(2, 4),))
    assert {row.status for row in report} == {"kept"}
    assert "used twice" in report.rows[0].reason
    assert not groups_in(made)


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda network: nn.ModuleDict({"D": network}), torch.compile]
)
def test_group_is_that_of_the_network_itself(wrap):
    network = studiogan.Discriminator()
    report = swap_layers(wrap(network), attention=False)
    assert len(groups_in(network)) == 1
    assert {type(wrap(network).get_submodule(row.path)) for row in report} <= {
        nn.Conv2d,
        nn.Linear,
        nn.Embedding,
    }


def test_layer_that_no_forward_uses_does_not_forbid_a_group():
    network = voletiv.Discriminator()
    assert "snconv2d0" in dict(network.block5.named_modules())  # its shortcut is never called
    inputs = torch.randn(2, 3, 128, 128), torch.arange(2)
    report = swap_layers(network, attention=False, inputs=inputs)
    assert {row.status for row in report} == {"swapped"}
    assert max(row.error for row in report) < 1e-9


def test_network_that_does_not_run_in_float64_is_grouped_and_said_to_be_not_compared():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = studiogan.sn(nn.Linear(3, 4))

        def forward(self, label):
            return self.first(nn.functional.one_hot(label, 3).float())

    report = swap_layers(Single(), inputs=(torch.arange(3),))
    (row,) = report.swapped
    assert row.error is None
    assert "not compared: the whole model does not run in float64" in row.reason


def test_part_swapped_before_joins_the_group_of_its_network():
    network = studiogan.Generator()
    swap_layers(network.blocks[0][0])
    report = swap_layers(network)
    assert {row.status for row in report if row.path.startswith("blocks.0")} == {"already swapped"}
    (group,) = groups_in(network)
    assert len(group) == 27
    assert {row.status for row in swap_layers(network)} == {"already swapped"}


def test_group_that_somebody_made_stays():
    network = studiogan.Generator()
    group = group_spectral_norm(network, every="step")
    assert {row.status for row in swap_layers(network, attention=False)} == {"already swapped"}
    unswap_layers(network)
    assert groups_in(network) == [group]


def test_grouped_network_can_be_copied_and_pickled():
    made = studiogan.Generator()
    swap_layers(made)
    z, label = torch.randn(2, 6), torch.tensor([0, 1])
    made(z, label)
    made.eval()
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        torch.testing.assert_close(other(z, label), made(z, label))
        unswap_layers(other)
        assert not groups_in(other)
        torch.testing.assert_close(other(z, label), made(z, label))


def test_attention_whose_projections_are_wrapped_is_swapped_with_either_norm():
    def build():
        layer = biggan_pytorch.Attention.__new__(biggan_pytorch.Attention)
        nn.Module.__init__(layer)
        for name, widths in {"theta": (16, 2), "phi": (16, 2), "g": (16, 8), "o": (8, 16)}.items():
            layer.add_module(name, heykeetae.SpectralNorm(nn.Conv2d(*widths, 1, bias=False)))
        layer.gamma = nn.Parameter(torch.tensor(0.7))
        return layer.double()

    made = build()
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    for faithful in (False, True):
        twin = build()
        twin.load_state_dict(made.state_dict())
        report = swap_layers(twin, faithful=faithful)
        assert len(report.swapped) == (1 if faithful else 5)
        torch.testing.assert_close(twin(x), made(x), **MATCH)
        for key, tensor in made.state_dict().items():
            torch.testing.assert_close(twin.state_dict()[key], tensor, **MATCH, msg=key)
        made.load_state_dict({key: tensor.clone() for key, tensor in twin.state_dict().items()})


def test_torch_hook_left_a_graph_behind_and_the_network_is_still_swapped():
    made = studiogan.Generator()
    made(torch.randn(2, 6), torch.tensor([0, 1])).sum()
    with pytest.raises(RuntimeError, match="deepcopy protocol"):
        copy.deepcopy(made)
    assert swap_layers(made, inputs=(torch.randn(2, 6), torch.tensor([0, 1]))).swapped


@wrappers
def test_fixed_wrapper_runs_under_autocast(wrapper):
    made = wrapper(nn.Conv2d(3, 4, 3))
    host = copy.deepcopy(made)
    swap_layers(made)
    x = torch.randn(2, 3, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(made(x), host(x))


@wrappers
def test_checkpointed_fixed_wrapper_does_not_iterate_again(wrapper):
    plain = wrapper(nn.Linear(5, 4))
    swap_layers(plain)
    checkpointed, x = copy.deepcopy(plain), torch.randn(3, 5, requires_grad=True)
    plain(x).square().sum().backward()
    torch.utils.checkpoint.checkpoint(checkpointed, x, use_reentrant=False).square().sum().backward()
    for ours, expected in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, expected)
        if expected.grad is not None:
            torch.testing.assert_close(ours.grad, expected.grad)


def test_a_second_swap_says_that_bugs_are_fixed_already():
    made = heykeetae.SpectralNorm(nn.Linear(5, 4))
    swap_layers(made)
    (row,) = swap_layers(made, faithful=True)
    assert "call unswap_layers first to keep the bugs" in row.reason
