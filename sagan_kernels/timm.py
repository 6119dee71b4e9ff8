"""Our networks in timm: `import sagan_kernels.timm`, then `timm.create_model("sagan_32_discriminator.avatars")`.

Discriminators are full backbones, with spectral norm folded into their weights. Generators can be listed, created,
saved and loaded; their input is a latent vector, so nothing of timm that needs an image works with them.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sagan_kernels import timm_settings, zoo
from sagan_kernels.models import Discriminator, Generator
from sagan_kernels.models.sagan import DISCRIMINATOR_WIDTHS, DownBlock
from sagan_kernels.nn import SelfAttention2d, fold_spectral_norm

try:
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
    from timm.models._features import feature_take_indices
except ImportError as error:
    raise ImportError("sagan_kernels.timm needs timm: pip install sagan-kernels[timm]") from error

POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "sum": lambda x: x.sum((2, 3)),
    "avg": lambda x: x.mean((2, 3)),
    "max": lambda x: x.amax((2, 3)),
}
# what timm gives every model and a generator has no use for
WITHOUT_MEANING = ("global_pool", "drop_rate", "drop_path_rate", "img_size")

__all__: list[str] = []  # timm's register_model adds to it


class DiscriminatorBackbone(nn.Module):
    """The discriminator's blocks and attention under a linear head, as timm's models are made.

    Shapes: x (B, in_chans, img_size, img_size) in [-1, 1] -> (B, num_classes). With a zoo entry's weights, logit k is
    that of `Discriminator` for an image of class k.

    Args:
        num_classes: width of the head; 0 for none.
        in_chans: channels of the image.
        global_pool: "sum", which is the critic's own, "avg", "max", or "" for the feature map.
        img_size: 32, 64, 128 or 256.
        drop_rate: dropout before the head.
        base_channels: as `Discriminator`.
        widths: as `Discriminator`.
        attention_at: as `Discriminator`.

    Raises:
        ValueError: as `Discriminator`, or an unknown global_pool.
    """

    def __init__(
        self,
        num_classes: int = 1,
        in_chans: int = 3,
        global_pool: str = "sum",
        img_size: int | tuple[int, int] = 128,
        drop_rate: float = 0.0,
        base_channels: int = 64,
        widths: list[int] | None = None,
        attention_at: list[int] | None = None,
    ) -> None:
        super().__init__()
        side = img_size if isinstance(img_size, int) else img_size[0]
        critic = Discriminator(
            side,
            0,
            base_channels=base_channels,
            attention_at=attention_at,
            spectral_norm=False,
            widths=widths,
        )
        self.blocks, self.attention = critic.blocks, critic.attention
        self._attention_after = critic._attention_after
        self.settings = {key: critic.config[key] for key in ("base_channels", "widths", "attention_at")}
        self.settings["resolution"] = side
        self.feature_info: list[dict[str, Any]] = []
        reduction = 1
        for i, block in enumerate(self.blocks):
            assert isinstance(block, DownBlock)
            reduction *= 2 if block.downsample else 1
            width = block.conv2.out_channels
            self.feature_info.append({"num_chs": width, "reduction": reduction, "module": f"blocks.{i}"})
        first = self.blocks[0]
        assert isinstance(first, DownBlock)
        if in_chans != 3:
            self.blocks[0] = DownBlock(
                in_chans,
                first.conv2.out_channels,
                downsample=True,
                first=True,
                shortcut_relu=False,
                narrow=False,
            )
        self.num_features = self.head_hidden_size = self.feature_info[-1]["num_chs"]
        self.drop_rate, self.grad_checkpointing = drop_rate, False
        self.reset_classifier(num_classes, global_pool)

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, and another pooling where one is given."""
        if global_pool is not None:
            if global_pool not in POOLS:
                raise ValueError(
                    f"DiscriminatorBackbone: global_pool must be one of {list(POOLS)}, got {global_pool!r}"
                )
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in backward instead of keeping their activations."""
        self.grad_checkpointing = enable

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the last feature map (B, num_features, h, w), not negative."""
        for i in range(len(self.blocks)):
            x = self._stage(i, x)
        return F.relu(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool a feature map and, unless `pre_logits`, apply the head."""
        x = F.dropout(POOLS[self.global_pool](x), self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps after the blocks in `indices` (the last n for an int, all for None), attention included."""
        del norm  # there is none
        if output_fmt != "NCHW":
            raise ValueError(
                f"DiscriminatorBackbone: output_fmt must be NCHW, got {output_fmt!r}; permute the maps"
            )
        taken, last = feature_take_indices(len(self.feature_info), indices)
        maps = []
        for i in range(last + 1 if stop_early else len(self.blocks)):
            x = self._stage(i, x)
            if i in taken:
                maps.append(x)
        return maps if intermediates_only else (F.relu(x), maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks behind the last of `indices`, and the head."""
        taken, last = feature_take_indices(len(self.feature_info), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_head:
            self.reset_classifier(0, "")
        return list(taken)

    def _stage(self, i: int, x: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            x = checkpoint(self.blocks[i], x, use_reentrant=False)
        else:
            x = self.blocks[i](x)
        return self.attention[self._attention_after[i]](x) if i in self._attention_after else x


class LatentGenerator(Generator):
    """A `Generator` with timm's arguments. Shapes: z (B, z_dim), label (B,) or None -> images.

    Args:
        num_classes: as `Generator`.
        in_chans: image_channels of `Generator`.
        settings: the other arguments of `Generator`.

    Raises:
        NotImplementedError: features are asked for.
    """

    def __init__(self, num_classes: int = 0, in_chans: int = 3, **settings: Any) -> None:
        super().__init__(num_classes=num_classes, image_channels=in_chans, **settings)
        self.num_features = self.z_dim

    def forward_features(self, *_: Any, **__: Any) -> Tensor:
        """Not there: the input is a latent vector."""
        raise NotImplementedError(_no_images("forward_features"))

    forward_intermediates = forward_head = get_classifier = reset_classifier = forward_features


class AttentionLayer(SelfAttention2d):
    """`SelfAttention2d` as timm's convolution networks take attention layers: residual, the identity at first.

    timm.create_model("resnet18", block_args={"attn_layer": AttentionLayer})

    Args:
        channels: as `SelfAttention2d`.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: channels is not divisible by 8.
    """

    def __init__(
        self, channels: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(channels)
        self.to(device=device, dtype=dtype)


def fold_discriminator(state_dict: dict[str, Tensor], model: DiscriminatorBackbone) -> dict[str, Tensor]:
    """Our discriminator's state as the backbone's: spectral norm worked in, one row of the head a class.

    A state that is the backbone's already is returned as it is.
    """
    if not any(key.startswith("linear.") for key in state_dict):
        return state_dict
    stem, classes = (
        next((t for key, t in state_dict.items() if key.startswith(start) and t.ndim > 1), None)
        for start in ("blocks.0.conv1.", "embedding.")
    )
    assert stem is not None
    critic = Discriminator(
        num_classes=0 if classes is None else len(classes),
        image_channels=stem.shape[1],
        spectral_norm=any("parametrizations" in key for key in state_dict),
        **model.settings,
    ).eval()
    critic.load_state_dict(state_dict)
    folded = fold_spectral_norm(critic).state_dict()
    weight, bias = folded.pop("linear.weight"), folded.pop("linear.bias")
    rows = folded.pop("embedding.weight", torch.zeros_like(weight))  # label's part of the logit is linear too
    return folded | {"head.weight": weight + rows, "head.bias": bias.expand(len(rows)).clone()}


def _no_images(what: str) -> str:
    return f"sagan generator: {what} must be left out, since the input is a latent vector, not an image"


def _default_cfgs() -> dict[str, dict[str, Any]]:
    cfgs: dict[str, dict[str, Any]] = {}
    for name in zoo.list_models(pretrained=True):
        entry = zoo.entry(name)
        for part in ("discriminator", "generator"):
            if (architecture := timm_settings.architecture(entry, part)) is not None:
                cfgs[f"{architecture}.{timm_settings.tag(entry)}"] = {
                    **timm_settings.pretrained_cfg(entry, part),
                    "file": str(entry.folder / f"{part}.safetensors"),
                }
    for resolution in timm_settings.DISCRIMINATORS:
        for part, classes in (("discriminator", 1), ("generator", 0)):
            size = (3, resolution, resolution)
            first = {"first_conv": timm_settings.FIRST_CONV, "classifier": "head"}
            cfgs[f"sagan_{resolution}_{part}.untrained"] = {
                "input_size": size, "num_classes": classes, "fixed_input_size": True, "mean": (0.5,) * 3,
                "std": (0.5,) * 3, "crop_pct": 1.0, **(first if part == "discriminator" else {}),
            }  # fmt: skip
    return cfgs


def _entrypoints() -> None:
    for resolution in timm_settings.DISCRIMINATORS:
        for make in (_discriminator, _generator):
            entrypoint = make(resolution)
            globals()[entrypoint.__name__] = register_model(entrypoint)


def _discriminator(resolution: int) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **settings: Any) -> nn.Module:
        own = {"img_size": resolution, **timm_settings.DISCRIMINATORS[resolution]}
        blocks = len(DISCRIMINATOR_WIDTHS[resolution])
        return build_model_with_cfg(
            DiscriminatorBackbone,
            f"sagan_{resolution}_discriminator",
            pretrained,
            pretrained_filter_fn=fold_discriminator,
            feature_cfg={"out_indices": tuple(range(blocks)), "feature_cls": "getter"},
            **own | settings,
        )

    return _named(create, f"sagan_{resolution}_discriminator", "images to logits")


def _generator(resolution: int) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, features_only: bool = False, **settings: Any) -> nn.Module:
        if features_only:
            raise NotImplementedError(_no_images("features_only"))
        own = {"resolution": resolution, **timm_settings.GENERATORS[resolution]}
        return build_model_with_cfg(
            LatentGenerator,
            f"sagan_{resolution}_generator",
            pretrained,
            kwargs_filter=WITHOUT_MEANING,
            **own | {key: value for key, value in settings.items() if key not in WITHOUT_MEANING},
        )

    return _named(create, f"sagan_{resolution}_generator", "latents to images")


def _named(create: Callable[..., nn.Module], name: str, what: str) -> Callable[..., nn.Module]:
    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"""SAGAN at {name.split("_")[1]} px, {what}."""
    create.__module__ = __name__
    return create


default_cfgs = generate_default_cfgs(_default_cfgs())
_entrypoints()
