"""SAGAN self-attention as a module."""

import torch
from torch import Tensor, nn

from sagan_kernels.ops import sagan_attention


class SelfAttention2d(nn.Module):
    """Self-attention over the positions of a feature map: y = x + gamma · out(A value(x)).

    A = softmax(query(x) key(x)ᵀ) is the attention map, (B, L, S): L = H·W query positions, S = ⌊H/2⌋·⌊W/2⌋ key
    positions after a 2×2 max-pool. Starts as the identity, since gamma = 0.

    Shapes: x (B, C, H, W) -> y (B, C, H, W). C divisible by 8, H and W at least 2.

    Reference: Zhang et al., "Self-Attention Generative Adversarial Networks", ICML 2019, arXiv:1805.08318. Widths
    (C/8, C/8, C/2), pooling and the absence of biases follow the authors' released code, as BigGAN does, not the
    paper's text.

    ========  ===========  ==============  =============
    here      paper        BigGAN-PyTorch  StudioGAN
    ========  ===========  ==============  =============
    query     g            theta           conv1x1_theta
    key       f            phi             conv1x1_phi
    value     h            g               conv1x1_g
    out       v            o               conv1x1_attn
    gamma     γ            gamma           sigma
    ========  ===========  ==============  =============

    Raises:
        ValueError: channels is not divisible by 8.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 8 or channels % 8:
            raise ValueError(f"SelfAttention2d: channels must be a positive multiple of 8, got {channels}")
        self.query = nn.Conv2d(channels, channels // 8, 1, bias=False)
        self.key = nn.Conv2d(channels, channels // 8, 1, bias=False)
        self.value = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.out = nn.Conv2d(channels // 2, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return sagan_attention(
            x, self.query.weight, self.key.weight, self.value.weight, self.out.weight, self.gamma
        )
