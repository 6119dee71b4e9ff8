"""What a swap is worth on a CPU: attention layers at the shapes of their projects, and a discriminator's step.

`BENCH_THREADS=1 python benchmarks/swap_effect.py` prints a table. The layers and networks are the stand-ins of
tests/hosts. Times are medians, ratios medians of ratios of interleaved rounds; results are compared first.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
torch.set_num_threads(int(os.environ.get("BENCH_THREADS", "1")))

from hosts import (  # noqa: E402
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
    voletiv,
)

from sagan_kernels import swap_layers  # noqa: E402

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "9"))

# layer, batch, channels, height and width of the feature map in the project's own networks
LAYERS = {
    "BigGAN-PyTorch": (biggan_pytorch.Attention, 4, 64, 64),
    "StudioGAN": (studiogan.SelfAttention, 16, 256, 16),
    "mimicry": (mimicry.SelfAttention, 8, 256, 32),
    "mmgeneration": (mmgeneration.SelfAttentionBlock, 4, 64, 64),
    "voletiv": (voletiv.Self_Attn, 8, 128, 32),
    "pretrained-BigGAN": (pretrained_biggan.SelfAttn, 2, 256, 64),
    "heykeetae": (heykeetae.Self_Attn, 8, 64, 32),
    "rosinality": (rosinality.SelfAttention, 8, 128, 32),
    "fastai": (fastai.SelfAttention, 2, 256, 32),
    "torchgan": (torchgan.SelfAttention2d, 8, 64, 32),
    "timm": (timm_layers.NonLocalAttn, 8, 256, 28),
}
# networks at 32 px, widths that take tenths of a second; heykeetae's is of 16 px
NETWORKS = {
    "BigGAN-PyTorch": lambda: biggan_pytorch.Discriminator(ch=32),
    "StudioGAN": lambda: studiogan.Discriminator(conv_dim=64),
    "mimicry": lambda: mimicry.Discriminator(ndf=128),
}


def seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleaved(host: Callable[[], None], ours: Callable[[], None]) -> tuple[float, float]:
    """Median seconds of the host, and the median of host / ours."""
    host(), ours(), host(), ours()
    rounds = [(seconds(host), seconds(ours)) for _ in range(ROUNDS)]
    return statistics.median(a for a, _ in rounds), statistics.median(a / b for a, b in rounds)


def first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def twins(make: Callable[[], nn.Module], inputs: tuple[Tensor, ...]) -> tuple[nn.Module, nn.Module]:
    host, ours = make(), make()
    for parameter in host.parameters():
        if not parameter.any():
            nn.init.constant_(parameter, 0.5)
    for _ in range(10):  # spectral norm finds its vectors
        host(*inputs)
    ours.load_state_dict(host.state_dict())
    assert swap_layers(ours).swapped
    torch.testing.assert_close(first(ours.eval()(*inputs)), first(host.eval()(*inputs)), rtol=1e-3, atol=1e-3)
    return host.train(), ours.train()


def steps(network: nn.Module, inputs: tuple[Tensor, ...], backward: bool) -> Callable[[], None]:
    def step() -> None:
        with torch.set_grad_enabled(backward):
            y = first(network(*inputs))
            if backward:
                y.square().sum().backward()

    return step


def row(name: str, shape: str, make: Callable[[], nn.Module], inputs: tuple[Tensor, ...]) -> str:
    torch.manual_seed(0)
    host, ours = twins(make, inputs)
    cells = []
    for backward in (False, True):
        took, ratio = interleaved(*(steps(each, inputs, backward) for each in (host, ours)))
        cells.append(f"{1e3 * took:.0f} ms, {ratio:.2f}×")
    return f"| {name} | {shape} | {' | '.join(cells)} |"


if __name__ == "__main__":
    print("| project | what | forward: host, faster by | forward + backward: host, faster by |")
    print("|---|---|---|---|")
    for name, (layer, batch, channels, side) in LAYERS.items():
        x = torch.randn(batch, channels, side, side, requires_grad=True)
        shape = f"layer, B{batch} C{channels} {side}×{side}"
        print(row(name, shape, lambda layer=layer, channels=channels: layer(channels), (x,)), flush=True)
    for name, make in NETWORKS.items():
        images, label = torch.randn(8, 3, 32, 32), torch.arange(8) % 3
        print(row(name, "discriminator, B8 32 px", make, (images, label)), flush=True)
