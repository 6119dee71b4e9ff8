"""The networks as other code bases run them: step by step, nothing fused, spectral norm worked out at every forward.

Written from the published formulas and run on our own modules' parameters, so that every contender of a benchmark
computes the same images and logits.
"""

import torch
import torch.nn.functional as F


def generator(model, z, label):
    """SAGAN's generator in eval mode: normalize, then gain and bias; enlarge, then convolve, on both paths."""
    x = model.linear(z).view(len(z), -1, 4, 4)
    for block in model.blocks:
        h = F.relu(_conditional_norm(block.norm1, x, label))
        h = block.conv1(F.interpolate(h, scale_factor=2))
        h = block.conv2(F.relu(_conditional_norm(block.norm2, h, label)))
        x = h + block.shortcut(F.interpolate(x, scale_factor=2))
        if str(x.shape[3]) in model.attention:
            x = attention(model.attention[str(x.shape[3])], x)
    return torch.tanh(model.to_image(F.relu(model.norm(x))))


def discriminator(model, x, label):
    """SAGAN's discriminator: convolve, then pool, on both paths."""
    for i, block in enumerate(model.blocks):
        h = block.conv2(F.relu(block.conv1(x if block.first else F.relu(x))))
        x = x if block.shortcut is None else block.shortcut(x)
        if block.downsample:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        x = h + x
        if i in model._attention_after:
            x = attention(model.attention[model._attention_after[i]], x)
    features = F.relu(x).sum((2, 3))
    return model.linear(features).squeeze(1) + (model.embedding(label) * features).sum(1)


def _conditional_norm(norm, x, label):
    gain, bias = (F.embedding(label, t)[:, :, None, None] for t in (norm.gain, norm.bias))
    x = F.batch_norm(x, norm.running_mean, norm.running_var, training=norm.training, eps=norm.eps)
    return x * (1 + gain) + bias


def attention(layer, x):
    """The attention layer of the released code, as BigGAN writes it."""
    B, C, H, W = x.shape
    theta = layer.query(x).view(B, C // 8, H * W)
    phi = F.max_pool2d(layer.key(x), 2).view(B, C // 8, H * W // 4)
    g = F.max_pool2d(layer.value(x), 2).view(B, C // 2, H * W // 4)
    beta = F.softmax(torch.bmm(theta.transpose(1, 2), phi), -1)
    o = layer.out(torch.bmm(g, beta.transpose(1, 2)).view(B, C // 2, H, W))
    return layer.gamma * o + x


def paper_attention(layer, x):
    """The attention layer of the paper's text, as most PyTorch copies write it."""
    B, C, H, W = x.shape
    query = layer.query(x).view(B, -1, H * W).permute(0, 2, 1)
    key = layer.key(x).view(B, -1, H * W)
    value = layer.value(x).view(B, -1, H * W)
    attention = F.softmax(torch.bmm(query, key), -1)
    return layer.gamma * torch.bmm(value, attention.permute(0, 2, 1)).view(B, C, H, W) + x
