"""One SAGAN attention layer against eager PyTorch and SDPA, on the device at hand. pytest benchmarks -k attention.

Layer forward, forward + backward, and an R1 step (the gradient of the squared gradient for x), with parameters and x
asking for gradients. SDPA is given its best form: queries and keys padded to the value width, contiguous, unscaled.
"""

import peers
import pytest
import torch
import torch.nn.functional as F

from sagan_kernels.nn import PaperSelfAttention2d, SelfAttention2d

# (form, B, C, H): the shapes of the design table; pooled is the released code's layer, full the paper's
SHAPES = [
    ("pooled", 1, 64, 32), ("pooled", 8, 64, 32), ("pooled", 8, 128, 32), ("pooled", 8, 256, 32),
    ("pooled", 16, 128, 16), ("pooled", 1, 192, 64), ("pooled", 8, 192, 64), ("pooled", 8, 64, 64),
    ("full", 8, 128, 32), ("full", 8, 256, 32), ("full", 1, 192, 64),
]  # fmt: skip
R1_SHAPES = [("pooled", 8, 64, 32), ("pooled", 8, 128, 32), ("pooled", 4, 64, 64), ("full", 4, 128, 32)]


def layer_of(shape):
    form, B, C, H = shape
    torch.manual_seed(0)
    layer = (SelfAttention2d if form == "pooled" else PaperSelfAttention2d)(C)
    torch.nn.init.constant_(layer.gamma, 0.5)
    return layer, torch.randn(B, C, H, H, requires_grad=True)


def eager(layer, x):
    return peers.attention(layer, x) if hasattr(layer, "out") else peers.paper_attention(layer, x)


def sdpa(layer, x):
    """The layer with SDPA where it is fused: equal widths, last dimension contiguous."""
    positions = lambda t: t.flatten(2).mT  # noqa: E731
    key, value = layer.key(x), layer.value(x)
    if hasattr(layer, "out"):
        key, value = F.max_pool2d(key, 2), F.max_pool2d(value, 2)
    query, key, value = (positions(t) for t in (layer.query(x), key, value))
    width = value.shape[2]
    query, key = (F.pad(t, (0, width - t.shape[2])) for t in (query, key))
    q, k, v = (t.contiguous().unsqueeze(1) for t in (query, key, value))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        o = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    o = o.squeeze(1).mT.unflatten(2, x.shape[2:])
    return torch.addcmul(x, layer.gamma, layer.out(o) if hasattr(layer, "out") else o)


def ours(layer, x):
    return layer(x)


CONTENDERS = {"eager": eager, "sdpa_padded": sdpa, "ours": ours}


def forward(shape):
    layer, x = layer_of(shape)

    def call(run):
        with torch.no_grad():
            return run(layer, x)

    return {name: lambda run=run: call(run) for name, run in CONTENDERS.items()}


def forward_backward(shape):
    layer, x = layer_of(shape)
    wanted = [x, *layer.parameters()]
    grad = torch.randn(x.shape)
    return {
        name: lambda run=run: torch.autograd.grad(run(layer, x), wanted, grad)
        for name, run in CONTENDERS.items()
    }


def r1_step(shape):
    layer, x = layer_of(shape)
    wanted = list(layer.parameters())

    def call(run):
        (slope,) = torch.autograd.grad(run(layer, x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().mean(), wanted)

    return {name: lambda run=run: call(run) for name, run in (("eager", eager), ("ours", ours))}


def checked(calls):
    """A wrong result has no speed."""
    results = {name: call() for name, call in calls.items()}
    results = {name: [r] if isinstance(r, torch.Tensor) else r for name, r in results.items()}
    scales = [t.abs().max().item() for t in results["eager"]]
    for name, found in results.items():
        for actual, wanted, scale in zip(found, results["eager"], scales, strict=True):
            # a bias of keys has no gradient but rounding: softmax does not see it
            atol = 1e-4 * max(scale, 1e-2 * max(scales))
            torch.testing.assert_close(actual, wanted, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    return calls


def called(shape):
    form, B, C, H = shape
    return f"{form}-B{B}-C{C}-{H}x{H}"


@pytest.mark.parametrize("shape", SHAPES, ids=called)
def bench_attention_forward(shape, versus):
    versus(checked(forward(shape)), rounds=15, shape=called(shape), dtype="float32")


@pytest.mark.parametrize("shape", SHAPES, ids=called)
def bench_attention_forward_backward(shape, versus):
    versus(checked(forward_backward(shape)), rounds=9, shape=called(shape), dtype="float32")


@pytest.mark.parametrize("shape", R1_SHAPES, ids=called)
def bench_attention_r1(shape, versus):
    versus(checked(r1_step(shape)), rounds=7, shape=called(shape), dtype="float32")


@pytest.mark.parametrize("calls", [forward, forward_backward, r1_step])
def bench_attention_smoke(calls, versus):
    versus(checked(calls(("pooled", 2, 16, 8))), rounds=1, shape="pooled-B2-C16-8x8", dtype="float32")
