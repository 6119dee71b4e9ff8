"""pretrained-BigGAN's attention: BigGAN's with names of its own."""

import torch
from torch import nn

from hosts.formulas import pooled_attention
from hosts.studiogan import sn


class SelfAttn(nn.Module):
    def __init__(self, in_channels, eps=1e-4):
        super().__init__()
        half, eighth = in_channels // 2, in_channels // 8
        self.snconv1x1_theta = sn(nn.Conv2d(in_channels, eighth, 1, bias=False), eps)
        self.snconv1x1_phi = sn(nn.Conv2d(in_channels, eighth, 1, bias=False), eps)
        self.snconv1x1_g = sn(nn.Conv2d(in_channels, half, 1, bias=False), eps)
        self.snconv1x1_o_conv = sn(nn.Conv2d(half, in_channels, 1, bias=False), eps)
        self.maxpool, self.softmax = nn.MaxPool2d(2, 2), nn.Softmax(dim=-1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        parts = self.snconv1x1_theta, self.snconv1x1_phi, self.snconv1x1_g, self.snconv1x1_o_conv
        return pooled_attention(x, *parts, self.gamma)
