"""Which tensor of ours is which of theirs: the names of one network, layer by layer, from a dialect's tables."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from sagan_kernels.conversion.dialects import Dialect, LayerNames, Part
from sagan_kernels.models import Discriminator, Generator

NETWORKS: dict[str, type[Generator] | type[Discriminator]] = {
    cls.part: cls for cls in (Generator, Discriminator)
}


class Pair(NamedTuple):
    """One layer: its path in our network and in theirs, and what it is."""

    ours: str
    theirs: str
    kind: str  # seed, linear, embedding, conv, class_norm, norm or gamma


class Blocks(NamedTuple):
    """The paths of a network's blocks, in order, and of its attention layers by the block before them."""

    blocks: list[str]
    attention: dict[int, str]
    end: int


def part_of(dialect: Dialect, part: str) -> Part:
    """`part`: "generator" or "discriminator"."""
    return dialect.generator if part == "generator" else dialect.discriminator


def layer_names(dialect: Dialect, kind: str) -> LayerNames:
    """How the tensors of a layer of this kind are called."""
    return dialect.special_layers.get(kind, dialect.layer)


def blocks(
    part: Part, is_block: Callable[[int, str], bool], is_attention: Callable[[int, str], bool]
) -> Blocks:
    """Count the blocks and number the attention layers between them, until `is_block(i, path)` is false."""
    paths: list[str] = []
    attention: dict[int, str] = {}
    n = part.first
    while True:
        i = len(paths)
        numbered = i > 0 or part.first_block is None
        path = part.block.format(n=n) if numbered else str(part.first_block)
        if not is_block(i, path):
            return Blocks(paths, attention, n)
        paths.append(path)
        number = n
        n += numbered
        after = part.attention.format(n=n if part.attention_counts else number)
        if is_attention(i, after):
            attention[i] = after
            n += part.attention_counts


def pairs(dialect: Dialect, network: Generator | Discriminator) -> Iterator[Pair]:
    """Every layer of `network`, under our name and the dialect's."""
    part = part_of(dialect, network.part)
    after = [network.sides.index(side) for side in network.config["attention_at"]]
    found = blocks(part, lambda i, _: i < len(network.blocks), lambda i, _: i in after)
    for ours, theirs in part.layers.items():
        yield Pair(ours, theirs.format(end=found.end), _kind(network.part, ours))
    for i, path in enumerate(found.blocks):
        for ours, theirs in part.inside.items():
            if getattr(network.blocks[i], ours) is not None:
                yield Pair(f"blocks.{i}.{ours}", path + dialect.joint + theirs, _kind(network.part, ours))
    for i, path in found.attention.items():
        layer = f"attention.{network.sides[i]}"
        yield Pair(f"{layer}.gamma", path + dialect.joint + dialect.gamma, "gamma")
        for ours, theirs in dialect.projections.items():
            yield Pair(f"{layer}.{ours}", path + dialect.joint + theirs, "conv")


def outline(part: str, config: Mapping[str, Any]) -> Generator | Discriminator:
    """The network of `config` without memory for its tensors and without spectral normalization, but its config."""
    normed = {key: False for key in ("spectral_norm", "norm_spectral_norm") if key in config}
    with torch.device("meta"):
        network = NETWORKS[part](**{**config, **normed})
    network.config |= {key: config[key] for key in normed}
    return network


def places(network: Generator | Discriminator) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the state dict of the network that `network` is the outline of."""
    found: dict[str, tuple[int, ...]] = {}
    for key, tensor in network.state_dict().items():
        path, _, name = key.rpartition(".")
        setting = "spectral_norm" if name == "weight" else "norm_spectral_norm"
        if tensor.ndim > 1 and network.config[setting]:
            rows = tensor.shape[0]
            found[f"{path}.parametrizations.{name}.original"] = tuple(tensor.shape)
            found[f"{path}.parametrizations.{name}.0._u"] = (rows,)
            found[f"{path}.parametrizations.{name}.0._v"] = (tensor.numel() // rows,)
        else:
            found[key] = tuple(tensor.shape)
    return found


def _kind(part: str, ours: str) -> str:
    if ours == "linear":
        return "seed" if part == "generator" else "linear"
    return {"embedding": "embedding", "norm": "norm", "norm1": "class_norm", "norm2": "class_norm"}.get(
        ours, "conv"
    )
