"""Layers that no table names: some compute attention in a form known here, some something else."""

import torch
import torch.nn.functional as F
from torch import nn


class ScaledBlock(nn.Module):
    """Widths apart, names apart, scores over √E, an out projection and a gain of one element."""

    def __init__(self, channels, width=3, middle=5):
        super().__init__()
        self.to_v = nn.Conv2d(channels, middle, 1)
        self.to_a, self.to_b = nn.Conv2d(channels, width, 1), nn.Conv2d(channels, width, 1)
        self.back = nn.Conv2d(middle, channels, 1)
        self.strength = nn.Parameter(torch.zeros(1, 1, 1, 1))

    def forward(self, features):
        a, b, v = (conv(features).flatten(2) for conv in (self.to_a, self.to_b, self.to_v))
        attention = torch.softmax(b.mT @ a / a.shape[1] ** 0.5, -1)
        return features + self.strength * self.back((v @ attention.mT).view(len(v), -1, *features.shape[2:]))


class NonLocalBlock(nn.Module):
    """Pooling and batch norm inside its children, and no gain."""

    def __init__(self, channels, width=4):
        super().__init__()
        self.g = nn.Sequential(nn.Conv2d(channels, width, 1), nn.MaxPool2d(2))
        self.theta = nn.Conv2d(channels, width, 1)
        self.phi = nn.Sequential(nn.Conv2d(channels, width, 1), nn.MaxPool2d(2))
        self.W = nn.Sequential(nn.Conv2d(width, channels, 1), nn.BatchNorm2d(channels))
        nn.init.zeros_(self.W[1].weight)

    def forward(self, x):
        theta, phi, g = (part(x).flatten(2) for part in (self.theta, self.phi, self.g))
        y = (torch.softmax(theta.mT @ phi, -1) @ g.mT).mT.reshape(len(x), -1, *x.shape[2:])
        return self.W(y) + x


class EmbeddedGaussian(NonLocalBlock):
    """The same under a name that tells nothing."""


class LinearProjections(nn.Module):
    """Linear layers over positions."""

    def __init__(self, channels, width=3):
        super().__init__()
        self.query, self.key = nn.Linear(channels, width), nn.Linear(channels, width)
        self.value = nn.Linear(channels, channels)
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        rows = x.flatten(2).mT
        y = torch.softmax(self.query(rows) @ self.key(rows).mT, -1) @ self.value(rows)
        return x + self.alpha * y.mT.view_as(x)


class CubedAttention(nn.Module):
    """The names of a known layer, and another formula."""

    def __init__(self, channels):
        super().__init__()
        self.query_conv, self.key_conv = nn.Conv2d(channels, 2, 1), nn.Conv2d(channels, 2, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        q, k, v = (conv(x).flatten(2) for conv in (self.query_conv, self.key_conv, self.value_conv))
        return x + self.gamma * (v @ torch.softmax((q.mT @ k) ** 3, -1).mT).view_as(x)


class LinearAttention(nn.Module):
    """lucidrains': softmax over channels and over positions apart."""

    def __init__(self, dim, dim_head=4, heads=2):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Conv2d(dim, dim_head * heads, 1, bias=False)
        self.to_kv = nn.Conv2d(dim, 2 * dim_head * heads, 1, bias=False)
        self.to_out = nn.Conv2d(dim_head * heads, dim, 1)

    def forward(self, x):
        q, k, v = (
            t.unflatten(1, (self.heads, -1)).flatten(3) for t in (self.to_q(x), *self.to_kv(x).chunk(2, 1))
        )
        context = torch.softmax(k, -1) @ v.mT
        return self.to_out(
            F.gelu(context.mT @ torch.softmax(q, 2)).flatten(1, 2).view(len(x), -1, *x.shape[2:])
        )


class CAM_Module(nn.Module):
    """DANet's attention between channels."""

    def __init__(self, in_dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        rows = x.flatten(2)
        return x + self.gamma * (torch.softmax(rows @ rows.mT, -1) @ rows).view_as(x)
