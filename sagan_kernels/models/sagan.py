"""The generator and discriminator of SAGAN, readable top to bottom.

Reference: Zhang et al., "Self-Attention Generative Adversarial Networks", ICML 2019, arXiv:1805.08318. Widths, blocks
and the projection head are those of the authors' released code as BigGAN-PyTorch, StudioGAN and mimicry carry it
on: parameter counts are equal to theirs.
"""

from collections.abc import Iterable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sagan_kernels.hub import Pretrained
from sagan_kernels.nn import ConditionalBatchNorm2d, SelfAttention2d, spectral_norm
from sagan_kernels.ops import conv2d_avg_pool, upsample_conv2d

# channels at each feature map, in units of base_channels; the first of the generator's is its 4×4 seed
GENERATOR_WIDTHS = {
    32: (4, 4, 4, 4),
    64: (16, 8, 4, 2, 1),
    128: (16, 16, 8, 4, 2, 1),
    256: (16, 16, 8, 8, 4, 2, 1),
}
DISCRIMINATOR_WIDTHS = {
    32: (2, 2, 2, 2),
    64: (1, 2, 4, 8, 16),
    128: (1, 2, 4, 8, 16, 16),
    256: (1, 2, 4, 8, 8, 16, 16),
}


class Generator(Pretrained):
    """Latent vectors and class labels to images.

    Shapes: z (B, z_dim), label (B,) int64 or None -> images (B, image_channels, resolution, resolution) in [-1, 1].

    Args:
        resolution: side of the image in pixels: 32, 64, 128 or 256.
        num_classes: number of class labels; 0 for an unconditional generator, which takes no label.
        z_dim: width of the latent vector, drawn from a standard normal.
        base_channels: unit of the channel widths; 64 is the published network.
        image_channels: 3 for RGB, 1 for gray.
        attention_at: sides of the feature maps followed by self-attention, any of 8, 16, ... resolution; empty for
            none; None for half the resolution, where BigGAN, StudioGAN and mmgen put it. The authors' released code
            has (32,) at 128 px.
        spectral_norm: divide the weights of all linear and convolution layers by their spectral norm.
        residual: residual blocks; False for DCGAN's (one transposed 4×4 convolution a block, arXiv:1511.06434).
        widths: channels of each feature map in units of base_channels, the 4×4 seed first; None for the published
            ones, `GENERATOR_WIDTHS[resolution]`.
        upsample: how residual blocks enlarge: "nearest", or "bilinear" as mimicry.
        norm_eps: added to every batch variance; 1e-4 in StudioGAN and mmgeneration.
        norm_spectral_norm: divide the tables of class gains and biases by their spectral norm too, as StudioGAN.
        attention_bias: biases in the attention's convolutions, as voletiv's version.

    Raises:
        ValueError: the resolution is not known, or the network has no feature map of a side in attention_at.
    """

    part = "generator"

    def __init__(
        self,
        resolution: int = 128,
        num_classes: int = 1000,
        z_dim: int = 128,
        base_channels: int = 64,
        image_channels: int = 3,
        attention_at: Iterable[int] | None = None,
        spectral_norm: bool = True,
        residual: bool = True,
        widths: Iterable[int] | None = None,
        upsample: str = "nearest",
        norm_eps: float = 1e-5,
        norm_spectral_norm: bool = False,
        attention_bias: bool = False,
    ) -> None:
        super().__init__()
        _check(
            "Generator", num_classes, image_channels, spectral_norm=spectral_norm, residual=residual,
            norm_spectral_norm=norm_spectral_norm, attention_bias=attention_bias,
        )  # fmt: skip
        if type(z_dim) is not int or z_dim < 1:
            raise ValueError(f"Generator: z_dim must be a whole number from 1, got {z_dim!r}")
        if upsample not in ("nearest", "bilinear"):
            raise ValueError(f"Generator: upsample must be nearest or bilinear, got {upsample!r}")
        if not (isinstance(norm_eps, float) and 0 < norm_eps < 1):
            raise ValueError(f"Generator: norm_eps must be a number between 0 and 1, got {norm_eps!r}")
        if norm_spectral_norm and not num_classes:
            raise ValueError("Generator: norm_spectral_norm must be false without classes, got True")
        factors, channels = _widths("Generator", GENERATOR_WIDTHS, resolution, base_channels, widths)
        sides = [8 << i for i in range(len(channels) - 1)]
        self.config = {
            "resolution": resolution,
            "num_classes": num_classes,
            "z_dim": z_dim,
            "base_channels": base_channels,
            "image_channels": image_channels,
            "attention_at": _attention_sides("Generator", attention_at, resolution, sides),
            "spectral_norm": spectral_norm,
            "residual": residual,
            "widths": factors,
            "upsample": upsample,
            "norm_eps": norm_eps,
            "norm_spectral_norm": norm_spectral_norm,
            "attention_bias": attention_bias,
        }
        self.resolution, self.num_classes, self.z_dim = resolution, num_classes, z_dim
        self.sides = sides  # after each block

        self.linear = nn.Linear(z_dim, 16 * channels[0])
        self.blocks = nn.ModuleList(
            UpBlock(width_in, width, num_classes, norm_eps, upsample)
            if residual
            else PlainUpBlock(width_in, width, num_classes, norm_eps)
            for width_in, width in pairwise(channels)
        )
        self.attention = nn.ModuleDict(
            {
                str(side): SelfAttention2d(channels[1 + sides.index(side)], bias=attention_bias)
                for side in self.config["attention_at"]
            }
        )
        self.norm = nn.BatchNorm2d(channels[-1], eps=norm_eps)
        self.to_image = nn.Conv2d(channels[-1], image_channels, 3, padding=1)
        _initialize(self, spectral_norm, norm_spectral_norm)

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        x = self.linear(z).unflatten(1, (-1, 4, 4))
        for block in self.blocks:
            x = block(x, label)
            side = str(x.shape[3])
            if side in self.attention:
                x = self.attention[side](x)
        return torch.tanh(self.to_image(F.relu(self.norm(x))))


