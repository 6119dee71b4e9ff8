"""Swapped networks in the wrappers of distributed training, and beside an average of their weights."""

import copy
import itertools

import torch
import torch.distributed as dist
from hosts import biggan_pytorch, heykeetae, studiogan
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sagan_kernels import swap_layers, unswap_layers

MATCH = {"rtol": 1e-10, "atol": 1e-10}


def trained(network, inputs, steps=2):
    """State dict after steps of SGD."""
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        network(*inputs).square().mean().backward()
        optimizer.step()
    return {key.removeprefix("module."): tensor.clone() for key, tensor in network.state_dict().items()}


def distributed(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.manual_seed(0)
    inputs = torch.randn(2, 3, 32, 32, dtype=torch.float64) + rank, torch.arange(2)
    states = []
    for host, swap in itertools.product((biggan_pytorch, studiogan), (None, "before", "after")):
        torch.manual_seed(0)
        network = host.Discriminator().double()
        for name, parameter in network.named_parameters():
            if name.endswith(("gamma", "sigma")):
                nn.init.ones_(parameter)
        if swap == "before":
            swap_layers(network)
        parallel = DistributedDataParallel(network)
        if swap == "after":
            assert swap_layers(parallel).swapped
        states.append(trained(parallel, inputs))
    torch.save(states, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_distributed_training_is_the_hosts(tmp_path):
    torch.multiprocessing.spawn(distributed, (2, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    weight = "blocks.0.1.theta.weight"
    torch.testing.assert_close(ranks[0][1][weight], ranks[1][1][weight], rtol=0, atol=0)
    for states in ranks:
        for host, *others in (states[:3], states[3:]):
            for state, (key, tensor) in itertools.product(others, host.items()):
                torch.testing.assert_close(state[key], tensor, **MATCH, msg=key)


def test_data_parallel_network_is_swapped_inside(device):
    host = studiogan.Discriminator().double().to(device)  # where `DataParallel` takes its own
    twin = studiogan.Discriminator().double().to(device)
    twin.load_state_dict(host.state_dict())
    twin = nn.DataParallel(twin)
    report = swap_layers(twin)
    assert report.swapped[0].path == "module.blocks.1.0"
    inputs = torch.randn(2, 3, 32, 32, dtype=torch.float64, device=device), torch.arange(2, device=device)
    expected = trained(host, inputs)
    for key, tensor in trained(twin, inputs).items():
        torch.testing.assert_close(tensor, expected[key], **MATCH, msg=key)


def test_average_of_weights_may_be_copied_before_or_after():
    network = biggan_pytorch.Generator().double()
    nn.init.ones_(network.blocks[1][1].gamma)
    early = copy.deepcopy(network)
    swap_layers(network)
    late = copy.deepcopy(network)
    z, label = torch.randn(2, 6, dtype=torch.float64), torch.arange(2)
    network(z, label).sum().backward()
    with torch.no_grad():
        for average in (early, late):
            for ours, theirs in zip(average.parameters(), network.parameters(), strict=True):
                ours.lerp_(theirs - 0.1 * theirs.grad, 0.5)
    torch.testing.assert_close(late.eval()(z, label), early.eval()(z, label), **MATCH)
    unswap_layers(late)
    assert type(late.blocks[1][1]) is biggan_pytorch.Attention
    assert type(network.blocks[1][1]) is not biggan_pytorch.Attention


def test_checkpoints_pass_between_swapped_and_unswapped_networks(tmp_path):
    host, twin = heykeetae.Generator(), heykeetae.Generator()
    swap_layers(twin)
    torch.save(twin.state_dict(), tmp_path / "swapped.pt")
    host.load_state_dict(torch.load(tmp_path / "swapped.pt"))
    torch.save(host.state_dict(), tmp_path / "host.pt")
    twin.load_state_dict(torch.load(tmp_path / "host.pt"))
    z = torch.randn(2, 6)
    torch.testing.assert_close(twin.eval()(z)[0], host.eval()(z)[0])
