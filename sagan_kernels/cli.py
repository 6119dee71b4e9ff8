"""The `sagan` command. Each command parses, calls one public function, and says where the result is."""

import difflib
import json
import re
import time
from pathlib import Path
from typing import Any, Literal

import click
import torch
from PIL import Image

import sagan_kernels
from sagan_kernels import deployment, doctor, evaluation, hub, sampling, zoo
from sagan_kernels.conversion import convert_checkpoint
from sagan_kernels.data import load_images
from sagan_kernels.evaluation import Scorer
from sagan_kernels.features import FeatureNet, load_feature_net, save_feature_net, train_feature_net
from sagan_kernels.files import write_atomically
from sagan_kernels.hub_transfer import Access
from sagan_kernels.models import Discriminator, Generator
from sagan_kernels.one_line_errors import OneLineErrors, usage
from sagan_kernels.ops import choose
from sagan_kernels.recipe import load_recipe
from sagan_kernels.swap_command import swap

MAX_SEEDS = 1_000_000
SPLITS: tuple[Literal["train", "test"], ...] = ("train", "test")
BROKEN = click.option(
    "--broken",
    type=click.Choice(["refuse", "skip"]),
    default="refuse",
    show_default=True,
    help="What to do with an image that cannot be decoded.",
)
REVISION = click.option(
    "--revision", metavar="REV", help="Branch, tag or commit of a Hub repository  [default: main]"
)
DATA_HELP = "Folder of images, .npz pack, or folder of Fashion-MNIST's IDX files."


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(sagan_kernels.__version__, package_name="sagan-kernels")
def cli() -> None:
    """Self-Attention GANs: draw images, train, score, see what the zoo has."""


@cli.command(
    epilog="\b\nsagan sample sagan_32_fashion --seeds 0-15 --label 3 --truncation 0.7\n"
    "sagan sample sagan_32_fashion --seeds 0-7 --label all --grid grid.png"
)
@click.argument("model")
@click.option("--seeds", default="0-15", show_default=True, metavar="LIST", help="One image each: 1,4-6.")
@click.option("--label", metavar="CLASS", help="Index or name, or `all`  [default: random, by the seed]")
@click.option("--truncation", type=float, help="Redraw latents beyond this many standard deviations.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="One PNG an image  [default: samples]"
)
@click.option(
    "--grid",
    type=click.Path(path_type=Path),
    metavar="PNG",
    help="One labelled sheet; --out then has no default.",
)
@click.option("--device", metavar="NAME", help="cpu, cuda, ...  [default: a GPU if there is one]")
@REVISION
def sample(
    model: str,
    seeds: str,
    label: str | None,
    truncation: float | None,
    batch_size: int,
    out: Path | None,
    grid: Path | None,
    device: str | None,
    revision: str | None,
) -> None:
    """Draw images from MODEL: a name of the zoo (see `sagan list`), a model folder or a Hub repository."""
    start = time.perf_counter()
    with usage():
        numbers = parse_seeds(seeds)
        if truncation is not None and not truncation > 0:
            raise ValueError(f"--truncation: must be positive, got {truncation}; leave it out for none")
        if grid is not None and grid.suffix.lower() != ".png":
            raise ValueError(f"--grid: must end in .png, got {str(grid)!r}")
        folder = hub.resolve(model, "generator", Access(revision=revision))
    device = _device(device)
    generator = Generator.from_pretrained(folder).to(device)
    with usage():
        labels = parse_label(label, generator)
    if out is None and grid is None:
        out = Path("samples")

    samples = []
    for drawn in sampling.draw(
        generator, numbers, label=labels, truncation=truncation, batch_size=batch_size
    ):
        if grid is not None:
            samples.append(drawn)
        if out is not None:
            name = f"seed{drawn.seed:04d}" + ("" if drawn.label is None else f"_label{drawn.label}")
            _save(drawn.image, out / f"{name}.png")
    count = len(numbers) * (len(labels) if isinstance(labels, list) else 1)
    if out is not None:
        click.echo(f"{count} images in {out}")
    if grid is not None:
        _save(_sheet(samples, generator, len(numbers), rows=isinstance(labels, list)), grid)
        click.echo(f"grid of {count} images: {grid}")
    impl = choose(None, torch.empty(0, device=device))
    click.echo(f"{time.perf_counter() - start:.1f} s on {device}, implementation: {impl}")


