"""Swapped layers give the hosts' numbers and derivatives, leave everything else alone, and can be undone."""

import copy
import pickle

import pytest
import torch
from hosts import (
    biggan_pytorch,
    fastai,
    heykeetae,
    mimicry,
    mmgeneration,
    pretrained_biggan,
    rosinality,
    studiogan,
    timm_layers,
    torchgan,
    unlisted,
    voletiv,
)
from hosts.formulas import lived_in
from torch import nn

import sagan_kernels
from sagan_kernels import SwapReport, swap_layers, unswap_layers
from sagan_kernels.swapping.attention import AttentionMap
from sagan_kernels.swapping.variants import VARIANTS

MATCH = {"rtol": 1e-10, "atol": 1e-10}
LISTED = {
    "BigGAN-PyTorch": biggan_pytorch.Attention,
    "StudioGAN": studiogan.SelfAttention,
    "mimicry": mimicry.SelfAttention,
    "mmgeneration": mmgeneration.SelfAttentionBlock,
    "voletiv": voletiv.Self_Attn,
    "pretrained-BigGAN": pretrained_biggan.SelfAttn,
    "fastai, pooled": fastai.PooledSelfAttention2d,
    "heykeetae": heykeetae.Self_Attn,
    "rosinality and fastai": rosinality.SelfAttention,
    "fastai": fastai.SelfAttention,
    "torchgan": torchgan.SelfAttention2d,
    "timm": timm_layers.NonLocalAttn,
}
UNLISTED = {
    "scaled": unlisted.ScaledBlock,
    "non-local": unlisted.NonLocalBlock,
    "nameless": unlisted.EmbeddedGaussian,
    "linear": unlisted.LinearProjections,
}
every_host = pytest.mark.parametrize("host", (LISTED | UNLISTED).values(), ids=(LISTED | UNLISTED).keys())
listed_host = pytest.mark.parametrize("host", LISTED.values(), ids=LISTED.keys())


def layer(host, channels=16):
    """A host's layer in float64 in which nothing is zero and spectral norm has found its vectors."""
    made = host(channels).double()
    with torch.no_grad():
        for parameter in made.parameters():
            if not parameter.any():
                parameter.fill_(0.7)
        for _ in range(8):
            made(torch.randn(2, channels, 6, 8, dtype=torch.float64))
    return made


def pair(host, channels=16):
    """The host's layer and its swapped twin."""
    made = layer(host, channels)
    # the hosts that leave results of a graph behind refuse to be copied, so their twins are filled
    twin = host(channels).double()
    twin.load_state_dict(made.state_dict())
    report = swap_layers(twin, spectral_norm=False)
    assert [row.status for row in report] == ["swapped"], str(report)
    return made, twin


def first(result):
    return result[0] if isinstance(result, tuple) else result


def features(batch=2, channels=16, height=6, width=10):
    return torch.randn(batch, channels, height, width, dtype=torch.float64, requires_grad=True)


@every_host
@pytest.mark.parametrize("training", [True, False])
def test_swapped_layer_gives_the_hosts_outputs_and_gradients(host, training):
    made, twin = pair(host)
    made.train(training), twin.train(training)
    for height, width in ((6, 10), (2, 4), (12, 8)):
        x = features(3, 16, height, width)
        found = []
        for each in (made, twin):
            y = first(each(x))
            wanted = [x, *(p for p in each.parameters() if p.requires_grad)]
            found.append((y, *torch.autograd.grad((y * y.sin()).sum(), wanted)))
        torch.testing.assert_close(found[1], found[0], **MATCH)
    for key, tensor in made.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[key], tensor, **MATCH, msg=key)


@every_host
def test_swapped_layer_gives_the_hosts_second_derivatives(host):
    made, twin = pair(host)
    x = features()
    penalties = []
    for each in (made.eval(), twin.eval()):
        (slope,) = torch.autograd.grad(first(each(x)).pow(3).sum(), x, create_graph=True)
        wanted = [p for p in each.parameters() if p.requires_grad]
        penalties.append(torch.autograd.grad(slope.square().sum(), wanted, materialize_grads=True))
    torch.testing.assert_close(penalties[1], penalties[0], **MATCH)


