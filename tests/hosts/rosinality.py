"""rosinality's attention: 1-D convolutions, `key` and `query` crossed, spectral norm by a hook of its own."""

import torch
from torch import nn


class SpectralNorm:
    """No epsilon, no v, and u moves in eval mode too."""

    def __init__(self, name):
        self.name = name

    def compute_weight(self, module):
        weight, u = getattr(module, f"{self.name}_orig"), getattr(module, f"{self.name}_u")
        matrix = weight.flatten(1)
        with torch.no_grad():
            v = matrix.t() @ u
            v = v / v.norm()
            u = matrix @ v
            u = u / u.norm()
        return weight / (u @ matrix @ v), u

    def __call__(self, module, inputs):
        weight, u = self.compute_weight(module)
        setattr(module, self.name, weight)
        setattr(module, f"{self.name}_u", u)


def spectral_norm(module, name="weight"):
    weight = module._parameters.pop(name)
    module.register_parameter(f"{name}_orig", weight)
    module.register_buffer(name, weight.data)
    module.register_buffer(f"{name}_u", torch.randn(len(weight)))
    module.register_forward_pre_hook(SpectralNorm(name))
    return module


class SelfAttention(nn.Module):
    def __init__(self, in_channel):
        super().__init__()
        self.query = spectral_norm(nn.Conv1d(in_channel, in_channel // 8, 1))
        self.key = spectral_norm(nn.Conv1d(in_channel, in_channel // 8, 1))
        self.value = spectral_norm(nn.Conv1d(in_channel, in_channel, 1))
        self.gamma = nn.Parameter(torch.tensor(0.0))

    def forward(self, input):
        rows = input.flatten(2)
        attention = torch.softmax(self.query(rows).transpose(1, 2) @ self.key(rows), 1)
        return self.gamma * (self.value(rows) @ attention).view(input.shape) + input
