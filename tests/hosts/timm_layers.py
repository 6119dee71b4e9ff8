"""timm's non-local layer: scaled scores, a batch norm in the place of gamma."""

import torch
from torch import nn


class NonLocalAttn(nn.Module):
    def __init__(self, in_channels, use_scale=True):
        super().__init__()
        narrow = max(8, in_channels // 8)
        self.scale = in_channels**-0.5 if use_scale else 1.0
        self.t, self.p, self.g = (nn.Conv2d(in_channels, narrow, 1) for _ in range(3))
        self.z = nn.Conv2d(narrow, in_channels, 1)
        self.norm = nn.BatchNorm2d(in_channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x):
        t, p, g = (conv(x).flatten(2) for conv in (self.t, self.p, self.g))
        attention = torch.softmax(torch.bmm(t.transpose(1, 2), p) * self.scale, dim=2)
        y = torch.bmm(attention, g.transpose(1, 2)).transpose(1, 2).reshape(len(x), -1, *x.shape[2:])
        return self.norm(self.z(y)) + x