@every_host
def test_self_check_measures_the_error(host):
    twin = host(16)
    (row,) = swap_layers(twin, spectral_norm=False)
    assert 0 <= row.error < 1e-11


@every_host
def test_unswapped_layer_is_the_host_again(host):
    made = layer(host)
    before = {key: tensor.clone() for key, tensor in made.state_dict().items()}
    attributes = set(made.__dict__)
    swap_layers(made)
    assert isinstance(made, host)
    assert type(made) is not host
    assert unswap_layers(made) is made
    assert type(made) is host
    assert set(made.__dict__) == attributes
    assert made.state_dict().keys() == before.keys()
    assert all(torch.equal(made.state_dict()[key], tensor) for key, tensor in before.items())


@listed_host
def test_layer_is_recognized_as_that_of_its_project(host):
    (row,) = swap_layers(host(16), spectral_norm=False)
    assert host(16).__class__.__name__ in next(v for v in VARIANTS if v.name == row.variant).classes
    name = next(name for name, each in LISTED.items() if each is host)
    assert row.variant == {"fastai": "rosinality and fastai"}.get(name, name)


@listed_host
def test_without_verification_a_layer_known_by_name_is_swapped_the_same_way(host):
    one, other = host(16), host(16)
    swap_layers(one, spectral_norm=False)
    (row,) = swap_layers(other, spectral_norm=False, verify=False)
    assert row.error is None
    assert type(one) is type(other)


@pytest.mark.parametrize("host", UNLISTED.values(), ids=UNLISTED.keys())
@pytest.mark.filterwarnings("ignore:swap_layers. .*nothing to swap")
def test_without_verification_a_layer_of_another_name_stays(host):
    made = host(16)
    report = swap_layers(made, verify=False)
    assert not report.swapped
    assert type(made) is host


def test_map_of_a_host_that_returns_one_is_computed_when_used():
    made, twin = pair(heykeetae.Self_Attn)
    x = features()
    (_, expected), (y, found) = made(x), twin(x)
    assert isinstance(found, AttentionMap)
    assert repr(found) == "AttentionMap(2, 60, 60)"
    assert found._map is None
    torch.testing.assert_close(torch.mean(found, 2), expected.mean(2), **MATCH)
    torch.testing.assert_close(found[0], expected[0], **MATCH)
    torch.testing.assert_close(2 * found + found, 3 * expected, **MATCH)
    assert found.shape == expected.shape
    y.sum().backward()


def test_map_that_torchgan_is_asked_for_is_the_hosts():
    made = torchgan.SelfAttention2d(16, return_attn=True).double()
    nn.init.ones_(made.gamma)
    x = features()
    expected = made(x)
    report = swap_layers(made)
    assert "return_attn" in report.rows[0].reason
    torch.testing.assert_close(made(x), expected, rtol=0, atol=0)
    made.return_attn = False
    torch.testing.assert_close(made(x), expected[0], **MATCH)


def test_arguments_that_the_host_does_not_use_are_taken():
    made, twin = pair(biggan_pytorch.Attention)
    x = features()
    torch.testing.assert_close(twin(x, torch.tensor([1, 2])), made(x), **MATCH)
    torch.testing.assert_close(twin(x=x), made(x), **MATCH)


def test_arguments_of_unknown_meaning_go_to_the_host():
    class Masked(mimicry.SelfAttention):
        def forward(self, x, mask=None):
            y = super().forward(x)
            return y if mask is None else y * mask

    made, twin = pair(Masked)
    x, mask = features(), torch.rand(6, 10, dtype=torch.float64)
    torch.testing.assert_close(twin(x, mask), made(x, mask), **MATCH)
    torch.testing.assert_close(twin(x, mask=mask), made(x, mask=mask), **MATCH)
    torch.testing.assert_close(twin(x), made(x), **MATCH)


