"""One network of another project, as tensors, into ours."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sagan_kernels.conversion.dialects import Dialect, NormNames
from sagan_kernels.conversion.layout import iterate, to_channels_first
from sagan_kernels.conversion.names import Blocks, Pair, blocks, layer_names, outline, pairs, part_of, places
from sagan_kernels.models import Discriminator, Generator
from sagan_kernels.models.sagan import DISCRIMINATOR_WIDTHS, GENERATOR_WIDTHS


class Network(NamedTuple):
    """One network: arguments of ours, its state dict, and tensors that only the way back needs."""

    config: dict[str, Any]
    state_dict: dict[str, Tensor]
    kept: dict[str, Tensor]


def from_host(
    tensors: Mapping[str, Tensor], name: str, dialect: Dialect, part: str, settings: Mapping[str, Any]
) -> Network:
    """Our network from `name`'s tensors.

    Raises:
        ValueError: our networks cannot hold it; the message names the first difference.
    """
    reader = _Reader(tensors, f"convert_checkpoint: {name}'s {part}", dialect, part)
    network = reader.outline(settings)
    for pair in pairs(dialect, network):
        reader.read(pair)
    reader.check(network)
    return Network(network.config, reader.ours, reader.kept)


class _Reader:
    """Reads tensors by their names there into `ours`, by our names."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str, dialect: Dialect, part: str) -> None:
        self.tensors, self.where, self.dialect = tensors, where, dialect
        self.name, self.part = part, part_of(dialect, part)
        self.ours: dict[str, Tensor] = {}
        self.theirs: dict[str, str] = {}  # by our key, for messages
        self.kept: dict[str, Tensor] = {}
        self.used: set[str] = set()

    def outline(self, settings: Mapping[str, Any]) -> Generator | Discriminator:
        """Our network with the sizes that the tensors tell."""
        if self.part.differs:
            raise ValueError(f"{self.where}: must be one that our networks can hold, but {self.part.differs}")
        first = next(iter(self.dialect.projections.values()))
        found = blocks(
            self.part,
            lambda _, path: self._has(self._join(path, self.part.inside["conv1"]), "conv"),
            lambda _, path: self._has(self._join(path, first), "conv"),
        )
        if not found.blocks:
            self._peek(self._join(self.part.first_block or self.part.block.format(n=self.part.first), "…"))
        find = self._generator if self.name == "generator" else self._discriminator
        config = {"attention_at": [], **self.part.settings, **find(found), **settings}
        return outline(self.name, config | self._attention(found, outline(self.name, config)))

    def read(self, pair: Pair) -> None:
        """One layer."""
        if pair.kind == "gamma":
            gamma = self._take(pair.theirs)
            self._put(pair.ours, pair.theirs, gamma.reshape(()) if gamma.numel() == 1 else gamma)
        elif pair.kind == "norm":
            self._norm(pair)
        elif pair.kind == "class_norm":
            self._class_norm(pair)
        else:
            self._layer(pair.ours, "weight", pair.theirs, pair.kind)
            bias = self._join(pair.theirs, layer_names(self.dialect, pair.kind).bias)
            if bias in self.tensors:
                self._put(f"{pair.ours}.bias", bias, self._turned(self._take(bias), pair.kind))

    def check(self, network: Generator | Discriminator) -> None:
        """Every tensor there has a place here, and every place its tensor."""
        expected = places(network)
        for key, shape in expected.items():
            if key not in self.ours and key.endswith("num_batches_tracked"):
                self.ours[key] = torch.zeros((), dtype=torch.int64)
            if key not in self.ours:
                raise ValueError(
                    f"{self.where}: must have what makes our {key} {shape}, got {self._instead(key)}"
                )
            if self.ours[key].shape != shape:
                raise ValueError(
                    f"{self.where}: {self.theirs[key]} must make our {key} {shape}, got "
                    f"{tuple(self.tensors[self.theirs[key]].shape)}; {self._sizes(network)}"
                )
        for key, tensor in self.tensors.items():
            if self.part.unused and re.fullmatch(self.part.unused, key):
                self.kept[key] = tensor
            elif key not in self.used:
                raise ValueError(
                    f"{self.where}: must hold only what our network has a place for, got {key} "
                    f"{tuple(tensor.shape)}; {self._sizes(network)}"
                )
        self.ours = {key: self.ours[key] for key in expected}

    def _generator(self, found: Blocks) -> dict[str, Any]:
        widths = [self._weight(path, "conv2").shape[0] for path in found.blocks]
        first = self._weight(found.blocks[0], "conv1").shape[1]
        seed = self._outside("linear", found)
        gain, normed = self._gain(self._join(found.blocks[0], self.part.inside["norm1"]))
        if seed.shape[0] != 16 * first:
            raise ValueError(
                f"{self.where}: must start from a 4×4 map of {first} channels, {16 * first} numbers, got "
                f"{seed.shape[0]}"
            )
        return self._scale([first, *widths], GENERATOR_WIDTHS) | {
            "num_classes": gain.shape[0],
            "z_dim": seed.shape[1],
            "image_channels": self._outside("to_image", found).shape[0],
            "spectral_norm": self._normed(self._outside_path("linear", found), "seed"),
            "norm_spectral_norm": normed,
        }

    def _discriminator(self, found: Blocks) -> dict[str, Any]:
        widths = [self._weight(path, "conv2").shape[0] for path in found.blocks]
        hidden = [self._weight(path, "conv1").shape[0] for path in found.blocks]
        narrow = {"narrow_blocks": True} if hidden != widths else {}
        return (
            self._scale(widths, DISCRIMINATOR_WIDTHS)
            | narrow
            | {
                "num_classes": self._outside("embedding", found).shape[0],
                "image_channels": self._weight(found.blocks[0], "conv1").shape[1],
                "spectral_norm": self._normed(self._outside_path("linear", found), "linear"),
            }
        )

    def _scale(self, channels: list[int], table: Mapping[int, tuple[int, ...]]) -> dict[str, Any]:
        """Resolution, base_channels and widths of a network with these channels."""
        for resolution, published in table.items():
            if len(published) == len(channels):
                base = channels[-1] // published[-1]
                if [base * width for width in published] == channels:
                    return {"resolution": resolution, "base_channels": base}
                base = math.gcd(*channels)
                return {
                    "resolution": resolution,
                    "base_channels": base,
                    "widths": [c // base for c in channels],
                }
        lengths = [len(published) - (self.name == "generator") for published in table.values()]
        count = len(channels) - (self.name == "generator")
        raise ValueError(
            f"{self.where}: must have {', '.join(map(str, lengths))} blocks for {', '.join(map(str, table))} px, "
            f"got {count}"
        )

    def _attention(self, found: Blocks, network: Generator | Discriminator) -> dict[str, Any]:
        """Where attention stands, and whether its convolutions have biases."""
        after, sides = found.attention, network.sides
        query = self.dialect.projections["query"]
        if self.part.attention_at is not None:  # one layer whose name does not tell where it stands
            path, after = self.part.attention, {}
            if self._has(self._join(path, query), "conv"):
                channels = self._weight_at(self._join(path, query), "conv").shape[1]
                widths = [self._weight(block, "conv2").shape[0] for block in found.blocks]
                at = self.part.attention_at.get(network.resolution, ())
                fits = [sides.index(side) for side in at if widths[sides.index(side)] == channels]
                if not fits:
                    raise ValueError(
                        f"{self.where}: {path} must stand where it does in the code, at {list(at)} px, got "
                        f"{channels} channels, which no such map has"
                    )
                after = {fits[0]: path}
        for i in after:
            if sides.index(sides[i]) != i:
                raise ValueError(
                    f"{self.where}: {after[i]} must follow the first block that makes its side, {sides[i]} px, got "
                    f"block {i + 1}; ours attends once a side"
                )
        config: dict[str, Any] = {"attention_at": [sides[i] for i in after]}
        if after:
            bias = self._join(
                self._join(next(iter(after.values())), query), layer_names(self.dialect, "conv").bias
            )
            config["attention_bias"] = bias in self.tensors
        return config

    def _layer(self, ours: str, parameter: str, theirs: str, kind: str, *, transposed: bool = False) -> None:
        """A weight, with the state of its spectral normalization where it has one."""
        names = layer_names(self.dialect, kind)
        if not self._normed(theirs, kind):
            key = self._join(theirs, names.weight)
            weight = self._matrix(key, kind)
            self._put(f"{ours}.{parameter}", key, weight.T.contiguous() if transposed else weight)
            return
        key = self._join(theirs, names.normed_weight)
        weight = self._matrix(key, kind)
        u_key = self._join(theirs, names.u)
        u = self._take(u_key)
        if u.numel() != weight.shape[0]:
            raise ValueError(
                f"{self.where}: {u_key} must have as many numbers as {key} has outputs, {weight.shape[0]}, got "
                f"{u.numel()}"
            )
        if names.v is None:
            self.kept[u_key] = u
            u, v = iterate(weight, self._turned(u.reshape(-1), kind))
        else:
            v = self._take(self._join(theirs, names.v))
        if names.sigma is not None:
            sigma = self._join(theirs, names.sigma)
            self.kept[sigma] = self._take(sigma)
        if transposed:
            weight, u, v = weight.T.contiguous(), v, u
        for name, tensor in {"original": weight, "0._u": u, "0._v": v}.items():
            self._put(f"{ours}.parametrizations.{parameter}.{name}", key, tensor)

    def _norm(self, pair: Pair) -> None:
        names = self.dialect.norm
        for ours, theirs in {"weight": names.gain, "bias": str(names.bias)}.items():
            key = self._join(pair.theirs, theirs)
            self._put(f"{pair.ours}.{ours}", key, self._take(key))
        self._statistics(pair, names)

    def _class_norm(self, pair: Pair) -> None:
        names = self.dialect.class_norm
        self._statistics(pair, names)
        if names.as_layers:
            for parameter, theirs in {"gain": names.gain, "bias": names.bias}.items():
                if theirs is not None:
                    self._layer(
                        pair.ours,
                        parameter,
                        self._join(pair.theirs, theirs),
                        "embedding",
                        transposed=names.transposed,
                    )
        else:
            for parameter, theirs in {"gain": names.gain, "bias": str(names.bias)}.items():
                key = self._join(pair.theirs, theirs)
                self._put(f"{pair.ours}.{parameter}", key, self._take(key))
        gain = f"{pair.ours}.gain"
        if names.bias is None:
            key = self.theirs[gain]
            self.ours[gain], bias = self.ours[gain].tensor_split(2, dim=1)
            self._put(f"{pair.ours}.bias", key, bias.contiguous())
        if not names.one_plus and gain in self.ours:
            scale = self.ours[gain]
            self.ours[gain] = scale - 1
            if not torch.equal(self.ours[gain] + 1, scale):  # rounding: only beyond [0.5, 2]
                self.kept[self.theirs[gain]] = self.tensors[self.theirs[gain]]

    def _statistics(self, pair: Pair, names: NormNames) -> None:
        stored = {"running_mean": names.mean, "running_var": names.var, "num_batches_tracked": names.count}
        for ours, theirs in stored.items():
            if theirs is not None and (key := self._join(pair.theirs, theirs)) in self.tensors:
                tensor = self._take(key)
                self._put(f"{pair.ours}.{ours}", key, tensor.reshape(-1) if "running" in ours else tensor)

    def _gain(self, norm: str) -> tuple[Tensor, bool]:
        """The table of class gains of one normalization, its classes first, and whether it is spectral-normed."""
        names = self.dialect.class_norm
        path = self._join(norm, names.gain)
        if not names.as_layers:
            return self._matrix(path, "embedding"), False
        gain = self._weight_at(path, "embedding")
        return gain.T if names.transposed else gain, self._normed(path, "embedding")

    def _outside_path(self, ours: str, found: Blocks) -> str:
        return self.part.layers[ours].format(end=found.end)

    def _outside(self, ours: str, found: Blocks) -> Tensor:
        kind = {"linear": "seed" if self.name == "generator" else "linear", "embedding": "embedding"}
        return self._weight_at(self._outside_path(ours, found), kind.get(ours, "conv"))

    def _weight(self, block: str, ours: str) -> Tensor:
        return self._weight_at(self._join(block, self.part.inside[ours]), "conv")

    def _weight_at(self, path: str, kind: str) -> Tensor:
        names = layer_names(self.dialect, kind)
        name = names.normed_weight if self._normed(path, kind) else names.weight
        return self._matrix(self._join(path, name), kind)

    def _matrix(self, key: str, kind: str) -> Tensor:
        tensor = self._take(key)
        ndim = 4 if kind == "conv" else 2
        if tensor.ndim != ndim or 0 in tensor.shape:
            raise ValueError(
                f"{self.where}: {key} must have {ndim} dimensions, none empty, got {tuple(tensor.shape)}"
            )
        return self._turned(tensor, kind)

    def _normed(self, path: str, kind: str) -> bool:
        return self._join(path, layer_names(self.dialect, kind).u) in self.tensors

    def _has(self, path: str, kind: str) -> bool:
        names = layer_names(self.dialect, kind)
        return any(self._join(path, name) in self.tensors for name in (names.weight, names.normed_weight))

    def _turned(self, tensor: Tensor, kind: str) -> Tensor:
        return to_channels_first(tensor, kind) if self.dialect.channels_last else tensor

    def _join(self, path: str, name: str) -> str:
        return path + self.dialect.joint + name

    def _peek(self, key: str) -> Tensor:
        if key not in self.tensors:
            raise ValueError(
                f"{self.where}: must have {key}, got {len(self.tensors)} tensors without it, such as "
                f"{', '.join(list(self.tensors)[:3])}"
            )
        return self.tensors[key]

    def _take(self, key: str) -> Tensor:
        self.used.add(key)
        return self._peek(key)

    def _put(self, ours: str, theirs: str, tensor: Tensor) -> None:
        self.ours[ours], self.theirs[ours] = tensor, theirs

    def _instead(self, key: str) -> str:
        """What is there in the place of a missing tensor of ours."""
        plain = re.sub(r"\.parametrizations\.(\w+)\.\w+.*", r".\1", key)
        theirs = self.theirs.get(
            plain, self.theirs.get(re.sub(r"\.(\w+)$", r".parametrizations.\1.original", key))
        )
        return f"{theirs}; ours divides all weights by their spectral norm, or none" if theirs else "nothing"

    def _sizes(self, network: Generator | Discriminator) -> str:
        config = network.config
        return f"its other sizes say {config['resolution']} px, {config['num_classes']} classes"
