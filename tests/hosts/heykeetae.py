"""heykeetae's SAGAN: attention with its map beside it, and spectral norm by a wrapper that never rests."""

import torch
from torch import nn


def unit(v):
    return v / (v.norm() + 1e-12)


class SpectralNorm(nn.Module):
    """Both bugs of the original: vectors move in eval mode, and one graph's vectors are replaced under it."""

    def __init__(self, module, name="weight", power_iterations=1):
        super().__init__()
        self.module, self.name, self.power_iterations = module, name, power_iterations
        weight = module._parameters.pop(name)
        rows, columns = weight.flatten(1).shape
        module.register_parameter(f"{name}_u", nn.Parameter(unit(torch.randn(rows)), requires_grad=False))
        module.register_parameter(f"{name}_v", nn.Parameter(unit(torch.randn(columns)), requires_grad=False))
        module.register_parameter(f"{name}_bar", nn.Parameter(weight.data))

    def forward(self, *args):
        u, v, weight = (getattr(self.module, f"{self.name}_{end}") for end in ("u", "v", "bar"))
        matrix = weight.view(len(weight), -1)
        for _ in range(self.power_iterations):
            v.data = unit(torch.mv(matrix.t().data, u.data))
            u.data = unit(torch.mv(matrix.data, v.data))
        sigma = u.dot(matrix.mv(v))
        setattr(self.module, self.name, weight / sigma.expand_as(weight))
        return self.module.forward(*args)


class Self_Attn(nn.Module):
    def __init__(self, in_dim, activation="relu"):
        super().__init__()
        self.query_conv = nn.Conv2d(in_dim, in_dim // 8, 1)
        self.key_conv = nn.Conv2d(in_dim, in_dim // 8, 1)
        self.value_conv = nn.Conv2d(in_dim, in_dim, 1)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x):
        q, k, v = (conv(x).flatten(2) for conv in (self.query_conv, self.key_conv, self.value_conv))
        attention = self.softmax(torch.bmm(q.transpose(1, 2), k))
        out = torch.bmm(v, attention.transpose(1, 2)).view(x.shape)
        return self.gamma * out + x, attention


class Generator(nn.Module):
    def __init__(self, z=6, width=16):
        super().__init__()
        self.l1 = nn.Sequential(
            SpectralNorm(nn.ConvTranspose2d(z, 2 * width, 4)), nn.BatchNorm2d(2 * width), nn.ReLU()
        )
        self.l2 = nn.Sequential(
            SpectralNorm(nn.ConvTranspose2d(2 * width, width, 4, 2, 1)), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.attn1 = Self_Attn(width)
        self.last = nn.Sequential(nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Tanh())

    def forward(self, z):
        out, p1 = self.attn1(self.l2(self.l1(z.view(*z.shape, 1, 1))))
        return self.last(out), p1


class Discriminator(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.l1 = nn.Sequential(SpectralNorm(nn.Conv2d(3, width, 4, 2, 1)), nn.LeakyReLU(0.1))
        self.attn1 = Self_Attn(width)
        self.last = nn.Sequential(nn.Conv2d(width, 1, 8))

    def forward(self, x):
        out, p1 = self.attn1(self.l1(x))
        return self.last(out).squeeze(), p1