def test_input_of_other_axes_goes_to_the_host():
    made, twin = pair(fastai.SelfAttention)
    x = torch.randn(2, 16, 9, dtype=torch.float64)
    torch.testing.assert_close(twin.eval()(x), made.eval()(x), **MATCH)


@pytest.mark.parametrize("host", [biggan_pytorch.Attention, studiogan.SelfAttention, voletiv.Self_Attn])
def test_odd_sizes_work_where_the_host_fails(host):
    made, twin = pair(host)
    x = features(2, 16, 7, 9)
    with pytest.raises(RuntimeError):
        made(x)
    assert twin(x).shape == x.shape


def test_output_may_be_modified_in_place():
    _, twin = pair(fastai.SelfAttention)
    x = features()
    torch.relu_(twin(x * 1)).sum().backward()
    assert x.grad.isfinite().all()


def test_watched_projection_is_called_as_often_as_before():
    made, twin = pair(mimicry.SelfAttention)
    seen = []
    twin.phi.register_forward_hook(lambda module, args, result: seen.append(result.shape))
    x = features()
    torch.testing.assert_close(twin(x), made(x), **MATCH)
    assert seen == [(2, 2, 6, 10)]
    torch.testing.assert_close(twin.phi.weight_u, made.phi.weight_u, **MATCH)


def test_hooks_of_the_layer_run():
    _, twin = pair(studiogan.SelfAttention)
    seen = []
    twin.register_forward_hook(lambda module, args, result: seen.append("after"))
    twin.register_forward_pre_hook(lambda module, args: seen.append("before"))
    twin.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("back"))
    twin(features()).sum().backward()
    assert seen == ["before", "after", "back"]


def test_self_check_runs_no_hooks_of_the_user():
    made = studiogan.SelfAttention(16)
    made.register_forward_hook(lambda *_: pytest.fail("ran"))
    made.conv1x1_g.register_forward_hook(lambda *_: pytest.fail("ran"))
    assert swap_layers(made).swapped


@every_host
def test_swap_changes_no_parameter_buffer_or_flag_and_draws_no_number(host):
    made = host(16)
    made.eval()
    next(made.children()).train()
    made.requires_grad_(False)
    before = copy.deepcopy(made.state_dict())
    flags = [part.training for part in made.modules()]
    state = torch.get_rng_state()
    with torch.no_grad():
        assert swap_layers(made).swapped
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in made.modules()] == flags
    assert not any(p.requires_grad or p.grad is not None for p in made.parameters())
    assert all(torch.equal(made.state_dict()[key], tensor) for key, tensor in before.items())


@every_host
def test_swapped_layer_can_be_copied_and_pickled(host):
    twin = layer(host).eval()
    with torch.no_grad():
        twin(features())  # leaves no result of a graph behind, which no module may hold when it is copied
    swap_layers(twin)
    x = features()
    for other in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        assert type(other) is type(twin)
        torch.testing.assert_close(first(other(x)), first(twin(x)), **MATCH)
        unswap_layers(other)
        assert type(other) is host
    unswap_layers(twin)
    assert type(pickle.loads(pickle.dumps(twin))) is host


@pytest.mark.parametrize("host", [biggan_pytorch.Attention, heykeetae.Self_Attn, timm_layers.NonLocalAttn])
def test_swapped_layer_compiles_without_a_break(host):
    _, twin = pair(host)
    compiled = torch.compile(twin.eval(), fullgraph=True, backend="aot_eager")
    x = features()
    expected = torch.autograd.grad(first(twin(x)).sum(), x)
    torch.testing.assert_close(torch.autograd.grad(first(compiled(x)).sum(), x), expected, **MATCH)
    torch._dynamo.reset()


def test_data_parallel_replica_uses_its_own_tensors():
    """What `nn.DataParallel` does on several devices, on one."""
    _, twin = pair(biggan_pytorch.Attention)
    replica = twin._replicate_for_data_parallel()
    for name, part in twin._modules.items():
        copied = part._replicate_for_data_parallel()
        copied.weight, copied._parameters["bias"] = 2 * part.weight, None
        replica._modules[name] = copied
    replica.gamma = 3 * twin.gamma
    doubled = copy.deepcopy(twin)
    with torch.no_grad():
        doubled.gamma.mul_(3)
        for part in doubled.children():
            part.weight.mul_(2)
    x = features()
    torch.testing.assert_close(replica.eval()(x), doubled.eval()(x), **MATCH)


