"""fastai's two layers: one for any number of axes, which returns a view, and BigGAN's."""

import torch
from torch import nn

from hosts.formulas import pooled_attention
from hosts.studiogan import sn


class SelfAttention(nn.Module):
    def __init__(self, n_channels):
        super().__init__()
        self.query, self.key, self.value = (
            sn(nn.Conv1d(n_channels, width, 1, bias=False), 1e-12)
            for width in (n_channels // 8, n_channels // 8, n_channels)
        )
        self.gamma = nn.Parameter(torch.tensor([0.0]))

    def forward(self, x):
        size = x.size()
        x = x.view(*size[:2], -1)
        f, g, h = self.query(x), self.key(x), self.value(x)
        o = self.gamma * torch.bmm(h, torch.softmax(f.transpose(1, 2) @ g, dim=1)) + x
        return o.view(*size).contiguous()


class PooledSelfAttention2d(nn.Module):
    def __init__(self, n_channels):
        super().__init__()
        half, eighth = n_channels // 2, n_channels // 8
        self.theta, self.phi, self.g, self.o = (
            sn(nn.Conv2d(*widths, 1, bias=False), 1e-12)
            for widths in ((n_channels, eighth), (n_channels, eighth), (n_channels, half), (half, n_channels))
        )
        self.gamma = nn.Parameter(torch.tensor([0.0]))

    def forward(self, x):
        return pooled_attention(x, self.theta, self.phi, self.g, self.o, self.gamma)