@cli.command("list")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def list_command(as_json: bool) -> None:
    """List the zoo's models."""
    entries = [zoo.entry(name) for name in zoo.list_models()]
    if as_json:
        rows = [
            {
                "name": entry.name,
                "resolution": entry.generator.get("resolution"),
                "num_classes": entry.generator.get("num_classes"),
                "pretrained": entry.weights is not None,
                "weights": entry.weights or {},
            }
            for entry in entries
        ]
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False, default=str))
        return
    width = max([4, *(len(entry.name) for entry in entries)])
    click.echo(f"{'name':{width}}  px   classes  pretrained  scores")
    for entry in entries:
        cells = (
            f"{entry.name:{width}}",
            f"{entry.generator.get('resolution')!s:3}",
            f"{entry.generator.get('num_classes')!s:7}",
            f"{'no' if entry.weights is None else 'yes':10}",
            ", ".join(f"{k} {v:g}" for k, v in (entry.weights or {}).items() if type(v) in (int, float)),
        )
        click.echo("  ".join(cells).rstrip())


@cli.command(epilog="\b\nsagan train zoo/sagan_32_fashion.toml --data fashion-mnist --out runs/fashion")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--data", required=True, type=click.Path(path_type=Path), metavar="PATH", help=DATA_HELP)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Run folder  [default: runs/RECIPE]"
)
@click.option("--features", metavar="NAME", help="Feature network that scores  [default: the recipe's]")
@BROKEN
@click.option("--device", metavar="NAME", help="cpu, cuda, ...  [default: a GPU if there is one]")
def train(
    recipe: Path,
    data: Path,
    out: Path | None,
    features: str | None,
    broken: Literal["refuse", "skip"],
    device: str | None,
) -> None:
    """Train the networks of RECIPE, a TOML file such as those in zoo/.

    Given again, the command goes on where the run folder stopped. With a feature network, samples are scored
    and best/ holds the best networks so far; `sagan sample` and `sagan evaluate` read that folder.
    """
    from sagan_kernels.training import train as run

    with usage():
        loaded, entry = load_recipe(recipe), zoo.read_entry(recipe)
        network = Generator(**loaded.generator)
        name = features or entry.data.get("features")
        device = _device(device)
        net = None if name is None else _feature_net(name, device)
    out = out or Path("runs") / loaded.name
    images = load_images(
        data, resolution=network.resolution, channels=network.config["image_channels"], broken=broken
    )
    scorer = None
    if net is not None:
        evaluation.check_fit(network, net, images)
        scorer = Scorer(net, images, conditional=bool(network.num_classes))
    best = run(loaded, images, out, scorer=scorer, device=device)
    click.echo(f"best: {_told(best)}")
    click.echo(f"{loaded.train.total_steps} steps in {out}; networks in {out / 'best'}")


@cli.command(epilog="\b\nsagan evaluate sagan_32_fashion --data fashion-mnist")
@click.argument("model")
@click.option("--data", required=True, type=click.Path(path_type=Path), metavar="PATH", help=DATA_HELP)
@click.option(
    "--images", "num_images", type=click.IntRange(2), help="Samples  [default: as many as test images]"
)
@click.option("--truncation", type=float, help="Redraw latents beyond this many standard deviations.")
@click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of the samples."
)
@click.option("--features", metavar="NAME", help="Feature network: zoo name or file  [default: the entry's]")
@click.option("--neighbors", type=click.Path(path_type=Path), metavar="PNG",
              help="A sheet of samples beside their nearest training images.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@BROKEN
@click.option("--device", metavar="NAME", help="cpu, cuda, ...  [default: a GPU if there is one]")
@REVISION
def evaluate(
    model: str,
    data: Path,
    num_images: int | None,
    truncation: float | None,
    seed: int,
    features: str | None,
    neighbors: Path | None,
    as_json: bool,
    broken: Literal["refuse", "skip"],
    device: str | None,
    revision: str | None,
) -> None:
    """Score samples of MODEL against real images, beside what held-out real images score.

    The Frechet distance is measured in the space of a small network trained on the same data and is named
    after it; it must not be compared with distances in Inception's space.
    """
    with usage():
        if truncation is not None and not truncation > 0:
            raise ValueError(f"--truncation: must be positive, got {truncation}; leave it out for none")
        folder = hub.resolve(model, "generator", Access(revision=revision))
        name = features or (zoo.entry(model).data.get("features") if model in zoo.list_models() else None)
        if name is None:
            raise ValueError(
                f"--features: must be given for {model}, a folder, got nothing; `sagan features` makes one"
            )
        if neighbors is not None and neighbors.suffix.lower() != ".png":
            raise ValueError(f"--neighbors: must end in .png, got {str(neighbors)!r}")
        device = _device(device)
        net = _feature_net(name, device)
    generator = Generator.from_pretrained(folder).to(device)
    channels = generator.config["image_channels"]
    real, held_out = (
        load_images(data, resolution=generator.resolution, channels=channels, split=split, broken=broken)
        for split in SPLITS
    )
    evaluation.check_fit(generator, net, real)
    scorer = Scorer(net, real, conditional=bool(generator.num_classes))
    result = evaluation.evaluate(
        generator, scorer, real, held_out,
        num_images=num_images or len(held_out), truncation=truncation, seed=seed,
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        for who, scores in result.items():
            click.echo(f"{who:10} {_told(scores) if isinstance(scores, dict) else scores}")
    if neighbors is not None:
        _save(evaluation.neighbor_sheet(generator, real, truncation=truncation, seed=seed), neighbors)


@cli.command(
    "features",
    epilog="\b\nsagan features fashion-cnn --data fashion-mnist --channels 1 --out fashion-cnn.safetensors",
)
@click.argument("name")
@click.option("--data", required=True, type=click.Path(path_type=Path), metavar="PATH", help=DATA_HELP)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), metavar="FILE", help="A .safetensors file."
)
@click.option("--resolution", type=click.IntRange(8), default=32, show_default=True)
@click.option("--channels", type=click.Choice(["1", "3"]), default="3", show_default=True)
@BROKEN
@click.option("--epochs", type=click.IntRange(1), default=6, show_default=True)
def features_command(
    name: str,
    data: Path,
    out: Path,
    resolution: int,
    channels: str,
    epochs: int,
    broken: Literal["refuse", "skip"],
) -> None:
    """Train a feature network called NAME: the space that scores are measured in."""
    with usage():
        if out.suffix != ".safetensors":
            raise ValueError(f"--out: must end in .safetensors, got {str(out)!r}")
    real, held_out = (
        load_images(data, resolution=resolution, channels=int(channels), split=split, broken=broken)
        for split in SPLITS
    )
    net = train_feature_net(real, name, epochs=epochs)
    accuracy = Scorer(net, real).score(held_out).accuracy
    save_feature_net(net, out, accuracy=accuracy, test_images=len(held_out))
    click.echo(f"accuracy on {len(held_out)} held-out images: {accuracy:.4f}")
    click.echo(f"feature network: {out}")