def test_map_is_computed_for_a_replica_since_only_tensors_are_gathered():
    _, twin = pair(heykeetae.Self_Attn)
    twin._is_replica = True
    assert all(isinstance(part, torch.Tensor) for part in twin(features()))


NETWORKS = {
    "biggan-G": biggan_pytorch.Generator,
    "biggan-D": biggan_pytorch.Discriminator,
    "studiogan-G": studiogan.Generator,
    "studiogan-D": studiogan.Discriminator,
    "mimicry-G": mimicry.Generator,
    "mimicry-D": mimicry.Discriminator,
    "heykeetae-G": heykeetae.Generator,
    "heykeetae-D": heykeetae.Discriminator,
}


def network_inputs(network):
    label = torch.arange(4) % 3
    if network.endswith("D"):
        x = torch.randn(4, 3, *((16, 16) if "heykeetae" in network else (32, 32)), dtype=torch.float64)
    else:
        x = torch.randn(4, 6, dtype=torch.float64)
    return (x,) if "heykeetae" in network else (x, label)


@pytest.mark.parametrize("network", NETWORKS)
def test_ten_training_steps_with_a_penalty_are_the_hosts(network):
    made, twin = NETWORKS[network](), NETWORKS[network]()
    inputs = network_inputs(network)
    lived_in(made, *inputs)
    twin.double().load_state_dict(made.state_dict())
    report = swap_layers(twin, strict=True)
    assert any(row.kind == "attention" for row in report.swapped)
    for each in (made, twin):
        each.train()
        optimizer = torch.optim.Adam(
            [p for p in each.parameters() if p.requires_grad], lr=1e-3, betas=(0.0, 0.9)
        )
        for step in range(10):
            x = (inputs[0] + step * 0.1).requires_grad_()
            loss = first(each(x, *inputs[1:])).square().mean()
            if network.endswith("D"):
                (slope,) = torch.autograd.grad(loss, x, create_graph=True)
                loss = loss + slope.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for key, tensor in made.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[key], tensor, rtol=1e-10, atol=1e-10, msg=key)
    torch.testing.assert_close(
        first(twin.eval()(*inputs)), first(made.eval()(*inputs)), rtol=1e-10, atol=1e-10
    )


def test_network_is_swapped_while_an_optimizer_holds_its_parameters():
    made = studiogan.Discriminator()
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    before = [id(p) for p in made.parameters()]
    swap_layers(made)
    assert [id(p) for p in made.parameters()] == before
    made(*(t.float() if t.is_floating_point() else t for t in network_inputs("studiogan-D"))).sum().backward()
    sigma = made.blocks[1][0].sigma.detach().clone()
    optimizer.step()
    assert not torch.equal(made.blocks[1][0].sigma, sigma)


def test_report_tells_of_every_layer():
    report = swap_layers(studiogan.Generator(), inputs=network_inputs_float("studiogan-G"))
    (row,) = [row for row in report if row.kind == "attention"]
    assert (row.path, row.module, row.variant, row.status) == (
        "blocks.2.0",
        "SelfAttention",
        "StudioGAN",
        "swapped",
    )
    assert row.size == (16, 16)
    assert (
        row.saved_bytes == 256 * 64 * 4
    )  # float32; of the scores and the map one is stored at this size on a CPU
    assert isinstance(report, SwapReport)
    text = str(report)
    assert "Generator: 28 of 28 modules swapped" in text
    assert "0.06 MiB at 16×16" in text
    assert "torch's hook" in text
    assert report.to_dict()["rows"][0]["path"] == "blocks.2.0"
    assert len(report.to_dict()["rows"]) == len(report.rows) == 28


