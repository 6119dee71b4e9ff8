"""SAGAN self-attention as modules: the layer of the released code, and the one of the paper's text."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sagan_kernels import reference
from sagan_kernels.ops import sagan_attention


class SelfAttention2d(nn.Module):
    """Self-attention over the positions of a feature map: y = x + gamma · out(A value(x)).

    A = softmax(query(x) key(x)ᵀ) is the attention map, (B, L, S): L = H·W query positions, S = ⌊H/2⌋·⌊W/2⌋ key
    positions after a 2×2 max-pool. It is never stored. Starts as the identity, since gamma = 0.

    Shapes: x (B, C, H, W) -> y (B, C, H, W). C divisible by 8, H and W at least 2.

    Gradients: first and second order, so R1 and WGAN-GP work.

    Reference: Zhang et al., "Self-Attention Generative Adversarial Networks", ICML 2019, arXiv:1805.08318. Widths
    (C/8, C/8, C/2), pooling and the absence of biases follow the authors' released code, as BigGAN does, not the
    paper's text, for which there is `PaperSelfAttention2d`; `bias=True` gives all four convolutions one.

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

    kernel_layer_name = "SaganSelfAttention2d"  # what Hugging Face's `kernels.kernelize` looks for

    def __init__(self, channels: int, *, bias: bool = False) -> None:
        super().__init__()
        _check_channels(self, channels)
        self.query = nn.Conv2d(channels, channels // 8, 1, bias=bias)
        self.key = nn.Conv2d(channels, channels // 8, 1, bias=bias)
        self.value = nn.Conv2d(channels, channels // 2, 1, bias=bias)
        self.out = nn.Conv2d(channels // 2, channels, 1, bias=bias)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value, out = self.query, self.key, self.value, self.out  # a submodule is slow to look up
        return sagan_attention(
            x, _weight(query), _weight(key), _weight(value), _weight(out), self.gamma,
            query_bias=query.bias, key_bias=key.bias, value_bias=value.bias, out_bias=out.bias,
        )  # fmt: skip

    @torch.no_grad()
    def attention_map(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Where chosen query positions look: rows of the attention map, without the others.

        Args:
            x: (B, C, H, W).
            positions: (P,) integers, row-major indices y · W + x of the query positions; None for all H·W, which
                takes O(L S) memory.

        Returns:
            (B, P, ⌊H/2⌋, ⌊W/2⌋), each row summing to 1. Without gradients.

        Raises:
            ValueError: a position lies outside the feature map.
        """
        return _attention_map(self.query(x), F.max_pool2d(self.key(x), 2), positions)


class PaperSelfAttention2d(nn.Module):
    """Self-attention as the paper's text has it: y = x + gamma · A value(x), no pooling, no out projection.

    A = softmax(query(x) key(x)ᵀ) is (B, L, L), L = H·W; projections C -> C/8, C/8, C with biases. This is the layer
    of the widely copied PyTorch versions (query_conv, key_conv, value_conv, gamma). Starts as the identity.

    Shapes: x (B, C, H, W) -> y (B, C, H, W). C divisible by 8.

    Gradients: first and second order.

    Reference: arXiv:1805.08318, section 3, without the final 1×1 convolution v, which fuses with the value
    projection when the width is not reduced in between.

    Raises:
        ValueError: channels is not divisible by 8.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        _check_channels(self, channels)
        self.query = nn.Conv2d(channels, channels // 8, 1)
        self.key = nn.Conv2d(channels, channels // 8, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.query, self.key, self.value
        return sagan_attention(
            x, _weight(query), _weight(key), _weight(value), None, self.gamma,
            query_bias=query.bias, key_bias=key.bias, value_bias=value.bias, pool=False,
        )  # fmt: skip

    @torch.no_grad()
    def attention_map(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Rows of the attention map, as `SelfAttention2d.attention_map`; (B, P, H, W), without gradients."""
        return _attention_map(self.query(x), self.key(x), positions)


def _check_channels(module: nn.Module, channels: int) -> None:
    if channels < 8 or channels % 8:
        raise ValueError(
            f"{type(module).__name__}: channels must be a positive multiple of 8, got {channels}"
        )


def _weight(conv: nn.Conv2d) -> Tensor:
    """The weight of a convolution that is not called itself.

    The older half of torch.nn.utils (spectral_norm, weight_norm, prune) computes weights in hooks before a call.
    """
    if conv._forward_pre_hooks:
        for hook in conv._forward_pre_hooks.values():
            if type(hook).__module__.startswith("torch.nn.utils"):
                hook(conv, ())
    return conv.weight


def _attention_map(query: Tensor, key: Tensor, positions: Tensor | None) -> Tensor:
    rows = reference.positions(query)  # (B, L, E)
    if positions is not None:
        L = rows.shape[1]
        if (
            positions.ndim != 1
            or positions.is_floating_point()
            or positions.dtype == torch.bool
            or not ((positions >= 0) & (positions < L)).all()
        ):
            raise ValueError(
                f"attention_map: positions must be 1-D integers from 0 to {L - 1}, got {positions.tolist()};"
                " position (y, x) is y · W + x"
            )
        rows = rows[:, positions]
    scores = rows @ reference.positions(key).mT
    return torch.softmax(scores, dim=-1).unflatten(2, key.shape[2:])