class Discriminator(Pretrained):
    """Images and class labels to logits, positive for real: a projection discriminator, arXiv:1802.05637.

    Shapes: x (B, image_channels, resolution, resolution) in [-1, 1], label (B,) int64 or None -> logits (B,).

    Args:
        resolution: side of the image in pixels: 32, 64, 128 or 256.
        num_classes: number of class labels; 0 for an unconditional discriminator, which takes no label.
        base_channels: unit of the channel widths; 64 is the published network.
        image_channels: 3 for RGB, 1 for gray.
        attention_at: sides of the feature maps followed by self-attention (after the first block that makes that
            side); empty for none; None for half the resolution.
        spectral_norm: divide the weights of all layers, the class embedding included, by their spectral norm.
        residual: residual blocks; False for DCGAN's strided convolutions, here without batch normalization so that
            a gradient penalty stays a statement about one image.
        widths: channels of each block in units of base_channels; None for the published ones,
            `DISCRIMINATOR_WIDTHS[resolution]`.
        attention_bias: biases in the attention's convolutions, as voletiv's version.
        shortcut_relu: the ReLU at the start of a block reaches its shortcut as well: what the in-place ReLU of
            StudioGAN, mimicry and voletiv does, and their weights are trained with.
        narrow_blocks: the convolutions inside a block, other than the first, meet at its incoming width, as in
            mimicry; otherwise at its outgoing one.

    Raises:
        ValueError: the resolution is not known, or the network has no feature map of a side in attention_at.
    """

    part = "discriminator"

    def __init__(
        self,
        resolution: int = 128,
        num_classes: int = 1000,
        base_channels: int = 64,
        image_channels: int = 3,
        attention_at: Iterable[int] | None = None,
        spectral_norm: bool = True,
        residual: bool = True,
        widths: Iterable[int] | None = None,
        attention_bias: bool = False,
        shortcut_relu: bool = False,
        narrow_blocks: bool = False,
    ) -> None:
        super().__init__()
        _check(
            "Discriminator", num_classes, image_channels, spectral_norm=spectral_norm, residual=residual,
            attention_bias=attention_bias, shortcut_relu=shortcut_relu, narrow_blocks=narrow_blocks,
        )  # fmt: skip
        factors, channels = _widths("Discriminator", DISCRIMINATOR_WIDTHS, resolution, base_channels, widths)
        halvings = 2 if resolution == 32 else len(channels) - 1
        sides = [resolution >> min(i + 1, halvings) for i in range(len(channels))]
        self.config = {
            "resolution": resolution,
            "num_classes": num_classes,
            "base_channels": base_channels,
            "image_channels": image_channels,
            "attention_at": _attention_sides("Discriminator", attention_at, resolution, sides),
            "spectral_norm": spectral_norm,
            "residual": residual,
            "widths": factors,
            "attention_bias": attention_bias,
            "shortcut_relu": shortcut_relu,
            "narrow_blocks": narrow_blocks,
        }
        self.resolution, self.num_classes = resolution, num_classes
        self.sides = sides  # after each block

        ways = list(zip((image_channels, *channels), channels, strict=False))
        self.blocks = nn.ModuleList(
            DownBlock(
                *way, downsample=i < halvings, first=i == 0, shortcut_relu=shortcut_relu, narrow=narrow_blocks
            )
            if residual
            else PlainDownBlock(*way, downsample=i < halvings)
            for i, way in enumerate(ways)
        )
        self.attention = nn.ModuleDict(
            {
                str(side): SelfAttention2d(channels[sides.index(side)], bias=attention_bias)
                for side in self.config["attention_at"]
            }
        )
        self._attention_after = {sides.index(side): str(side) for side in self.config["attention_at"]}
        self.linear = nn.Linear(channels[-1], 1)
        self.embedding = nn.Embedding(num_classes, channels[-1]) if num_classes else None
        _initialize(self, spectral_norm)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        features = self.features(x)
        logits = self.linear(features).squeeze(1)
        if self.embedding is None:
            return logits
        if label is None:
            raise ValueError(f"Discriminator: a label is needed, one of {self.num_classes} classes, got None")
        return logits + (self.embedding(label) * features).sum(1)

    def features(self, x: Tensor) -> Tensor:
        """(B, image_channels, H, W) -> (B, F): sum over positions of the last feature map, before the heads."""
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self._attention_after:
                x = self.attention[self._attention_after[i]](x)
        return F.relu(x).sum((2, 3))