def network_inputs_float(network):
    return tuple(t.float() if t.is_floating_point() else t for t in network_inputs(network))


def test_memory_is_that_of_two_maps_where_none_is_stored():
    (row,) = swap_layers(heykeetae.Self_Attn(16))
    assert row.size == (64, 64)
    assert row.saved_bytes == 2 * 4096**2 * 4


def test_second_swap_finds_nothing_to_do():
    made = biggan_pytorch.Generator()
    swap_layers(made)
    cls = type(made.blocks[1][1])
    report = swap_layers(made)
    assert [row.status for row in report if row.kind == "attention"] == ["already swapped"]
    assert type(made.blocks[1][1]) is cls


def test_half_swapped_network_is_swapped_wholly():
    made = biggan_pytorch.Generator(resolution=64, ch=2, attention=(16, 32))
    swap_layers(made.blocks[1])
    report = swap_layers(made)
    assert [row.status for row in report if row.kind == "attention"] == ["already swapped", "swapped"]


def test_shared_projection_and_shared_layer_go_on_being_shared():
    one, other = studiogan.SelfAttention(16), studiogan.SelfAttention(16)
    other.conv1x1_theta = one.conv1x1_theta
    made = nn.ModuleList([one, other, one]).double()
    report = swap_layers(made, spectral_norm=False)
    assert [row.path for row in report.swapped] == ["0", "1"]
    assert made[0].conv1x1_theta is made[1].conv1x1_theta
    assert made[2] is made[0]


def test_attention_of_another_formula_is_left_and_reported():
    made = unlisted.CubedAttention(16)
    (row,) = swap_layers(made)
    assert row.status == "unknown"
    assert "no known form gives its numbers" in row.reason
    assert row.error > 1e-3
    assert type(made) is unlisted.CubedAttention


def test_changed_layer_of_a_known_name_is_left_and_reported():
    class Attention(biggan_pytorch.Attention):
        def forward(self, x, y=None):
            return super().forward(x) + 1e-6 * self.gamma

    made = nn.Sequential(Attention(16))
    with pytest.raises(ValueError, match=r"must be swapped, got 0: numbers differ by"):
        swap_layers(made, spectral_norm=False, strict=True)
    (row,) = swap_layers(made, spectral_norm=False)
    assert row.status == "refused"
    assert type(made[0]) is Attention


def test_error_hidden_by_a_zero_gain_is_found():
    class Attention(biggan_pytorch.Attention):
        def forward(self, x, y=None):
            return x + self.gamma * 2 * (super().forward(x) - x)

    made = Attention(16)
    assert made.gamma == 0
    assert not swap_layers(made, spectral_norm=False).swapped


def test_error_in_training_mode_only_is_found():
    class Attention(biggan_pytorch.Attention):
        def forward(self, x, y=None):
            return super().forward(nn.functional.dropout(x, 0.1, self.training))

    assert not swap_layers(Attention(16), spectral_norm=False).swapped


@pytest.mark.parametrize(
    "host", [unlisted.LinearAttention, unlisted.CAM_Module, lambda c: nn.MultiheadAttention(c, 2)]
)
def test_attention_of_other_families_is_named_as_not_ours(host):
    made = nn.Sequential(host(16))
    (row,) = swap_layers(made)
    assert row.status == "not ours"
    assert "attention" in row.reason


def test_layers_of_ours_are_kept():
    report = swap_layers(
        sagan_kernels.Generator(resolution=32, base_channels=8, attention_at=[16]), strict=True
    )
    assert [row.status for row in report if row.kind == "attention"] == ["kept"]


