"""torchgan's attention, whose softmax runs over the queries, and its wrapper for spectral norm."""

import torch
from torch import nn

from hosts.heykeetae import unit


class SelfAttention2d(nn.Module):
    def __init__(self, input_dims, output_dims=None, return_attn=False):
        super().__init__()
        output_dims = input_dims // 8 if output_dims is None else output_dims
        self.query, self.key = nn.Conv2d(input_dims, output_dims, 1), nn.Conv2d(input_dims, output_dims, 1)
        self.value = nn.Conv2d(input_dims, input_dims, 1)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.return_attn = return_attn

    def forward(self, x):
        q, k, v = (conv(x).flatten(2) for conv in (self.query, self.key, self.value))
        attention = torch.softmax(k.transpose(1, 2) @ q, dim=-1)
        out = self.gamma * (v @ attention).view(x.shape) + x
        return (out, attention) if self.return_attn else out


class SpectralNorm2d(nn.Module):
    def __init__(self, module, name="weight", power_iterations=1):
        super().__init__()
        self.module, self.name, self.power_iterations = module, name, power_iterations
        weight = module._parameters.pop(name)
        self.u = nn.Parameter(unit(torch.randn(len(weight))), requires_grad=False)
        self.v = nn.Parameter(unit(torch.randn(weight[0].numel())), requires_grad=False)
        self.w_bar = nn.Parameter(weight.data)

    def forward(self, *args):
        matrix = self.w_bar.view(len(self.w_bar), -1)
        for _ in range(self.power_iterations):
            self.v.data = unit(torch.mv(matrix.t(), self.u)).detach()
            self.u.data = unit(torch.mv(matrix, self.v)).detach()
        setattr(self.module, self.name, self.w_bar / self.u.dot(matrix.mv(self.v)))
        return self.module.forward(*args)
