"""StudioGAN's ResNet: attention takes an index of its own in `blocks`, its ReLUs work in place, eps is 1e-4.

`Generator(old=True)` has the class embeddings of before July 2021.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import nn

from hosts.formulas import enlarged, pooled_attention

GENERATOR = {32: [4, 4, 4, 4], 64: [16, 8, 4, 2, 1]}
DISCRIMINATOR = {32: [2, 2, 2, 2], 64: [1, 2, 4, 8, 16]}


def sn(module, eps=1e-6):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.spectral_norm(module, eps=eps)


class SelfAttention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1x1_theta = sn(nn.Conv2d(channels, channels // 8, 1, bias=False))
        self.conv1x1_phi = sn(nn.Conv2d(channels, channels // 8, 1, bias=False))
        self.conv1x1_g = sn(nn.Conv2d(channels, channels // 2, 1, bias=False))
        self.conv1x1_attn = sn(nn.Conv2d(channels // 2, channels, 1, bias=False))
        self.sigma = nn.Parameter(torch.zeros(1))

    def forward(self, x, label=None):
        parts = self.conv1x1_theta, self.conv1x1_phi, self.conv1x1_g, self.conv1x1_attn
        return pooled_attention(x, *parts, self.sigma)


class ConditionalBatchNorm2d(nn.Module):
    def __init__(self, channels, classes, old):
        super().__init__()
        self.classes, self.old = classes, old
        self.bn = nn.BatchNorm2d(channels, eps=1e-4, affine=False)
        if old:
            self.embed0, self.embed1 = (sn(nn.Embedding(classes, channels)) for _ in range(2))
        else:
            self.gain, self.bias = (sn(nn.Linear(classes, channels, bias=False)) for _ in range(2))

    def forward(self, x, label):
        if self.old:
            gain, bias = self.embed0(label), self.embed1(label)
        else:
            one_hot = F.one_hot(label, self.classes).to(x.dtype)
            gain, bias = self.gain(one_hot), self.bias(one_hot)
        return self.bn(x) * (1 + gain)[:, :, None, None] + bias[:, :, None, None]


class GenBlock(nn.Module):
    def __init__(self, width_in, width, classes, old):
        super().__init__()
        self.bn1 = ConditionalBatchNorm2d(width_in, classes, old)
        self.bn2 = ConditionalBatchNorm2d(width, classes, old)
        self.activation = nn.ReLU(inplace=True)
        self.conv2d0 = sn(nn.Conv2d(width_in, width, 1))
        self.conv2d1 = sn(nn.Conv2d(width_in, width, 3, padding=1))
        self.conv2d2 = sn(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x, label):
        h = self.conv2d1(enlarged(self.activation(self.bn1(x, label))))
        return self.conv2d2(self.activation(self.bn2(h, label))) + self.conv2d0(enlarged(x))


class Generator(nn.Module):
    def __init__(self, resolution=32, conv_dim=4, classes=3, z=6, attention=(2,), old=False):
        super().__init__()
        widths = [conv_dim * w for w in GENERATOR[resolution]]
        self.linear0 = sn(nn.Linear(z, widths[0] * 16))
        blocks = []
        for i in range(len(widths) - 1):
            blocks.append(nn.ModuleList([GenBlock(widths[i], widths[i + 1], classes, old)]))
            if i + 1 in attention:
                blocks.append(nn.ModuleList([SelfAttention(widths[i + 1])]))
        self.blocks = nn.ModuleList(blocks)
        self.bn4 = nn.BatchNorm2d(widths[-1], eps=1e-4)
        self.conv2d5 = sn(nn.Conv2d(widths[-1], 3, 3, padding=1))

    def forward(self, z, label):
        h = self.linear0(z).view(len(z), -1, 4, 4)
        for (block,) in self.blocks:
            h = block(h, label)
        return torch.tanh(self.conv2d5(torch.relu(self.bn4(h))))


class DiscBlock(nn.Module):
    def __init__(self, width_in, width, first, downsample):
        super().__init__()
        self.first, self.downsample = first, downsample
        self.activation = nn.ReLU(inplace=True)
        if downsample or width_in != width:
            self.conv2d0 = sn(nn.Conv2d(width_in, width, 1))
        self.conv2d1 = sn(nn.Conv2d(width_in, width, 3, padding=1))
        self.conv2d2 = sn(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x):
        x0 = x
        h = x if self.first else self.activation(x)  # in place: x0 changes with it
        h = self.conv2d2(self.activation(self.conv2d1(h)))
        x0 = self.conv2d0(x0) if hasattr(self, "conv2d0") else x0
        return F.avg_pool2d(h, 2) + F.avg_pool2d(x0, 2) if self.downsample else h + x0


class Discriminator(nn.Module):
    def __init__(self, resolution=32, conv_dim=4, classes=3, attention=(1,)):
        super().__init__()
        widths = [conv_dim * w for w in DISCRIMINATOR[resolution]]
        halvings = 2 if resolution == 32 else len(widths) - 1
        blocks = []
        for i in range(len(widths)):
            blocks.append(nn.ModuleList([DiscBlock([3, *widths][i], widths[i], i == 0, i < halvings)]))
            if i + 1 in attention:
                blocks.append(nn.ModuleList([SelfAttention(widths[i])]))
        self.blocks = nn.ModuleList(blocks)
        self.linear1 = sn(nn.Linear(widths[-1], 1))
        self.embedding = sn(nn.Embedding(classes, widths[-1]))

    def forward(self, x, label):
        for (block,) in self.blocks:
            x = block(x)
        h = torch.relu(x).sum((2, 3))
        return self.linear1(h).squeeze(1) + (self.embedding(label) * h).sum(1)