@cli.command(
    epilog="\b\nsagan publish sagan_32_fashion --repo me/sagan-32-fashion --dry-run\n"
    "sagan publish --all --repo me --private"
)
@click.argument("name", required=False)
@click.option("--repo", required=True, metavar="ORG/NAME", help="Repository; with --all its namespace.")
@click.option("--all", "every", is_flag=True, help="Every model of the zoo that has weights.")
@click.option("--private", is_flag=True, help="Make new repositories private.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--dry-run", is_flag=True, help="Write what would be pushed to --out.")
@click.option("--out", type=click.Path(path_type=Path), default="published", show_default=True, metavar="DIR")
def publish(
    name: str | None, repo: str, every: bool, private: bool, create_pr: bool, dry_run: bool, out: Path
) -> None:
    """Push the zoo's model NAME to the Hugging Face Hub: networks, card, pictures and recipe."""
    from sagan_kernels import publishing

    with usage():
        repositories = publishing.repositories(name, repo, every=every)
    if dry_run:
        for entry, repo_id in repositories.items():
            click.echo(f"{repo_id}: {publishing.write_folder(entry, repo_id, out / entry)}")
        return
    for entry, url in publishing.publish(repositories, private=private or None, create_pr=create_pr).items():
        click.echo(f"{entry}: {url}")


@cli.command(
    epilog="\b\nsagan convert model=G-best-weights-step=120000.pth --from studiogan --out converted\n"
    "sagan convert converted --to biggan_pytorch --out back"
)
@click.argument("checkpoint", metavar="PATH")
@click.option(
    "--from", "source", metavar="NAME", help="The project it is from  [default: found by its tensors]"
)
@click.option(
    "--to", "target", default="sagan_kernels", show_default=True, metavar="NAME", help="Whose names to write."
)
@click.option(
    "--norm-eps", type=float, help="Of the generator's batch norms, where the project's default is not right."
)
@click.option(
    "--shortcut-relu/--no-shortcut-relu", default=None, help="In-place ReLUs in the discriminator, likewise."
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="For the networks."
)
def convert(
    checkpoint: str,
    source: str | None,
    target: str,
    norm_eps: float | None,
    shortcut_relu: bool | None,
    out: Path,
) -> None:
    """Convert PATH, another project's checkpoint, to a model folder; or a model folder to another project's names.

    Projects: biggan_pytorch, studiogan, mimicry, mmgeneration, voletiv, official. Nothing in the file is run.
    """
    told = {"norm_eps": norm_eps, "shortcut_relu": shortcut_relu}
    with usage():
        conversion = convert_checkpoint(
            checkpoint,
            source=source,
            target=target,
            settings={k: v for k, v in told.items() if v is not None},
        )
    files = conversion.save(out)
    click.echo(f"{', '.join(conversion.state_dicts)} of {conversion.source}, for {conversion.target}:")
    for file in files:
        click.echo(f"  {file}")


