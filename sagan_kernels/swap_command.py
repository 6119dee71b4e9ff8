"""`sagan swap`: try what a swap would do to a model of somebody's own, before they edit code."""

import importlib
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from torch import nn

from sagan_kernels.one_line_errors import usage
from sagan_kernels.swapping import swap_layers


@click.command(
    epilog="\b\nsagan swap --check train:make_generator\nsagan swap --check my_gan.models:build --json"
)
@click.option(
    "--check",
    "factory",
    required=True,
    metavar="MODULE:FACTORY",
    help="Called without arguments: returns a model, or several in a tuple, list or dict.",
)
@click.option("--no-attention", is_flag=True, help="Leave attention layers.")
@click.option("--no-spectral-norm", is_flag=True, help="Leave spectral norms.")
@click.option(
    "--no-verify", is_flag=True, help="Do not compare numbers: only layers known by name are swapped."
)
@click.option("--faithful", is_flag=True, help="Keep the bugs of a host's spectral norm.")
@click.option("--strict", is_flag=True, help="Fail where anything that looks swappable is not.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def swap(
    factory: str,
    no_attention: bool,
    no_spectral_norm: bool,
    no_verify: bool,
    faithful: bool,
    strict: bool,
    as_json: bool,
) -> None:
    """Say which layers of a GAN of your own `sagan_kernels.swap_layers` would swap, and prove it on random input.

    MODULE is imported from the current folder or the Python path: its code runs. Nothing is written.
    """
    with usage():
        models = dict(_models(_call(factory), factory))
    with warnings.catch_warnings(category=UserWarning, action="ignore"):  # the report has them
        reports = {
            name: swap_layers(
                model, attention=not no_attention, spectral_norm=not no_spectral_norm, verify=not no_verify,
                strict=strict, faithful=faithful,
            )
            for name, model in models.items()
        }  # fmt: skip
    if as_json:
        click.echo(json.dumps({name: report.to_dict() for name, report in reports.items()}, indent=2))
        return
    for report in reports.values():
        click.echo(report)


def _call(factory: str) -> Any:
    """What `module:factory` returns.

    Raises:
        ValueError: the words do not have that form, or there is no such module or factory.
    """
    module_name, _, name = factory.partition(":")
    if not module_name or not name:
        raise ValueError(f"--check: must be MODULE:FACTORY, such as train:make_generator, got {factory!r}")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # something that the module needs
        raise ValueError(
            f"--check: there must be a module {module_name!r} here or on the Python path, got none; see PYTHONPATH"
        ) from error
    made: Any = module
    for part in name.split("."):
        made = getattr(made, part, None)
    if isinstance(made, nn.Module):
        return made
    if not callable(made):
        raise ValueError(f"--check: {module_name} must have a function {name!r}, got {type(made).__name__}")
    return made()


def _models(made: Any, factory: str) -> Iterator[tuple[str, nn.Module]]:
    """The models in what the factory returned, with a name each."""
    parts = (
        made.items()
        if isinstance(made, dict)
        else enumerate(made if isinstance(made, tuple | list) else [made])
    )
    found = [(str(name), model) for name, model in parts if isinstance(model, nn.Module)]
    if not found:
        raise ValueError(
            f"--check: {factory} must return a torch.nn.Module or several, got {type(made).__name__}"
        )
    yield from found
