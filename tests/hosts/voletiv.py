"""voletiv's SAGAN at 128 px: biases in the attention, and a shortcut in the last block that nothing reads."""

import torch
import torch.nn.functional as F
from torch import nn

from hosts.formulas import enlarged, joined_class_norm, pooled_attention
from hosts.studiogan import sn


def conv(*args, **kwargs):
    return sn(nn.Conv2d(*args, **kwargs), 1e-12)


class Self_Attn(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.snconv1x1_theta, self.snconv1x1_phi = (conv(channels, channels // 8, 1) for _ in range(2))
        self.snconv1x1_g, self.snconv1x1_attn = (
            conv(channels, channels // 2, 1),
            conv(channels // 2, channels, 1),
        )
        self.sigma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        parts = self.snconv1x1_theta, self.snconv1x1_phi, self.snconv1x1_g, self.snconv1x1_attn
        return pooled_attention(x, *parts, self.sigma)


class ConditionalBatchNorm2d(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, momentum=0.001, affine=False)
        self.embed = nn.Embedding(classes, 2 * channels)
        self.embed.weight.data[:, :channels] = 1

    def forward(self, x, label):
        return joined_class_norm(self, x, label)


class GenBlock(nn.Module):
    def __init__(self, width_in, width, classes):
        super().__init__()
        self.cond_bn1, self.cond_bn2 = (ConditionalBatchNorm2d(w, classes) for w in (width_in, width))
        self.snconv2d1, self.snconv2d2 = conv(width_in, width, 3, padding=1), conv(width, width, 3, padding=1)
        self.snconv2d0 = conv(width_in, width, 1)

    def forward(self, x, label):
        h = self.snconv2d1(enlarged(F.relu(self.cond_bn1(x, label), inplace=True)))
        return self.snconv2d2(torch.relu(self.cond_bn2(h, label))) + self.snconv2d0(enlarged(x))


class Generator(nn.Module):
    def __init__(self, conv_dim=2, classes=3, z=6):
        super().__init__()
        widths = [conv_dim * w for w in (16, 16, 8, 4, 2, 1)]
        self.snlinear0 = sn(nn.Linear(z, widths[0] * 16), 1e-12)
        for i in range(5):
            setattr(self, f"block{i + 1}", GenBlock(widths[i], widths[i + 1], classes))
        self.self_attn = Self_Attn(widths[3])
        self.bn = nn.BatchNorm2d(widths[-1], momentum=0.0001)
        self.snconv2d1 = conv(widths[-1], 3, 3, padding=1)

    def forward(self, z, label):
        h = self.snlinear0(z).view(len(z), -1, 4, 4)
        for i in range(1, 6):
            h = getattr(self, f"block{i}")(h, label)
            h = self.self_attn(h) if i == 3 else h
        return torch.tanh(self.snconv2d1(torch.relu(self.bn(h))))


class DiscBlock(nn.Module):
    def __init__(self, width_in, width, first=False):
        super().__init__()
        self.first, self.relu = first, nn.ReLU(inplace=True)
        self.snconv2d1, self.snconv2d2 = conv(width_in, width, 3, padding=1), conv(width, width, 3, padding=1)
        self.snconv2d0 = conv(width_in, width, 1)

    def forward(self, x, downsample=True):
        x0 = x
        h = x if self.first else self.relu(x)  # in place: x0 changes with it
        h = self.snconv2d2(self.relu(self.snconv2d1(h)))
        return F.avg_pool2d(h, 2) + F.avg_pool2d(self.snconv2d0(x0), 2) if downsample else h + x0


class Discriminator(nn.Module):
    def __init__(self, conv_dim=4, classes=3):
        super().__init__()
        widths = [conv_dim * w for w in (1, 2, 4, 8, 16, 16)]
        self.opt_block1 = DiscBlock(3, widths[0], first=True)
        for i in range(1, 6):
            setattr(self, f"block{i}", DiscBlock(widths[i - 1], widths[i]))
        self.self_attn = Self_Attn(widths[1])
        self.snlinear1 = sn(nn.Linear(widths[-1], 1), 1e-12)
        self.sn_embedding1 = sn(nn.Embedding(classes, widths[-1]), 1e-12)

    def forward(self, x, label):
        x = self.self_attn(self.block1(self.opt_block1(x)))
        x = self.block4(self.block3(self.block2(x)))
        h = torch.relu(self.block5(x, downsample=False)).sum((2, 3))
        return self.snlinear1(h).squeeze(1) + (self.sn_embedding1(label) * h).sum(1)