@pytest.mark.parametrize("host", [biggan_pytorch.Attention, studiogan.SelfAttention, heykeetae.Self_Attn])
def test_autocast_gives_the_hosts_dtype_and_numbers(host):
    made, twin = (each.float() for each in pair(host, 64))
    x = features(2, 64, 8, 8).detach().float()
    expected, found = [], []
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected.append(first(made(x.to(dtype))))
            found.append(first(twin(x.to(dtype))))
    for theirs, ours in zip(expected, found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


def test_module_called_attention_of_unknown_form_is_reported():
    class WindowAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(16, 48)

    class AttentionNetwork(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = WindowAttention()

    (row,) = swap_layers(AttentionNetwork())
    assert (row.path, row.status) == ("block", "unknown")


def test_attention_over_tokens_is_unknown_and_other_blocks_of_projections_are_passed_over():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.proj = (nn.Linear(16, 16) for _ in range(4))

        def forward(self, tokens):
            a = torch.softmax(self.q(tokens) @ self.k(tokens).mT, -1)
            return self.proj(a @ self.v(tokens))

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(16, 16, 1) for _ in range(3))
            self.gain = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x + self.gain * self.c(self.a(x) * self.b(x))

    report = swap_layers(
        nn.Sequential(Attention(), Mixed(), biggan_pytorch.Attention(16)), spectral_norm=False
    )
    assert [(row.path, row.status) for row in report] == [("2", "swapped"), ("0", "unknown")]
    assert "does not run" in report.rows[1].reason


@pytest.mark.parametrize("strict", [False, True])
def test_nothing_to_swap_is_said(strict):
    made = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))
    if strict:
        with pytest.raises(ValueError, match="nothing to swap"):
            swap_layers(made, strict=True)
    else:
        with pytest.warns(UserWarning, match="Sequential: nothing to swap; no attention layer"):
            swap_layers(made)


