"""Checkpoints of other projects into our networks, and ours into theirs."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from sagan_kernels import hub, zoo
from sagan_kernels.conversion.dialects import DIALECTS, Dialect
from sagan_kernels.conversion.from_host import Network, from_host
from sagan_kernels.conversion.names import NETWORKS, part_of
from sagan_kernels.conversion.read import read_file, tensors_in
from sagan_kernels.conversion.to_host import to_host
from sagan_kernels.files import write_together
from sagan_kernels.models import Discriminator, Generator

OURS = "sagan_kernels"
ALIASES = {"mmagic": "mmgeneration"}  # the same modules under a new name
UNTOLD = {"generator": ("norm_eps", "upsample"), "discriminator": ("shortcut_relu",)}
"""Settings of a network that no tensor tells."""


@dataclass(frozen=True)
class Conversion:
    """What `convert_checkpoint` makes.

    Attributes:
        source: where the tensors came from: a key of `DIALECTS`, or sagan_kernels.
        target: whose names `state_dicts` have.
        state_dicts: by network: generator, generator_ema (its moving average), discriminator.
        configs: by network, the arguments of our `Generator` or `Discriminator`.
        kept: by network, tensors of the source that our networks have no place for and that a way back to it takes,
            such as BigGAN's u0, under its names.
    """

    source: str
    target: str
    state_dicts: dict[str, dict[str, Tensor]] = field(repr=False)
    configs: dict[str, dict[str, Any]]
    kept: dict[str, dict[str, Tensor]] = field(repr=False)

    def model(self, network: str | None = None) -> Generator | Discriminator:
        """Our network in eval mode, in float32, or float64 where the tensors are.

        Args:
            network: one of `state_dicts`; None for the first of generator_ema, generator, discriminator there.

        Raises:
            ValueError: no such network, or the target is not sagan_kernels.
        """
        if self.target != OURS:
            raise ValueError(f"Conversion.model: target must be {OURS}, got {self.target}")
        if network is None:
            network = next(
                name for name in ("generator_ema", "generator", "discriminator") if name in self.state_dicts
            )
        if network not in self.state_dicts:
            raise ValueError(
                f"Conversion.model: network must be one of {', '.join(self.state_dicts)}, got {network!r}"
            )
        tensors = self.state_dicts[network]
        with torch.random.fork_rng(devices=[]):
            model = NETWORKS[_part(network)](**self.configs[network])
        if any(tensor.dtype is torch.float64 for tensor in tensors.values()):
            model.double()
        model.load_state_dict(tensors)
        return model.eval()

    def save(self, folder: str | Path) -> list[Path]:
        """Write the networks.

        For us a model folder, whose generator is the moving average where there is one. For another project its
        state dicts as safetensors, a file a network, or one file where its names tell the networks apart.

        Returns:
            The files' paths, without config.json.

        Raises:
            OSError: could not be written; the old files are still whole.
        """
        folder = Path(folder)
        if self.target == OURS:
            chosen = [n for n in self.state_dicts if f"{n}_ema" not in self.state_dicts]
            for network in chosen:
                self.model(network).save_pretrained(folder)
            return [folder / f"{_part(network)}.safetensors" for network in chosen]
        dialect = DIALECTS[self.target]
        contents = {f"{network}.safetensors": tensors for network, tensors in self.state_dicts.items()}
        if dialect.prefixes:
            contents = {
                "checkpoint.safetensors": {
                    ("" if dialect.prefixes_named else dialect.prefixes[network]) + key: tensor
                    for network, tensors in self.state_dicts.items()
                    for key, tensor in tensors.items()
                }
            }
        files = {folder / name: safetensors.torch.save(_separate(t)) for name, t in contents.items()}
        write_together({path: lambda to, data=data: to.write_bytes(data) for path, data in files.items()})  # type: ignore[misc]
        return list(files)


def convert_checkpoint(
    checkpoint: str | Path | Mapping[str, Any] | Generator | Discriminator | Conversion,
    *,
    source: str | None = None,
    target: str = OURS,
    settings: Mapping[str, Any] | None = None,
) -> Conversion:
    """Convert networks between another project's tensors and ours, to the same function.

    Into ours, eval-mode outputs are equal to rounding, the state of the spectral normalization included. There and
    back gives the same bits when the `Conversion` itself is given back. From our network alone, tensors that the
    other code does not read are missing (voletiv's block5.snconv2d0; load with strict=False), and BigGAN and the
    official code get the u from which they find our v. Those two then take σ = |W v|: that of a network which came
    from them; for one trained here half an iteration more than our uᵀWv, which is nothing once u and v have settled.

    Args:
        checkpoint: a file, read without running anything in it (`read_file`); a mapping of names to tensors or
            arrays, or of networks' names to such; one of our networks, its model folder or a zoo entry; or a
            conversion to go on from.
        source: whose tensors they are, one of `DIALECTS`; found by their names when None.
        target: sagan_kernels, or one of `DIALECTS`.
        settings: what no tensor tells and the project's usual code is not right about: `norm_eps` and `upsample` of
            the generator, `shortcut_relu` of the discriminator (mmgeneration's "wReLUinplace" models). On the way
            out they are what the code there will be run with; what is its own option (BigGAN's BN_eps and D_wide,
            mmgeneration's norm_eps and in-place activations) must be given there as our config has it.

    Raises:
        FileNotFoundError: no such file.
        TypeError: `checkpoint` is none of these.
        ValueError: no such project, a file that is damaged or needs more than tensors, or a network that the target
            cannot hold: the message names the first difference.
    """
    asked = dict(settings or {})
    for key in asked:
        if not any(key in keys for keys in UNTOLD.values()):
            known = ", ".join(sorted({key for keys in UNTOLD.values() for key in keys}))
            raise ValueError(f"convert_checkpoint: settings must be among {known}, got {key!r}")
    target = ALIASES.get(target, target)
    if target not in (OURS, *DIALECTS):
        raise ValueError(f"convert_checkpoint: target must be {_choices(target, [OURS, *DIALECTS])}")
    ours = checkpoint if isinstance(checkpoint, Conversion) else _ours(checkpoint, source, asked)
    if ours.target != OURS:
        raise ValueError(
            f"convert_checkpoint: a Conversion must be one to {OURS}, got {ours.target}; give its state dicts"
        )
    if target == OURS:
        return ours
    state_dicts = {
        network: to_host(
            Network(ours.configs[network], tensors, ours.kept[network] if ours.source == target else {}),
            target, DIALECTS[target], _part(network), _for(network, asked),
        )
        for network, tensors in ours.state_dicts.items()
    }  # fmt: skip
    return Conversion(ours.source, target, state_dicts, ours.configs, {})


def _ours(checkpoint: Any, source: str | None, settings: Mapping[str, Any]) -> Conversion:
    """A conversion to our names of whatever was given."""
    models = []
    if isinstance(checkpoint, Generator | Discriminator):
        models = [checkpoint]
    elif isinstance(checkpoint, str | Path) and not Path(checkpoint).is_file():
        models = _folder(checkpoint)
    if models:
        return Conversion(
            OURS,
            OURS,
            {model.part: _separate(model.state_dict()) for model in models},
            {model.part: model.config for model in models},
            {model.part: {} for model in models},
        )
    found = read_file(Path(checkpoint)) if isinstance(checkpoint, str | Path) else tensors_in(checkpoint)
    name, networks = _recognize(found, source)
    converted = {
        network: from_host(tensors, name, DIALECTS[name], _part(network), _for(network, settings))
        for network, tensors in networks.items()
    }
    return Conversion(
        name,
        OURS,
        {network: result.state_dict for network, result in converted.items()},
        {network: result.config for network, result in converted.items()},
        {network: result.kept for network, result in converted.items()},
    )


def _folder(name_or_dir: str | Path) -> list[Generator | Discriminator]:
    """The networks of a model folder or zoo entry; none where it is neither."""
    if not (Path(name_or_dir) / "config.json").is_file() and str(name_or_dir) not in zoo.list_models():
        return []
    config = hub.read_config(hub.resolve(name_or_dir))
    return [cls.from_pretrained(name_or_dir) for part, cls in NETWORKS.items() if part in config]


def _recognize(
    found: Mapping[str, Mapping[str, Tensor]], source: str | None
) -> tuple[str, dict[str, dict[str, Tensor]]]:
    """The dialect of these state dicts, and its networks among them, without prefixes."""
    names = list(DIALECTS)
    if source is not None:
        asked = ALIASES.get(source, source)
        names = [name for name in names if name == asked or name.startswith(f"{asked}_")]
        if not names:
            raise ValueError(f"convert_checkpoint: source must be {_choices(source, list(DIALECTS))}")
    for name in names:
        networks = _networks(found, DIALECTS[name])
        if networks:
            return name, networks
    keys = [key for tensors in found.values() for key in tensors]
    others = [name for name in DIALECTS if name not in names and _networks(found, DIALECTS[name])]
    told = f"; they look like {others[0]}'s" if others else ""
    if any(".parametrizations." in key or key.startswith("to_image.") for key in keys):
        told = "; our own networks are given as a model or a model folder, which tell their settings"
    raise ValueError(
        f"convert_checkpoint: must be a SAGAN of {', '.join(names)}, got tensors such as {', '.join(keys[:3])}{told}"
    )


def _networks(found: Mapping[str, Mapping[str, Tensor]], dialect: Dialect) -> dict[str, dict[str, Tensor]]:
    """The networks that are of this dialect; nothing unless all are."""
    networks: dict[str, dict[str, Tensor]] = {}
    for label, tensors in found.items():
        kept = {
            k: t for k, t in tensors.items() if not (dialect.ignored and re.fullmatch(dialect.ignored, k))
        }
        groups = {
            network: {
                key.removeprefix("" if dialect.prefixes_named else prefix): tensor
                for key, tensor in kept.items()
                if key.startswith(prefix)
            }
            for network, prefix in dialect.prefixes.items()
        }
        groups = {network: group for network, group in groups.items() if group} or {label: kept}
        if dialect.prefixes and sum(map(len, groups.values())) != len(kept):
            return {}
        for where, group in groups.items():
            group = {key.removeprefix("module."): tensor for key, tensor in group.items()}
            part = next((p for p in NETWORKS if _marked(group, part_of(dialect, p).mark)), None)
            if part is None:
                return {}
            network = part + ("_ema" if "ema" in where.lower() and part == "generator" else "")
            if network in networks:
                raise ValueError(f"convert_checkpoint: must hold one {network}, got two; give one state dict")
            networks[network] = group
    return networks


def _marked(tensors: Mapping[str, Tensor], mark: str) -> bool:
    return any(key.startswith(mark) for key in tensors)


def _part(network: str) -> str:
    return network.removesuffix("_ema")


def _for(network: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key in UNTOLD[_part(network)]}


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that share no memory, as the format wants."""
    return {key: tensor.clone().contiguous() for key, tensor in tensors.items()}


def _choices(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"one of {', '.join(known)}, got {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")
