"""mimicry's SAGAN: bilinear enlargement, discriminator blocks as thin as their input, in-place ReLUs."""

import torch
import torch.nn.functional as F
from torch import nn

from hosts.formulas import enlarged, joined_class_norm, pooled_attention
from hosts.studiogan import sn

GENERATOR = {
    32: ([1, 1, 1, 1], 1),
    128: ([16, 16, 8, 4, 2, 1], 2),
}  # widths, index of the block before attention
DISCRIMINATOR = {32: ([1, 1, 1, 1], 1), 128: ([1, 2, 4, 8, 16, 16], 1)}


def conv(*args, **kwargs):
    return sn(nn.Conv2d(*args, **kwargs), 1e-12)


class SelfAttention(nn.Module):
    def __init__(self, num_feat):
        super().__init__()
        self.theta, self.phi = (conv(num_feat, num_feat // 8, 1, bias=False) for _ in range(2))
        self.g, self.o = (
            conv(num_feat, num_feat // 2, 1, bias=False),
            conv(num_feat // 2, num_feat, 1, bias=False),
        )
        self.gamma = nn.Parameter(torch.tensor(0.0))

    def forward(self, x):
        return pooled_attention(x, self.theta, self.phi, self.g, self.o, self.gamma)


class ConditionalBatchNorm2d(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, affine=False)
        self.embed = nn.Embedding(classes, 2 * channels)
        self.embed.weight.data[:, :channels] = 1

    def forward(self, x, label):
        return joined_class_norm(self, x, label)


class GBlock(nn.Module):
    def __init__(self, width_in, width, classes):
        super().__init__()
        self.c1, self.c2 = conv(width_in, width, 3, padding=1), conv(width, width, 3, padding=1)
        self.b1, self.b2 = ConditionalBatchNorm2d(width_in, classes), ConditionalBatchNorm2d(width, classes)
        self.activation = nn.ReLU(True)
        self.c_sc = conv(width_in, width, 1)

    def forward(self, x, y):
        h = self.c1(enlarged(self.activation(self.b1(x, y)), "bilinear"))
        return self.c2(self.activation(self.b2(h, y))) + self.c_sc(enlarged(x, "bilinear"))


class Generator(nn.Module):
    def __init__(self, resolution=32, ngf=16, classes=3, z=6):
        super().__init__()
        factors, self.attended = GENERATOR[resolution]
        widths = [ngf * f // max(factors) for f in factors]
        self.l1 = sn(nn.Linear(z, widths[0] * 16), 1e-12)
        self.count = len(widths) - 1
        for i in range(self.count):
            setattr(self, f"block{i + 2}", GBlock(widths[i], widths[i + 1], classes))
        setattr(self, f"b{self.count + 2}", nn.BatchNorm2d(widths[-1]))
        setattr(self, f"c{self.count + 2}", conv(widths[-1], 3, 3, padding=1))
        self.attn_block = SelfAttention(widths[self.attended + 1])

    def forward(self, z, y):
        h = self.l1(z).view(len(z), -1, 4, 4)
        for i in range(self.count):
            h = getattr(self, f"block{i + 2}")(h, y)
            h = self.attn_block(h) if i == self.attended else h
        h = torch.relu(getattr(self, f"b{self.count + 2}")(h))
        return torch.tanh(getattr(self, f"c{self.count + 2}")(h))


class DBlock(nn.Module):
    def __init__(self, width_in, width, first, downsample):
        super().__init__()
        hidden = width if first else width_in
        self.first, self.downsample, self.activation = first, downsample, nn.ReLU(True)
        self.c1, self.c2 = conv(width_in, hidden, 3, padding=1), conv(hidden, width, 3, padding=1)
        if downsample or width_in != width:
            self.c_sc = conv(width_in, width, 1)

    def forward(self, x):
        h = x if self.first else self.activation(x)  # in place: the shortcut sees it
        h = self.c2(self.activation(self.c1(h)))
        x = self.c_sc(x) if hasattr(self, "c_sc") else x
        return F.avg_pool2d(h, 2) + F.avg_pool2d(x, 2) if self.downsample else h + x


class Discriminator(nn.Module):
    def __init__(self, resolution=32, ndf=16, classes=3):
        super().__init__()
        factors, self.attended = DISCRIMINATOR[resolution]
        widths = [ndf * f // max(factors) for f in factors]
        halvings = 2 if resolution == 32 else len(widths) - 1
        self.count = len(widths)
        for i in range(self.count):
            setattr(self, f"block{i + 1}", DBlock([3, *widths][i], widths[i], i == 0, i < halvings))
        setattr(self, f"l{self.count + 1}", sn(nn.Linear(widths[-1], 1), 1e-12))
        self.l_y = sn(nn.Embedding(classes, widths[-1]), 1e-12)
        self.attn_block = SelfAttention(widths[self.attended])

    def forward(self, x, y):
        for i in range(self.count):
            x = getattr(self, f"block{i + 1}")(x)
            x = self.attn_block(x) if i == self.attended else x
        h = torch.relu(x).sum((2, 3))
        return getattr(self, f"l{self.count + 1}")(h).squeeze(1) + (self.l_y(y) * h).sum(1)
