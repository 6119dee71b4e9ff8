"""mmgeneration's SAGAN: attention numbered among `conv_blocks`, class embeddings spectral-normed or plain."""

import torch
import torch.nn.functional as F
from torch import nn

from hosts.formulas import enlarged, pooled_attention
from hosts.studiogan import sn


class ConvModule(nn.Module):
    def __init__(self, *args, norm=None, **kwargs):
        super().__init__()
        self.conv = sn(nn.Conv2d(*args, **kwargs), 1e-12)
        if norm is not None:
            self.bn = norm

    def forward(self, x):
        return self.conv(torch.relu(self.bn(x)) if hasattr(self, "bn") else x)


class SelfAttentionBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.theta, self.phi = (ConvModule(channels, channels // 8, 1, bias=False) for _ in range(2))
        self.g = ConvModule(channels, channels // 2, 1, bias=False)
        self.o = ConvModule(channels // 2, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.tensor(0.0))

    def forward(self, x, label=None):
        return pooled_attention(x, self.theta, self.phi, self.g, self.o, self.gamma)


class SNConditionNorm(nn.Module):
    def __init__(self, channels, classes, normed, eps):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, eps=eps, affine=False)
        wrap = (lambda module: sn(module, 1e-12)) if normed else (lambda module: module)
        self.weight_embedding, self.bias_embedding = (wrap(nn.Embedding(classes, channels)) for _ in range(2))

    def forward(self, x, label):
        gain, bias = self.weight_embedding(label) + 1.0, self.bias_embedding(label)
        return self.norm(x) * gain[:, :, None, None] + bias[:, :, None, None]


class SNGANGenResBlock(nn.Module):
    def __init__(self, width_in, width, *norm):
        super().__init__()
        self.conv_1, self.conv_2 = (
            ConvModule(width_in, width, 3, padding=1),
            ConvModule(width, width, 3, padding=1),
        )
        self.norm_1, self.norm_2 = SNConditionNorm(width_in, *norm), SNConditionNorm(width, *norm)
        self.shortcut = ConvModule(width_in, width, 1)

    def forward(self, x, label):
        h = self.conv_1(enlarged(torch.relu(self.norm_1(x, label))))
        return self.conv_2(torch.relu(self.norm_2(h, label))) + self.shortcut(enlarged(x))


class Generator(nn.Module):
    def __init__(self, channels=16, classes=3, z=6, normed=True, eps=1e-4):
        super().__init__()
        self.noise2feat = sn(nn.Linear(z, channels * 16), 1e-12)
        block = [SNGANGenResBlock(channels, channels, classes, normed, eps) for _ in range(3)]
        self.conv_blocks = nn.ModuleList([*block[:2], SelfAttentionBlock(channels), block[2]])
        self.to_rgb = ConvModule(channels, 3, 3, padding=1, norm=nn.BatchNorm2d(channels, eps=eps))

    def forward(self, z, label):
        h = self.noise2feat(z).view(len(z), -1, 4, 4)
        for block in self.conv_blocks:
            h = block(h, label)
        return torch.tanh(self.to_rgb(h))


class SNGANDiscResBlock(nn.Module):
    def __init__(self, width_in, width, first, downsample, inplace):
        super().__init__()
        self.first, self.downsample, self.activate = first, downsample, nn.ReLU(inplace=inplace)
        self.conv_1, self.conv_2 = (
            ConvModule(width_in, width, 3, padding=1),
            ConvModule(width, width, 3, padding=1),
        )
        if downsample:
            self.shortcut = ConvModule(width_in, width, 1)

    def forward(self, x):
        h = self.conv_1(x if self.first else self.activate(x))
        h = self.conv_2(torch.relu(h))
        x = self.shortcut(x) if self.downsample else x
        return F.avg_pool2d(h, 2) + F.avg_pool2d(x, 2) if self.downsample else h + x


class Discriminator(nn.Module):
    def __init__(self, channels=16, classes=3, inplace=False):
        super().__init__()
        self.from_rgb = SNGANDiscResBlock(3, channels, True, True, inplace)
        blocks = [SNGANDiscResBlock(channels, channels, False, i == 0, inplace) for i in range(3)]
        self.conv_blocks = nn.ModuleList([SelfAttentionBlock(channels), *blocks])
        self.decision = sn(nn.Linear(channels, 1), 1e-12)
        self.proj_y = sn(nn.Embedding(classes, channels), 1e-12)

    def forward(self, x, label):
        x = self.from_rgb(x)
        for block in self.conv_blocks:
            x = block(x)
        h = torch.relu(x).sum((2, 3))
        return self.decision(h).squeeze(1) + (self.proj_y(label) * h).sum(1)
