"""The inference form of a generator: the same function by exact algebra, with less to do."""

import copy
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sagan_kernels.models.sagan import Generator, PlainUpBlock, UpBlock
from sagan_kernels.nn import ConditionalBatchNorm2d, SelfAttention2d, fold_spectral_norm
from sagan_kernels.ops import attention, upsample_kernel
from sagan_kernels.reference import positions


def inference_generator(generator: Generator, *, dtype: torch.dtype = torch.float32) -> "InferenceGenerator":
    """A copy of `generator` for sampling only; the original is left as it is.

    What changes, all of it exact: spectral norm is baked into the weights; eval-mode conditional batch norm is one
    affine map looked up by class, with the bias of the convolution before it; the last batch norm is folded into the
    convolutions before it; enlargement and 3×3 convolution are one 4×4 transposed convolution whose kernel is made
    once; 1×1 shortcuts run before the enlargement; everything is channels_last.

    Args:
        generator: trained; its stored batch-norm statistics are used, so fit them first (`standing_statistics`).
        dtype: float32, equal to the eval-mode generator to 1e-5; or bfloat16, to about 1e-2 on the scale of [-1, 1].

    Returns:
        A module called as (z, label) that gives float32 images, and refuses to train.
    """
    folded = copy.deepcopy(generator)
    fold_spectral_norm(folded)
    return InferenceGenerator(folded.eval(), dtype)