def test_strict_leaves_the_model_as_it_was():
    made = nn.ModuleList([biggan_pytorch.Attention(16), unlisted.CubedAttention(16)])
    with pytest.raises(ValueError, match="1: no known form"):
        swap_layers(made, strict=True)
    assert type(made[0]) is biggan_pytorch.Attention


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_layer_is_refused():
    class Scriptable(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = ScriptableAttention()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attn(x)

    (row,) = swap_layers(torch.jit.script(Scriptable()))
    assert (row.path, row.status) == ("attn", "refused")
    assert "swap before torch.jit.script" in row.reason


class ScriptableAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


def test_layer_on_the_meta_device_is_refused_unless_its_name_suffices():
    with torch.device("meta"):
        made = timm_layers.NonLocalAttn(16)
    (row,) = swap_layers(made)
    assert row.status == "refused"
    assert "meta device" in row.reason
    assert swap_layers(made, verify=False).swapped
    made = made.to_empty(device="cpu")
    assert made(torch.zeros(1, 16, 4, 4)).shape == (1, 16, 4, 4)


def test_layer_that_does_not_run_is_refused_with_its_error():
    made = mimicry.SelfAttention(16)
    made.theta = nn.Conv2d(16, 3, 1)
    (row,) = swap_layers(made, spectral_norm=False)
    assert row.status == "refused"
    assert "does not run on a (2, 16, 8, 8) input" in row.reason


def test_layer_that_is_parametrized_itself_is_refused():
    made = mimicry.SelfAttention(16)
    nn.utils.parametrize.register_parametrization(made, "gamma", nn.Identity())
    (row,) = swap_layers(made, spectral_norm=False)
    assert row.status == "refused"


def test_parametrized_projections_are_swapped():
    made = biggan_pytorch.Attention.__new__(biggan_pytorch.Attention)
    nn.Module.__init__(made)
    for name, widths in {"theta": (16, 2), "phi": (16, 2), "g": (16, 8), "o": (8, 16)}.items():
        made.add_module(name, nn.utils.parametrizations.spectral_norm(nn.Conv2d(*widths, 1, bias=False)))
    made.gamma = nn.Parameter(torch.ones(()))
    twin = copy.deepcopy(made)
    assert swap_layers(twin, spectral_norm=False).swapped
    x = features().float()
    torch.testing.assert_close(twin(x), made(x))
    torch.testing.assert_close(twin.g.parametrizations.weight[0]._u, made.g.parametrizations.weight[0]._u)


@pytest.mark.parametrize("call", [swap_layers, unswap_layers])
def test_what_is_no_module_is_refused(call):
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got dict"):
        call({"G": biggan_pytorch.Generator()})


def test_inputs_that_the_model_does_not_take_are_refused():
    with pytest.raises(ValueError, match=r"inputs must be arguments of Generator.forward"):
        swap_layers(studiogan.Generator(), inputs=(torch.zeros(2, 5),))


def test_top_level_names_are_imported_on_demand():
    assert sagan_kernels.swap_layers is swap_layers
    with pytest.raises(AttributeError, match="no attribute 'swap_layer'"):
        sagan_kernels.swap_layer  # noqa: B018


class Variation(nn.Module):
    """Attention as many GANs write it, but for what `does` says."""

    def __init__(self, does=""):
        super().__init__()
        self.query, self.key, self.value = nn.Conv2d(16, 2, 1), nn.Conv2d(16, 2, 1), nn.Conv2d(16, 16, 1)
        self.gamma = nn.Parameter(torch.full((1,), 0.7))
        self.drop = nn.Dropout(0.3 if does == "drops" else 0.0)
        self.register_buffer("temperature", torch.ones(()))
        self.does = does

    def forward(self, x):
        q, k, v = (conv(x).flatten(2) for conv in (self.query, self.key, self.value))
        scores = q.mT @ k
        attention = torch.softmax(scores * self.temperature if self.does == "anneals" else scores, -1)
        if self.does in ("drops", "may drop"):
            attention = self.drop(attention)
        if self.does == "keeps":
            self.last = attention
        gains = {
            "rectifies": self.gamma.relu(),
            "takes the size": self.gamma.abs(),
            "clamps": self.gamma.clamp(-1, 1),
        }
        return x + gains.get(self.does, self.gamma) * (v @ attention.mT).view_as(x)


def test_layer_that_leaves_its_map_behind_is_refused():
    model = nn.Sequential(Variation("keeps"))
    (row,) = swap_layers(model)
    assert (row.status, row.reason) == ("refused", "its forward keeps last, which a swapped one would not")
    assert type(model[0]) is Variation
    (row,) = swap_layers(nn.Sequential(Variation()))
    assert row.status == "swapped"


@pytest.mark.parametrize("does", ["rectifies", "takes the size", "clamps", "anneals", "may drop"])
def test_what_hides_at_the_present_values_is_found(does):
    model = nn.Sequential(Variation(does))
    (row,) = swap_layers(model)
    assert (row.status, type(model[0])) == ("unknown", Variation)


def test_layer_that_draws_random_numbers_leaves_theirs_alone():
    model, state = nn.Sequential(Variation("drops")), torch.get_rng_state()
    (row,) = swap_layers(model)
    assert row.status == "unknown"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("verify", [True, False])
def test_forward_replaced_on_the_object_is_refused(verify):
    made = heykeetae.Self_Attn(16)
    made.forward = made.gamma.mul
    (row,) = swap_layers(nn.Sequential(made), verify=verify)
    assert (row.status, "replaced on the object" in row.reason) == ("refused", True)


def test_projection_that_is_query_and_key_is_found():
    host = voletiv.Self_Attn(16)
    host.snconv1x1_phi = host.snconv1x1_theta
    twin = copy.deepcopy(host).eval()
    (row,) = swap_layers(twin, spectral_norm=False)
    assert row.status == "swapped"
    x = torch.randn(2, 16, 6, 6)
    torch.testing.assert_close(twin(x), host.eval()(x))


def test_inputs_and_their_watchers_are_left_alone():
    calls = []

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Variation()

        def forward(self, x):
            return self.attention(x.mul_(0.5))

    model, x = InPlace(), torch.ones(1, 16, 6, 6)
    model.attention.register_forward_hook(lambda *_: calls.append(1))
    swap_layers(model, inputs=(x,))
    assert (x.min().item(), calls) == (1.0, [])


def test_memory_is_left_open_where_a_projection_pools_by_itself():
    (row,) = swap_layers(unlisted.NonLocalBlock(16))
    assert (row.status, row.saved_bytes) == ("swapped", None)
