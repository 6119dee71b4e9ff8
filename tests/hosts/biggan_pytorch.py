"""BigGAN-PyTorch with the SAGAN settings of its launch script: G_shared and hier off, attention inside `blocks.i.1`."""

import torch
import torch.nn.functional as F
from torch import nn

from hosts.formulas import enlarged, pooled_attention

GENERATOR = {32: [4, 4, 4, 4], 64: [16, 16, 8, 4, 2], 128: [16, 16, 8, 4, 2, 1]}
DISCRIMINATOR = {32: [4, 4, 4, 4], 64: [1, 2, 4, 8, 16], 128: [1, 2, 4, 8, 16, 16]}


class SN:
    """One power iteration a forward from `u0`, kept in training only; σ from that very iteration."""

    def remember(self, outputs):
        self.register_buffer("u0", torch.randn(1, outputs))
        self.register_buffer("sv0", torch.ones(1))

    def W_(self):
        W = self.weight.view(self.weight.size(0), -1)
        with torch.no_grad():
            v = F.normalize(self.u0 @ W, eps=1e-8)
            u = F.normalize(v @ W.t(), eps=1e-8)
            if self.training:
                self.u0.copy_(u)
        sigma = (v @ W.t() @ u.t()).squeeze()
        if self.training:
            self.sv0.fill_(sigma.item())
        return self.weight / sigma


class SNConv2d(nn.Conv2d, SN):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.remember(args[1])

    def forward(self, x):
        return F.conv2d(x, self.W_(), self.bias, padding=self.padding)


class SNLinear(nn.Linear, SN):
    def __init__(self, *args):
        super().__init__(*args)
        self.remember(args[1])

    def forward(self, x):
        return F.linear(x, self.W_(), self.bias)


class SNEmbedding(nn.Embedding, SN):
    def __init__(self, *args):
        super().__init__(*args)
        self.remember(args[0])

    def forward(self, label):
        return F.embedding(label, self.W_())


class Attention(nn.Module):
    def __init__(self, ch):
        super().__init__()
        self.theta, self.phi = (SNConv2d(ch, ch // 8, 1, bias=False) for _ in range(2))
        self.g, self.o = SNConv2d(ch, ch // 2, 1, bias=False), SNConv2d(ch // 2, ch, 1, bias=False)
        self.gamma = nn.Parameter(torch.tensor(0.0))

    def forward(self, x, y=None):
        return pooled_attention(x, self.theta, self.phi, self.g, self.o, self.gamma)


class ccbn(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.gain, self.bias = nn.Embedding(classes, channels), nn.Embedding(classes, channels)
        self.register_buffer("stored_mean", torch.zeros(channels))
        self.register_buffer("stored_var", torch.ones(channels))

    def forward(self, x, y):
        x = F.batch_norm(x, self.stored_mean, self.stored_var, None, None, self.training, 0.1, 1e-5)
        return x * (1 + self.gain(y))[:, :, None, None] + self.bias(y)[:, :, None, None]


class bn(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("stored_mean", torch.zeros(channels))
        self.register_buffer("stored_var", torch.ones(channels))

    def forward(self, x):
        return F.batch_norm(
            x, self.stored_mean, self.stored_var, self.gain, self.bias, self.training, 0.1, 1e-5
        )


class GBlock(nn.Module):
    def __init__(self, width_in, width, classes):
        super().__init__()
        self.conv1 = SNConv2d(width_in, width, 3, padding=1)
        self.conv2 = SNConv2d(width, width, 3, padding=1)
        self.conv_sc = SNConv2d(width_in, width, 1)
        self.bn1, self.bn2 = ccbn(width_in, classes), ccbn(width, classes)

    def forward(self, x, y):
        h = self.conv1(enlarged(torch.relu(self.bn1(x, y))))
        return self.conv2(torch.relu(self.bn2(h, y))) + self.conv_sc(enlarged(x))


class Generator(nn.Module):
    def __init__(self, resolution=32, ch=4, classes=3, z=6, attention=(16,)):
        super().__init__()
        widths = [ch * w for w in GENERATOR[resolution]]
        self.linear = SNLinear(z, widths[0] * 16)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [GBlock(widths[i], widths[i + 1], classes)]
                + ([Attention(widths[i + 1])] if 8 << i in attention else [])
            )
            for i in range(len(widths) - 1)
        )
        self.output_layer = nn.Sequential(bn(widths[-1]), nn.ReLU(), SNConv2d(widths[-1], 3, 3, padding=1))

    def forward(self, z, y):
        h = self.linear(z).view(len(z), -1, 4, 4)
        for parts in self.blocks:
            for part in parts:
                h = part(h, y)
        return torch.tanh(self.output_layer(h))


class DBlock(nn.Module):
    def __init__(self, width_in, width, preactivation, downsample, wide):
        super().__init__()
        self.preactivation, self.downsample = preactivation, downsample
        hidden = width if wide or not preactivation else width_in
        self.conv1 = SNConv2d(width_in, hidden, 3, padding=1)
        self.conv2 = SNConv2d(hidden, width, 3, padding=1)
        if downsample or width_in != width:
            self.conv_sc = SNConv2d(width_in, width, 1)

    def forward(self, x):
        h = self.conv2(torch.relu(self.conv1(F.relu(x) if self.preactivation else x)))
        if self.downsample:
            h = F.avg_pool2d(h, 2)
        if not self.preactivation:
            return h + self.conv_sc(F.avg_pool2d(x, 2))
        x = self.conv_sc(x) if hasattr(self, "conv_sc") else x
        return h + (F.avg_pool2d(x, 2) if self.downsample else x)


class Discriminator(nn.Module):
    def __init__(self, resolution=32, ch=4, classes=3, attention=(16,), wide=True):
        super().__init__()
        widths = [ch * w for w in DISCRIMINATOR[resolution]]
        halvings = 2 if resolution == 32 else len(widths) - 1
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [DBlock([3, *widths][i], widths[i], i > 0, i < halvings, wide)]
                + ([Attention(widths[i])] if i < halvings and resolution >> i + 1 in attention else [])
            )
            for i in range(len(widths))
        )
        self.linear = SNLinear(widths[-1], 1)
        self.embed = SNEmbedding(classes, widths[-1])

    def forward(self, x, y):
        for parts in self.blocks:
            for part in parts:
                x = part(x)
        h = F.relu(x).sum((2, 3))
        return (self.linear(h) + (self.embed(y) * h).sum(1, keepdim=True)).squeeze(1)