class InferenceGenerator(nn.Module):
    """Made by `inference_generator`. z (B, z_dim), label (B,) or None -> images (B, C, H, W) float32."""

    seed_weight: Tensor
    seed_bias: Tensor

    def __init__(self, generator: Generator, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = generator.config
        self.resolution, self.num_classes, self.z_dim = (
            generator.resolution, generator.num_classes, generator.z_dim,
        )  # fmt: skip
        linear = generator.linear
        # rows in (4, 4, C) order: the view as an image is channels_last at no cost
        order = torch.arange(linear.out_features, device=linear.bias.device).view(-1, 16).T.flatten()
        self.register_buffer("seed_weight", linear.weight.detach()[order].to(dtype))
        self.register_buffer("seed_bias", linear.bias.detach()[order].to(dtype))

        last_scale, last_shift = _plain_affine(generator.norm)
        folds = str(generator.resolution) not in generator.attention  # else attention comes between
        blocks: list[nn.Module] = []
        for i, block in enumerate(generator.blocks):
            after = (last_scale, last_shift) if folds and i == len(generator.blocks) - 1 else None
            if isinstance(block, UpBlock):
                blocks.append(_UpBlock(block, after, dtype))
            else:
                blocks.append(_PlainUpBlock(cast(PlainUpBlock, block), after, dtype))
        self.blocks = nn.ModuleList(blocks)
        self.attention = nn.ModuleDict({k: _Attention(m, dtype) for k, m in generator.attention.items()})  # type: ignore[arg-type]
        self.last: _Affine | None = None if folds else _Affine(last_scale[None], last_shift[None], dtype)
        self.to_image = _Convolution(generator.to_image.weight, generator.to_image.bias, dtype)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        if self.num_classes and label is None:
            raise ValueError(f"Generator: a label is needed, one of {self.num_classes} classes, got None")
        label = label if self.num_classes else None
        x = F.linear(z.to(self.seed_weight.dtype), self.seed_weight, self.seed_bias)
        x = x.view(len(z), 4, 4, self.seed_bias.numel() // 16).permute(0, 3, 1, 2)
        for block in self.blocks:
            x = block(x, label)
            side = str(x.shape[3])
            if side in self.attention:
                x = self.attention[side](x)
        x = x.relu_() if self.last is None else self.last(x, None).relu_()
        return torch.tanh(self.to_image(x).float())

    def train(self, mode: bool = True) -> "InferenceGenerator":
        if mode:
            raise NotImplementedError(
                "InferenceGenerator: must stay in eval mode, got train(); train the generator it was made from"
            )
        return super().train(mode)


class _Affine(nn.Module):
    """y = scale[label] · x + shift[label]; row 0 when label is None."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("scale", scale.detach().to(dtype))
        self.register_buffer("shift", shift.detach().to(dtype))

    def forward(self, x: Tensor, label: Tensor | None) -> Tensor:
        scale, shift = self.scale, self.shift
        if label is not None:
            scale, shift = F.embedding(label, scale), F.embedding(label, shift)
        return torch.addcmul(shift[..., None, None], x, scale[..., None, None])


class _Convolution(nn.Module):
    """A convolution whose weight oneDNN has laid out once, where the CPU and this PyTorch can.

    F.conv2d lays the weight out anew at every call, which for wide layers and few images costs more than the
    convolution. The operators that keep the layout are those torch.compile's CPU back end calls; where they are
    missing or refuse, F.conv2d runs.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        weight = weight.detach().to(dtype)
        self.padding = weight.shape[2] // 2
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype))
        self._laid_out: Tensor | None = (
            None  # no buffer: an opaque oneDNN tensor, made from weight at first use
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return self._plain(x)
        if self._laid_out is None:
            self._laid_out = self._lay_out(x)
        return self._plain(x) if self._laid_out.layout is torch.strided else self._kept(x, self._laid_out)

    def _lay_out(self, x: Tensor) -> Tensor:
        """The weight as oneDNN wants it for inputs such as x; the plain weight where that cannot be had."""
        try:
            return self._reorder(x)
        except (AttributeError, RuntimeError):
            return self.weight

    def _plain(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=self.padding)

    def _reorder(self, x: Tensor) -> Tensor:
        p = [self.padding] * 2
        return torch.ops.mkldnn._reorder_convolution_weight(self.weight, p, [1, 1], [1, 1], 1, list(x.shape))

    def _kept(self, x: Tensor, weight: Tensor) -> Tensor:
        p = [self.padding] * 2
        return torch.ops.mkldnn._convolution_pointwise(
            x, weight, self.bias, p, [1, 1], [1, 1], 1, "none", [], ""
        )

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._laid_out = None  # made from a weight that is about to change, as when one is loaded
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._laid_out = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_laid_out": None}


class _UpConvolution(_Convolution):
    """A 4×4 transposed convolution of stride 2, weight (C, K, 4, 4): twice the size."""

    def _plain(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1)

    def _reorder(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_convolution_transpose_weight(
            self.weight, [1, 1], [0, 0], [2, 2], [1, 1], 1, list(x.shape)
        )

    def _kept(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_transpose_pointwise(
            x, weight, self.bias, [1, 1], [0, 0], [2, 2], [1, 1], 1, "none", [], ""
        )


class _UpBlock(nn.Module):
    """`UpBlock`, optionally followed by an affine map that its convolutions take in."""

    def __init__(self, block: UpBlock, after: tuple[Tensor, Tensor] | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.upsample = block.upsample
        self.norm1 = _Affine(*_tables(block.norm1), dtype)
        self.conv1 = (
            _UpConvolution(upsample_kernel(block.conv1.weight), None, dtype)
            if block.upsample == "nearest"
            else _Convolution(block.conv1.weight, None, dtype)
        )
        self.norm2 = _Affine(*_tables(block.norm2, block.conv1.bias), dtype)
        weight, shortcut = block.conv2.weight, block.shortcut.weight
        bias = block.conv2.bias + block.shortcut.bias  # type: ignore[operator]
        if after is not None:
            scale, shift = after
            weight, shortcut = (t * scale[:, None, None, None] for t in (weight, shortcut))
            bias = bias * scale + shift
        self.conv2 = _Convolution(weight, bias, dtype)
        self.shortcut = _Convolution(shortcut, None, dtype)

    def forward(self, x: Tensor, label: Tensor | None) -> Tensor:
        h = self.norm1(x, label).relu_()
        if self.upsample != "nearest":
            h = F.interpolate(h, scale_factor=2, mode=self.upsample)
        h = self.norm2(self.conv1(h), label).relu_()
        h = self.conv2(h)
        return h.add_(F.interpolate(self.shortcut(x), scale_factor=2, mode=self.upsample))


class _PlainUpBlock(nn.Module):
    """`PlainUpBlock`, optionally followed by an affine map that its convolution takes in."""

    def __init__(self, block: PlainUpBlock, after: tuple[Tensor, Tensor] | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm1 = _Affine(*_tables(block.norm1), dtype)
        weight, bias = block.conv1.weight, cast(Tensor, block.conv1.bias)
        if after is not None:
            scale, shift = after
            weight, bias = weight * scale[:, None, None], bias * scale + shift
        self.conv1 = _UpConvolution(weight, bias, dtype)

    def forward(self, x: Tensor, label: Tensor | None) -> Tensor:
        return self.conv1(self.norm1(x, label).relu_())


class _Attention(nn.Module):
    """`SelfAttention2d` with gamma in the out projection; softmax and its sums are float32 inside the product."""

    def __init__(self, layer: SelfAttention2d, dtype: torch.dtype) -> None:
        super().__init__()
        biased = layer.query.bias is not None
        self.query = _Convolution(layer.query.weight, layer.query.bias, dtype)
        # one convolution makes both: they read the same map and are pooled alike
        self.key_value = _Convolution(
            torch.cat([layer.key.weight, layer.value.weight]),
            torch.cat([cast(Tensor, layer.key.bias), cast(Tensor, layer.value.bias)]) if biased else None,
            dtype,
        )
        self.widths = [layer.key.out_channels, layer.value.out_channels]
        out_bias = layer.gamma * cast(Tensor, layer.out.bias) if biased else None
        self.out = _Convolution(layer.gamma * layer.out.weight, out_bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        query = positions(self.query(x))
        key, value = positions(F.max_pool2d(self.key_value(x), 2)).split(self.widths, dim=2)
        o = attention(query, key, value)
        o = o.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)  # (B, Ev, H, W), channels_last
        return self.out(o).add_(x)


def _tables(norm: ConditionalBatchNorm2d, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The eval-mode layer, after adding `bias` (C,) to its input, as scale and shift (K, C)."""
    scale = (1 + norm.gain) * torch.rsqrt(norm.running_var + norm.eps)
    mean = norm.running_mean if bias is None else norm.running_mean - bias
    return scale, norm.bias - mean * scale


def _plain_affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Eval-mode batch norm as scale and shift, both (C,)."""
    scale = norm.weight * torch.rsqrt(cast(Tensor, norm.running_var) + norm.eps)
    return scale, norm.bias - norm.running_mean * scale  # type: ignore[operator]
