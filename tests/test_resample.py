"""Convolution next to a change of resolution: one strided convolution equals the two steps."""

import pytest
import torch
import torch.nn.functional as F

from sagan_kernels.ops import conv2d_avg_pool, upsample_conv2d


def inputs(size=(5, 7), channels=(3, 4), dtype=torch.float64):
    x = torch.randn(2, channels[0], *size, dtype=dtype, requires_grad=True)
    weight = torch.randn(channels[1], channels[0], 3, 3, dtype=dtype, requires_grad=True)
    return x, weight, torch.randn(channels[1], dtype=dtype, requires_grad=True)


def upsample_then_convolve(x, weight, bias):
    return F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), weight, bias, padding=1)


def convolve_then_pool(x, weight, bias):
    y = F.conv2d(x, weight, bias, padding=1)
    y = y[..., : y.shape[2] // 2 * 2, : y.shape[3] // 2 * 2]
    return (y[..., ::2, ::2] + y[..., 1::2, ::2] + y[..., ::2, 1::2] + y[..., 1::2, 1::2]) / 4


CASES = {"upsample": (upsample_conv2d, upsample_then_convolve), "pool": (conv2d_avg_pool, convolve_then_pool)}


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("size", [(16, 16), (17, 31), (5, 7), (2, 3), (1, 1)])
@pytest.mark.parametrize("name", CASES)
def test_fused_equals_the_two_steps(name, size, impl):
    if name == "pool" and min(size) < 2:
        size = (2, 2)
    ours, two_steps = CASES[name]
    arguments = inputs(size)
    torch.testing.assert_close(ours(*arguments, impl=impl), two_steps(*arguments))
    torch.testing.assert_close(
        ours(arguments[0], arguments[1], impl=impl), two_steps(arguments[0], arguments[1], None)
    )


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_first_and_second_order_match_the_two_steps(name):
    results = []
    arguments = inputs((16, 17))
    for function in CASES[name]:
        first = torch.autograd.grad(function(*arguments).square().sum(), arguments, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), arguments)
        results.append((*first, *second))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