@cli.command(
    epilog="\b\nsagan export sagan_32_avatars --out avatars.onnx\n"
    "sagan export sagan_32_fashion --part discriminator --out critic.pt2"
)
@click.argument("model")
@click.option(
    "--part", type=click.Choice(["generator", "discriminator"]), default="generator", show_default=True
)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, metavar="FILE", help="Ends in .onnx or .pt2."
)
@REVISION
def export(model: str, part: str, out: Path, revision: str | None) -> None:
    """Write MODEL as a file that runs without this package, and compare its outputs before it is kept.

    MODEL is a name of the zoo, a model folder or a Hub repository. A .onnx file runs in onnxruntime and others, a .pt2
    file in PyTorch.
    """
    with usage():
        write = deployment.FORMATS.get(out.suffix.removeprefix("."))
        if write is None:
            raise ValueError(f"--out: must end in .onnx or .pt2, got {str(out)!r}")
        folder = hub.resolve(model, part, Access(revision=revision))
    network = (Generator if part == "generator" else Discriminator).from_pretrained(folder)
    difference = write(network, out)
    click.echo(f"{out}: {out.stat().st_size / 2**20:.1f} MiB, outputs equal to {difference:.0e}")


@cli.command(name="doctor", epilog="\b\nsagan doctor\nsagan doctor --json")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def doctor_command(as_json: bool) -> None:
    """Say what this machine has, what runs on it and why: paste it into an issue."""
    found = doctor.report()
    click.echo(json.dumps(found, indent=2) if as_json else doctor.text(found))


cli.add_command(swap)


def parse_seeds(text: str) -> list[int]:
    """'1,4-6' -> [1, 4, 5, 6].

    Raises:
        ValueError: a part is neither a number nor a rising range, or there are more than a million.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,18})(?:-([0-9]{1,18}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise ValueError(
                f"--seeds: must be numbers below 10**18 and rising ranges such as 1,4-6, got {part!r}"
            )
        if len(seeds) + last - first >= MAX_SEEDS:
            raise ValueError(f"--seeds: must be at most {MAX_SEEDS} seeds, got {text!r}")
        seeds += range(first, last + 1)
    return seeds


def parse_label(text: str | None, generator: Generator) -> int | list[int] | None:
    """An index or a class name -> the index; 'all' -> every index; None -> None.

    Raises:
        ValueError: out of range, no such class (with the nearest names), or the generator has no classes.
    """
    if text is None:
        return None
    K, names = generator.num_classes, generator.class_names or []
    if not K:
        raise ValueError(f"--label: must be left out for an unconditional model, got {text!r}")
    if text == "all":
        return list(range(K))
    if re.fullmatch(r"-?[0-9]{1,18}", text):
        if not 0 <= int(text) < K:
            raise ValueError(f"--label: must be 0 to {K - 1}, got {text}")
        return int(text)
    folded = [name.casefold() for name in names]
    if text.casefold() in folded:
        return folded.index(text.casefold())
    close = [names[folded.index(name)] for name in difflib.get_close_matches(text.casefold(), folded)]
    advice = f"did you mean {' or '.join(map(repr, close))}?" if close else ", ".join(names)
    raise ValueError(f"--label: must be 0 to {K - 1} or a class name, got {text!r}; {advice}".rstrip("; "))


def _sheet(samples: list[sampling.Sample], generator: Generator, columns: int, *, rows: bool) -> Image.Image:
    """The grid of `sample`: with `rows` one row a class, else images one after another, eight a row."""
    names = generator.class_names or [f"class {i}" for i in range(generator.num_classes)]
    if rows:
        titles = [f"seed {s.seed}" for s in samples]
        return sampling.grid([s.image for s in samples], columns, row_labels=names, titles=titles)
    titles = [f"{s.seed}" + ("" if s.label is None else f" {names[s.label]}") for s in samples]
    return sampling.grid([s.image for s in samples], 8, titles=titles)


def _feature_net(name: str, device: str = "cpu") -> FeatureNet:
    return load_feature_net(name if name.endswith(".safetensors") else zoo.feature_net(name)).to(device)


def _device(name: str | None) -> str:
    """A device that exists; None for a GPU if there is one."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name).cpu()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise click.UsageError(
            f"--device: must be one that PyTorch has here, such as cpu, got {name!r}; leave it out to choose"
        ) from error
    return name


def _told(scores: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {value if isinstance(value, int) else format(value, '.4g')}" for key, value in scores.items()
    )


def _save(image: Image.Image, path: Path) -> None:
    write_atomically(path, lambda temporary: image.save(temporary, "PNG"))
