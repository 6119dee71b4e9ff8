"""What the stand-ins have in common: attention and a state that matters everywhere."""

import torch
import torch.nn.functional as F
from torch import nn


def pooled_attention(x, query, key, value, out, gain):
    """The released code's attention as other projects write it: every product explicit."""
    B, _, H, W = x.shape
    q = query(x).view(B, -1, H * W)
    k = F.max_pool2d(key(x), 2).view(B, -1, H * W // 4)
    v = F.max_pool2d(value(x), 2).view(B, -1, H * W // 4)
    A = torch.softmax(torch.bmm(q.transpose(1, 2), k), dim=-1)
    return x + gain * out(torch.bmm(v, A.transpose(1, 2)).view(B, -1, H, W))


def joined_class_norm(module, x, label):
    """`bn` without affine parameters, then [gain | bias] from `embed`."""
    gain, bias = module.embed(label).chunk(2, dim=1)
    return gain[:, :, None, None] * module.bn(x) + bias[:, :, None, None]


def enlarged(x, mode="nearest"):
    return F.interpolate(x, scale_factor=2, mode=mode)


@torch.no_grad()
def lived_in(network, *inputs, steps=2):
    """Every parameter and statistic away from its start, u and v on their way: neither fresh nor converged."""
    network.double().train()
    for name, parameter in network.named_parameters():
        if name.endswith(("gamma", "sigma")):
            parameter.fill_(0.7)
        elif parameter.ndim == 1 or "embed" in name or "bn" in name or "gain" in name:
            parameter.add_(torch.randn_like(parameter) * 0.3)
        if parameter.ndim > 1 and min(parameter.shape[:2]) > 1 and "embed" not in name:
            nn.init.orthogonal_(parameter, 1.3)
            parameter.add_(torch.randn_like(parameter) * 0.05)
    for _ in range(steps):
        network(*inputs)
    for name, buffer in network.named_buffers():
        if name.endswith(("var", "_var")):
            buffer.mul_(torch.rand_like(buffer) + 0.5)
        elif name.endswith("mean"):
            buffer.add_(torch.randn_like(buffer) * 0.2)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.mul_(1.1)  # an optimizer step after the last forward: σ differs, u and v stay
    return network.eval()
