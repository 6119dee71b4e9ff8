"""One of our networks into the tensors of another project."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sagan_kernels.conversion.dialects import Dialect, NormNames
from sagan_kernels.conversion.from_host import Network
from sagan_kernels.conversion.layout import before, to_channels_last
from sagan_kernels.conversion.names import Pair, layer_names, outline, pairs, part_of

IMPLIED: dict[str, dict[str, Any]] = {
    "generator": {"upsample": "nearest", "norm_eps": 1e-5, "attention_bias": False, "residual": True},
    "discriminator": {
        "shortcut_relu": False,
        "narrow_blocks": False,
        "attention_bias": False,
        "residual": True,
    },
}
"""Settings that a project's code fixes, with the values where its dialect says nothing."""


def to_host(
    source: Network, name: str, dialect: Dialect, part: str, settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """`name`'s tensors for our network; `source.kept` are theirs from an earlier conversion, taken as they are.

    Raises:
        ValueError: their networks cannot hold it; the message names the first difference.
    """
    where = f"convert_checkpoint: a {part} for {name}"
    _check(source.config, where, dialect, part, settings)
    theirs: dict[str, Tensor] = {}
    for pair in pairs(dialect, outline(part, source.config)):
        for key, tensor in _tensors(pair, source, dialect):
            theirs[key] = source.kept.get(key, tensor)
    return theirs | source.kept


def _check(
    config: dict[str, Any], where: str, dialect: Dialect, part: str, settings: Mapping[str, Any]
) -> None:
    names = part_of(dialect, part)
    if names.differs:
        raise ValueError(f"{where}: must be one that its code can hold, but there {names.differs}")
    if not config["num_classes"]:
        raise ValueError(f"{where}: must have classes, got num_classes 0")
    for key, usual in IMPLIED[part].items():
        expected = {**names.settings, **settings}.get(key, usual)
        if key in names.free or (key == "attention_bias" and not config["attention_at"]):
            continue
        if config[key] != expected:
            raise ValueError(f"{where}: must have {key} {expected!r}, got {config[key]!r}")
    if config.get("norm_spectral_norm") and not dialect.class_norm.may_be_normed:
        raise ValueError(f"{where}: must have norm_spectral_norm False, got True")
    sides = list((names.attention_at or {}).get(config["resolution"], ()))
    if names.attention_at is not None and config["attention_at"] not in ([], *([side] for side in sides)):
        raise ValueError(
            f"{where}: must have attention_at one of {sides} at {config['resolution']} px, got "
            f"{config['attention_at']}"
        )


def _tensors(pair: Pair, source: Network, dialect: Dialect) -> list[tuple[str, Tensor]]:
    """The tensors of one layer, by their names."""
    ours = source.state_dict
    if pair.kind == "gamma":
        return [(pair.theirs, ours[pair.ours].reshape(dialect.gamma_shape))]
    if pair.kind == "norm":
        names = dialect.norm
        return [
            (_join(dialect, pair.theirs, names.gain), ours[f"{pair.ours}.weight"]),
            (_join(dialect, pair.theirs, str(names.bias)), ours[f"{pair.ours}.bias"]),
            *_statistics(pair, ours, dialect, names),
        ]
    if pair.kind == "class_norm":
        return [
            *_class_norm(pair, source, dialect),
            *_statistics(pair, ours, dialect, dialect.class_norm),
        ]
    out = _layer(source, pair.ours, "weight", pair.theirs, pair.kind, dialect)
    if f"{pair.ours}.bias" in ours:
        key = _join(dialect, pair.theirs, layer_names(dialect, pair.kind).bias)
        out.append((key, _turned(ours[f"{pair.ours}.bias"], pair.kind, dialect)))
    return out


def _layer(
    source: Network,
    path: str,
    parameter: str,
    theirs: str,
    kind: str,
    dialect: Dialect,
    *,
    transposed: bool = False,
) -> list[tuple[str, Tensor]]:
    """A weight, with the state of its spectral normalization where it has one."""
    names, ours = layer_names(dialect, kind), source.state_dict
    if f"{path}.{parameter}" in ours:
        weight = ours[f"{path}.{parameter}"]
        weight = weight.T.contiguous() if transposed else weight
        return [(_join(dialect, theirs, names.weight), _turned(weight, kind, dialect))]
    weight, u, v = (
        ours[f"{path}.parametrizations.{parameter}.{name}"] for name in ("original", "0._u", "0._v")
    )
    if transposed:
        weight, u, v = weight.T.contiguous(), v, u
    out = [(_join(dialect, theirs, names.normed_weight), _turned(weight, kind, dialect))]
    key = _join(dialect, theirs, names.u)
    if names.v is not None:
        out += [(key, u), (_join(dialect, theirs, names.v), v)]
    else:
        out.append(
            (key, source.kept[key] if key in source.kept else _turned(before(weight, v), kind, dialect)[None])
        )
    if names.sigma is not None:
        sigma = torch.einsum("m,mn,n->", u.double(), weight.double().flatten(1), v.double())
        out.append((_join(dialect, theirs, names.sigma), sigma.to(weight.dtype)[None]))
    return out


def _class_norm(pair: Pair, source: Network, dialect: Dialect) -> list[tuple[str, Tensor]]:
    names, ours = dialect.class_norm, source.state_dict
    if names.as_layers and names.bias is not None:
        return [
            tensor
            for parameter, theirs in {"gain": names.gain, "bias": names.bias}.items()
            for tensor in _layer(
                source, pair.ours, parameter, _join(dialect, pair.theirs, theirs), "embedding", dialect,
                transposed=names.transposed,
            )
        ]  # fmt: skip
    scale = ours[f"{pair.ours}.gain"] + (not names.one_plus)
    bias = ours[f"{pair.ours}.bias"]
    gain = _join(dialect, pair.theirs, names.gain)
    if names.bias is None:
        table = _join(dialect, gain, dialect.layer.weight) if names.as_layers else gain
        return [(table, torch.cat([scale, bias], dim=1))]
    return [(gain, scale), (_join(dialect, pair.theirs, names.bias), bias)]


def _statistics(
    pair: Pair, ours: Mapping[str, Tensor], dialect: Dialect, names: NormNames
) -> list[tuple[str, Tensor]]:
    out = [
        (
            _join(dialect, pair.theirs, names.mean),
            ours[f"{pair.ours}.running_mean"].reshape(names.stat_shape),
        ),
        (_join(dialect, pair.theirs, names.var), ours[f"{pair.ours}.running_var"].reshape(names.stat_shape)),
    ]
    if names.count is not None:
        out.append((_join(dialect, pair.theirs, names.count), ours[f"{pair.ours}.num_batches_tracked"]))
    return out


def _turned(tensor: Tensor, kind: str, dialect: Dialect) -> Tensor:
    return to_channels_last(tensor, kind) if dialect.channels_last else tensor


def _join(dialect: Dialect, path: str, name: str) -> str:
    return path + dialect.joint + name
