"""The attention product, and the whole SAGAN layer, against the strongest alternatives. pytest benchmarks -k attention.

Forward, forward + backward, and an R1 step (the gradient of the squared slope), at the shapes that published SAGANs and
BigGANs run. BENCH_BATCHES, such as "1 8 64", and BENCH_DTYPES, such as "float32 bfloat16", replace a device's own.
"""

import os

import pytest
import torch

from benchmarks import attention_contenders, measuring, roofline
from benchmarks.static_report import SHAPES as PUBLISHED
from sagan_kernels import reference
from sagan_kernels.nn import PaperSelfAttention2d, SelfAttention2d

# (L, S, E, Ev): to those of the static report, the rest of the published ones, then unpooled layers of the paper's text
SHAPES = PUBLISHED | {
    "D64 32×32 C64": (1024, 256, 8, 32),
    "G32 16×16 C256": (256, 64, 32, 128),
    "D32 16×16 C128": (256, 64, 16, 64),
    "BigGAN-deep 64×64 C256": (4096, 1024, 32, 128),
    "paper 32×32 C128, unpooled": (1024, 1024, 16, 128),
    "paper 32×32 C256, unpooled": (1024, 1024, 32, 256),
    "paper 64×64 C192, unpooled": (4096, 4096, 24, 192),
}
SMOKE = (64, 16, 2, 8)
GPU = torch.cuda.is_available()
BATCHES = measuring.numbers("BENCH_BATCHES", "1 8 64" if GPU else "1 8")
DTYPES = os.environ.get("BENCH_DTYPES", "float32 tf32 bfloat16" if GPU else "float32").split()
if unknown := [dtype for dtype in DTYPES if dtype not in measuring.DTYPES]:
    raise ValueError(f"BENCH_DTYPES: must be of {', '.join(measuring.DTYPES)}, got {' '.join(unknown)}")
# what else than NCHW float32 a CPU is asked: at one small and one large layer
VARIANTS = [] if GPU else [("bfloat16", "NCHW"), ("float32", "NHWC")]
VARIED = ("D64 32×32 C64", "D128 64×64 C64")


def cases():
    for name in SHAPES:
        for batch in BATCHES:
            for dtype in DTYPES:
                for layout in ("NCHW", "NHWC") if GPU else ("NCHW",):
                    yield name, batch, dtype, layout
            if name in VARIED and batch > 1:
                yield from ((name, batch, *variant) for variant in VARIANTS)


CASES = list(cases())
on_cases = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-B{c[1]}-{c[2]}-{c[3]}")
on_tasks = pytest.mark.parametrize("task", attention_contenders.TASKS)


def core(task, name, shape, batch, dtype, layout):
    """The product on tensors that lie as a convolution leaves them."""
    L, S, E, Ev = shape
    torch.manual_seed(0)

    def tensor(rows, width):
        t = torch.randn(batch, width, rows).mT if layout == "NCHW" else torch.randn(batch, rows, width)
        # scores of a trained layer are of order one
        return (
            (t / E**0.25 if width == E else t)
            .to(measuring.device(), measuring.DTYPES[dtype])
            .requires_grad_()
        )

    tensors = [tensor(L, E), tensor(S, E), tensor(S, Ev)]
    doubled = [t.detach().double().requires_grad_() for t in tensors]
    grad = attention_contenders.gradient_like(tensors[0].new_empty(batch, L, Ev)).double()
    return measuring.Case(
        "attention", task, name, attention_contenders.of_core(task, tensors),
        lambda: attention_contenders.passes(task, lambda: reference.attention(*doubled), doubled, doubled, grad),
        dtype, layout, batch,
        roofline.attention_work(task, batch, L, S, E, Ev, tensors[0].element_size()), L,
    )  # fmt: skip


def layer(task, name, shape, batch, dtype, layout):
    """The layer of the released code, or the paper's where keys are as many as queries."""
    L, S, _, Ev = shape
    side, kind = int(L**0.5), SelfAttention2d if 4 * S == L else PaperSelfAttention2d
    C = 2 * Ev if 4 * S == L else Ev
    torch.manual_seed(0)
    made = kind(C)
    torch.nn.init.constant_(made.gamma, 0.5)
    made = made.to(measuring.device(), measuring.DTYPES[dtype])
    memory_format = torch.channels_last if layout == "NHWC" else torch.contiguous_format
    x = torch.randn(batch, C, side, side).to(measuring.device(), measuring.DTYPES[dtype])
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    contenders = attention_contenders.of_layer(task, made, x)
    return measuring.Case(
        "attention layer", task, name, contenders,
        lambda: in_float64(task, made, x), dtype, layout, batch,
        roofline.layer_work(task, batch, C, L, S, made.query.out_channels, Ev, x.element_size()), L,
        pooled=kind is SelfAttention2d,
    )  # fmt: skip


def in_float64(task, made, x):
    grad = attention_contenders.gradient_like(x).double()
    x = x.detach().double().requires_grad_()
    weights = [p.detach().double().requires_grad_() for p in made.parameters()]
    named = dict(zip((name for name, _ in made.named_parameters()), weights, strict=True))

    def forward():
        names = ("query.weight", "key.weight", "value.weight", "out.weight", "gamma")
        return reference.sagan_attention(
            x, *(named.get(n) for n in names), pool="out.weight" in named, **biases
        )

    biases = {f"{n}_bias": named.get(f"{n}.bias") for n in ("query", "key", "value", "out")}
    return attention_contenders.passes(task, forward, [x, *weights], [x], grad)


def rounds(task, shape, batch):
    """Fewer for what takes long, at least seven."""
    L, S, E, Ev = shape
    return (
        7
        if batch * L * S * (E + Ev) * (1 + attention_contenders.TASKS.index(task)) > 2**29 and not GPU
        else 21
    )


@on_cases
@on_tasks
def bench_attention_core(task, case, versus):
    name, batch, *form = case
    versus(core(task, name, SHAPES[name], batch, *form), rounds=rounds(task, SHAPES[name], batch))


@on_cases
@on_tasks
def bench_attention_layer(task, case, versus):
    name, batch, *form = case
    versus(layer(task, name, SHAPES[name], batch, *form), rounds=rounds(task, SHAPES[name], batch))


@pytest.mark.parametrize("make", [core, layer])
@on_tasks
def bench_attention_smoke(task, make, versus):
    versus(make(task, "mimicry D8 8×8 C16", SMOKE, 2, "float32", "NCHW"), rounds=1)


@pytest.mark.parametrize(("dtype", "layout"), [("bfloat16", "NCHW"), ("float32", "NHWC")])
@pytest.mark.parametrize("make", [core, layer])
@on_tasks
def bench_attention_smoke_unpooled(task, make, dtype, layout, versus):
    case = make(task, "unpooled 7×7 C16", (49, 49, 2, 16), 2, dtype, layout)
    versus(measuring.without_compilers(case), rounds=1)
