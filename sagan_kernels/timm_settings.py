"""What timm must know of our networks, told without timm: architectures, and settings of a zoo entry's weights."""

from typing import Any

from sagan_kernels.zoo import ZooEntry

# by resolution: arguments of the Discriminator and of the Generator; {} is the published network
DISCRIMINATORS: dict[int, dict[str, Any]] = {
    32: {"base_channels": 32, "widths": [1, 2, 4, 4], "attention_at": [16]},
    64: {},
    128: {},
    256: {},
}
GENERATORS: dict[int, dict[str, Any]] = {
    32: {"base_channels": 32, "widths": [8, 4, 2, 1], "attention_at": [16], "spectral_norm": False},
    64: {},
    128: {},
    256: {},
}
# the first convolution of the first block, and the one beside it
FIRST_CONV = ("blocks.0.conv1", "blocks.0.shortcut")


def architecture(entry: ZooEntry, part: str) -> str | None:
    """The name that timm knows the entry's network by; None when its arguments are not those of an architecture."""
    table = {"discriminator": DISCRIMINATORS, "generator": GENERATORS}[part]
    given = dict(getattr(entry, part))
    resolution = given.pop("resolution", None)
    for free in ("num_classes", "image_channels"):  # timm sets these from the weights' settings
        given.pop(free, None)
    if resolution not in table or given != table[resolution]:
        return None
    return f"sagan_{resolution}_{part}"


def tag(entry: ZooEntry) -> str:
    """What follows the dot in timm's names: `avatars` of `sagan_32_avatars`."""
    return entry.name.split("_", 2)[-1]


def pretrained_cfg(entry: ZooEntry, part: str, class_names: list[str] | None = None) -> dict[str, Any]:
    """Settings for timm of an entry's weights: size and range of images, classes, first layer, head, licence."""
    network = getattr(entry, part)
    side, channels = network["resolution"], network.get("image_channels", 3)
    settings: dict[str, Any] = {
        "input_size": (channels, side, side),
        "fixed_input_size": True,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.5,) * channels,
        "std": (0.5,) * channels,
        # an unconditional critic has one logit
        "num_classes": network.get("num_classes", 1000) or (1 if part == "discriminator" else 0),
        "license": (entry.weights or {}).get("license"),
        "description": f"SAGAN {part}, {entry.data.get('name')}",
        "paper_name": "Self-Attention Generative Adversarial Networks",
        "paper_ids": "arXiv:1805.08318",
    }
    if part == "discriminator":
        settings |= {"first_conv": FIRST_CONV, "classifier": "head"}
    if class_names:
        settings["label_names"] = class_names
    return settings


def config(entry: ZooEntry, class_names: list[str] | None, num_features: int) -> dict[str, Any]:
    """What `config.json` needs so that timm loads the folder's discriminator; {} for another architecture."""
    name = architecture(entry, "discriminator")
    if name is None:
        return {}
    settings = pretrained_cfg(entry, "discriminator", class_names)
    return {
        "architecture": name,
        "num_classes": settings["num_classes"],
        "num_features": num_features,
        "model_args": {},
        "pretrained_cfg": settings | {"tag": tag(entry), "hf_hub_filename": "discriminator.safetensors"},
    }