class UpBlock(nn.Module):
    """Generator residual block: x (B, C, H, W) -> (B, K, 2H, 2W); both paths enlarge alike."""

    def __init__(self, width_in: int, width: int, num_classes: int, norm_eps: float, upsample: str) -> None:
        super().__init__()
        self.upsample = upsample
        self.norm1 = ConditionalBatchNorm2d(width_in, num_classes, eps=norm_eps)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = ConditionalBatchNorm2d(width, num_classes, eps=norm_eps)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(width_in, width, 1)

    def forward(self, x: Tensor, label: Tensor | None) -> Tensor:
        h = F.relu(self.norm1(x, label))
        if self.upsample == "nearest":
            h = upsample_conv2d(h, self.conv1.weight, self.conv1.bias)
        else:
            h = self.conv1(F.interpolate(h, scale_factor=2, mode=self.upsample))
        h = self.conv2(F.relu(self.norm2(h, label)))
        # a 1×1 convolution and enlargement commute: convolve the small map
        return h + F.interpolate(self.shortcut(x), scale_factor=2, mode=self.upsample)


class PlainUpBlock(nn.Module):
    """DCGAN's generator block: x (B, C, H, W) -> (B, K, 2H, 2W)."""

    def __init__(self, width_in: int, width: int, num_classes: int, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = ConditionalBatchNorm2d(width_in, num_classes, eps=norm_eps)
        self.conv1 = nn.ConvTranspose2d(width_in, width, 4, stride=2, padding=1)

    def forward(self, x: Tensor, label: Tensor | None) -> Tensor:
        return self.conv1(F.relu(self.norm1(x, label)))


class DownBlock(nn.Module):
    """Discriminator residual block: x (B, C, H, W) -> (B, K, H/2, W/2), or (B, K, H, W) without downsampling.

    The first block of a network takes an image: no ReLU before its convolution.
    """

    def __init__(
        self, width_in: int, width: int, *, downsample: bool, first: bool, shortcut_relu: bool, narrow: bool
    ) -> None:
        super().__init__()
        self.downsample, self.first, self.shortcut_relu = downsample, first, shortcut_relu
        hidden = width_in if narrow and not first else width
        self.conv1 = nn.Conv2d(width_in, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, width, 3, padding=1)
        self.shortcut = nn.Conv2d(width_in, width, 1) if downsample or width_in != width else None

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.first else F.relu(x)
        x = h if self.shortcut_relu else x
        h = F.relu(self.conv1(h))
        if self.downsample:
            h = conv2d_avg_pool(h, self.conv2.weight, self.conv2.bias)
            x = F.avg_pool2d(x, 2)  # commutes with the 1×1 convolution: pool first
        else:
            h = self.conv2(h)
        return h + (x if self.shortcut is None else self.shortcut(x))


class PlainDownBlock(nn.Module):
    """DCGAN's discriminator block: x (B, C, H, W) -> (B, K, H/2, W/2), or (B, K, H, W) without downsampling."""

    def __init__(self, width_in: int, width: int, *, downsample: bool) -> None:
        super().__init__()
        self.conv1 = (
            nn.Conv2d(width_in, width, 4, stride=2, padding=1)
            if downsample
            else nn.Conv2d(width_in, width, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.conv1(x), 0.2)


def _check(where: str, num_classes: int, image_channels: int, **flags: bool) -> None:
    if type(num_classes) is not int or num_classes < 0:
        raise ValueError(f"{where}: num_classes must be a whole number from 0, got {num_classes!r}")
    if image_channels not in (1, 3):
        raise ValueError(f"{where}: image_channels must be 1 or 3, got {image_channels!r}")
    for name, value in flags.items():
        if type(value) is not bool:
            raise ValueError(f"{where}: {name} must be true or false, got {value!r}")


def _widths(
    where: str,
    table: dict[int, tuple[int, ...]],
    resolution: int,
    base_channels: int,
    widths: Iterable[int] | None,
) -> tuple[list[int], list[int]]:
    """The widths in units of base_channels, and in channels."""
    if type(resolution) is not int or resolution not in table:
        raise ValueError(
            f"{where}: resolution must be one of {', '.join(map(str, table))}, got {resolution!r}"
        )
    if type(base_channels) is not int or base_channels < 1:
        raise ValueError(f"{where}: base_channels must be a whole number from 1, got {base_channels!r}")
    factors = _whole_numbers(where, "widths", table[resolution] if widths is None else widths)
    if len(factors) != len(table[resolution]) or min(factors) < 1:
        raise ValueError(
            f"{where}: widths must be {len(table[resolution])} positive numbers at {resolution} px, got {factors}"
        )
    return factors, [factor * base_channels for factor in factors]


def _attention_sides(where: str, asked: Iterable[int] | None, resolution: int, sides: list[int]) -> list[int]:
    chosen = sorted(set(_whole_numbers(where, "attention_at", [resolution // 2] if asked is None else asked)))
    if missing := [side for side in chosen if side not in sides]:
        raise ValueError(
            f"{where}: attention_at must be among its feature maps {sorted(set(sides))} at {resolution} px, "
            f"got {missing[0]}"
        )
    return chosen


def _whole_numbers(where: str, name: str, values: Iterable[int]) -> list[int]:
    numbers = list(values) if isinstance(values, Iterable) else [None]
    if any(type(number) is not int for number in numbers):
        raise ValueError(f"{where}: {name} must be a list of whole numbers, got {values!r}")
    return numbers


def _initialize(model: nn.Module, normalize: bool, normalize_norms: bool = False) -> None:
    """Xavier-uniform weights and zero biases, as the released code; then spectral normalization where asked."""
    for module in list(model.modules()) if normalize_norms else []:
        if isinstance(module, ConditionalBatchNorm2d):
            for name in ("gain", "bias"):
                nn.init.xavier_uniform_(getattr(module, name))  # zeros have no spectral norm to divide by
                spectral_norm(module, name)
    for module in list(model.modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.Embedding)):
            nn.init.xavier_uniform_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            if normalize:
                spectral_norm(module)
