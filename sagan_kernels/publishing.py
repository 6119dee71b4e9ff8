"""A zoo entry as a repository of the Hugging Face Hub: config, weights, pictures, and a card made from the entry.

The card's figures come from `[weights]`, its settings from `[train]`; what only a person can say (how it was trained,
where the data comes from, what it is good for) is taken from `zoo/<name>/README.md`. An entry that lacks any of it
is not published.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sagan_kernels import sampling, timm_settings, zoo
from sagan_kernels.files import write_atomically
from sagan_kernels.hub import read_config
from sagan_kernels.hub_transfer import LIBRARY_NAME, PIPELINE_TAG, is_repo_id, push, told_names
from sagan_kernels.models import Discriminator, Generator
from sagan_kernels.nn import SelfAttention2d

SECTIONS = ("Figures", "Training", "Data", "Use and limits", "Licence and citation")
WEIGHTS_KEYS = ("license", "score", "fid", "num_images", "seed", "compute")
DATA_KEYS = ("name", "license")


def repositories(name: str | None, repo: str, *, every: bool = False) -> dict[str, str]:
    """Entry -> repository: one entry and its repository, or with `every` all that have weights and their namespace.

    Raises:
        ValueError: both or neither of `name` and `every`, no such entry, or `repo` is not namespace/name (with
            `every`: not a namespace).
    """
    if every == (name is not None):
        raise ValueError(f"publish: must have either a NAME or --all, got {'both' if every else 'neither'}")
    if name is not None:
        if not is_repo_id(repo):
            raise ValueError(f"--repo: must be namespace/name, got {repo!r}")
        zoo.weights_folder(name)
        return {name: repo}
    if not is_repo_id(f"{repo}/x"):
        raise ValueError(f"--repo: must be a namespace with --all, got {repo!r}")
    return {entry: f"{repo}/{entry.replace('_', '-')}" for entry in zoo.list_models(pretrained=True)}


def publish(
    repositories: Mapping[str, str],
    *,
    token: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
) -> dict[str, str]:
    """Push entries, each as one commit; nothing is pushed before all are complete.

    Args:
        repositories: entry -> "namespace/name".
        token: of an account that may write; None for the stored one.
        private: of a repository that is made.
        create_pr: open pull requests instead.

    Returns:
        Entry -> URL of the commit or pull request.

    Raises:
        ValueError, FileNotFoundError: as `write_folder`.
        PermissionError, ConnectionError: as `hub_transfer.push`.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folders = {
            name: write_folder(name, repo, Path(temporary) / name) for name, repo in repositories.items()
        }
        return {
            name: push(
                repositories[name],
                folder,
                message=f"Publish {name}",
                token=token,
                private=private,
                create_pr=create_pr,
                where="publish",
            )
            for name, folder in folders.items()
        }


def write_folder(name: str, repo_id: str, folder: Path) -> Path:
    """Write what is published of entry `name`: both networks, config.json, README.md, recipe and pictures.

    Raises:
        ValueError: a key or section is missing, card and entry disagree, or the weights are damaged.
        FileNotFoundError: no card, no samples, or no weights.
        OSError: could not be written.
    """
    entry = zoo.entry(name)
    source = zoo.weights_folder(name)
    title, intro, sections = _read_card(entry)
    generator = Generator.from_pretrained(name)
    critic = Discriminator.from_pretrained(name)
    samples = source / "samples.png"
    if not samples.is_file():
        raise FileNotFoundError(
            f"publish: {samples} must be there, got nothing; sagan sample --grid draws it"
        )
    for part in (Generator.part, Discriminator.part):
        _copy(source / f"{part}.safetensors", folder)
    for path in (samples, entry.path):
        _copy(path, folder)
    # one repository serves our loader and timm's
    settings = timm_settings.config(entry, critic.class_names, critic.linear.in_features)
    config = json.dumps(read_config(source) | settings, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / "config.json", lambda temporary: temporary.write_text(config, encoding="utf-8"))
    looks = ""
    if (pictured := attention_picture(generator)) is not None:
        sheet, largest = pictured
        write_atomically(folder / "attention.png", lambda temporary: sheet.save(temporary, "PNG"))
        looks = _looks(max(map(int, generator.attention)), largest)
    text = _card(entry, repo_id, title, intro, sections, generator, looks)
    write_atomically(folder / "README.md", lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return folder


@torch.no_grad()
def attention_picture(generator: Generator, images: int = 4) -> tuple[Image.Image, float] | None:
    """Where samples look: a row for each, the image and the attention maps of three of its points, marked red.

    Args:
        generator: in eval mode.
        images: number of rows; their classes are spread evenly over all.

    Returns:
        The sheet, and the median over all points of the largest weight in a point's map: 1 where attention picks a
        single place. None for a generator without attention.
    """
    if not generator.attention:
        return None
    side = max(map(int, generator.attention))
    layer = generator.attention[str(side)]
    assert isinstance(layer, SelfAttention2d)
    K = generator.num_classes
    labels = [i * K // images for i in range(images)] if K else [None] * images
    z = torch.stack([sampling.latent(seed, label, generator.z_dim) for seed, label in enumerate(labels)])
    inputs: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        drawn = sampling.to_bytes(generator(z, torch.tensor(labels) if K else None))
    finally:
        hook.remove()
    maps = layer.attention_map(inputs[0]).numpy()  # (B, L, side / 2, side / 2)
    panels = []
    for x, rows in zip(drawn, maps, strict=True):
        image = Image.fromarray(np.broadcast_to(x, (*x.shape[:2], 3)).copy())
        panels.append(image)
        for y in (side // 4, side // 2, 3 * side // 4):
            panels.append(_looking(image, rows[y * side + side // 2], (side // 2, y), side))
    return sampling.grid(panels, 4), float(np.median(maps.max((2, 3))))


def _read_card(entry: zoo.ZooEntry) -> tuple[str, str, dict[str, str]]:
    """Title, first paragraph and sections of an entry's own card, checked against its figures and licences."""
    path = entry.folder / "README.md"
    if not path.is_file():
        raise FileNotFoundError(f"publish: {path} must be there, got nothing; write the card first")
    for table, keys in (("weights", WEIGHTS_KEYS), ("data", DATA_KEYS)):
        for key in keys:
            if not (has := getattr(entry, table)) or has.get(key) in (None, ""):
                raise ValueError(
                    f"publish: {entry.path} must have {key!r} in [{table}], got {told_names(has or ())}"
                )
    text = re.sub(r"\A---\n.*?\n---\n", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    head, *parts = re.split(r"^## ", text, flags=re.MULTILINE)
    title, _, rest = head.strip().partition("\n")
    sections = {name.strip(): body.strip() for name, _, body in (part.partition("\n") for part in parts)}
    for section in SECTIONS:
        if not sections.get(section):
            raise ValueError(f"publish: {path} must have the section {section!r}, got {told_names(sections)}")
    weights = entry.weights or {}
    figures = (
        weights["score"],
        f"{weights['fid']:.3f}",
        f"{weights['num_images']:,}",
        f"seed {weights['seed']}",
    )
    terms = (f"`{weights['license']}`", f"`{entry.data['license']}`")
    for wanted, section in (*((f, "Figures") for f in figures), (terms[0], SECTIONS[-1]), (terms[1], "Data")):
        if wanted not in sections[section]:
            raise ValueError(
                f"publish: {path} must say {wanted} under {section!r}, as {entry.path.name} does, got nothing of it"
            )
    return title.removeprefix("# "), rest.strip().split("\n\n")[0], sections


def _card(
    entry: zoo.ZooEntry,
    repo_id: str,
    title: str,
    intro: str,
    sections: dict[str, str],
    generator: Generator,
    looks: str,
) -> str:
    argument = f", label={min(3, generator.num_classes - 1)}" if generator.num_classes else ""
    settings = "\n".join(f"{key} = {json.dumps(value)}" for key, value in entry.train.items())
    weights = entry.weights or {}
    return f"""---
{_front_matter(entry, generator)}
---

# {title}

{intro}

![Samples](samples.png)

```python
from sagan_kernels import Generator, sampling
generator = Generator.from_pretrained("{repo_id}")
images = [sample.image for sample in sampling.draw(generator, seeds=range(8){argument})]
```

`Discriminator.from_pretrained("{repo_id}")` gives the critic. Pin what you use with `revision=`.

## Figures

{sections["Figures"]}

{looks}## Training

{sections["Training"]}

Compute: {weights["compute"]}. Settings, of which `{entry.path.name}` is the whole file:

```toml
{settings}
```

## Data

{sections["Data"]}

## Use and limits

{sections["Use and limits"]}

## Licence and citation

{sections["Licence and citation"]}
"""


def _looks(side: int, largest: float) -> str:
    return f"""## Where it looks

![A sample a row, and where three of its points look](attention.png)

Left a sample; then, for the point in red, the attention map of the layer at {side}×{side} in yellow. In these
samples the place that a point looks at most has a median weight of {largest:.2f}; 1 would be a single place,
{4 / side**2:.3f} all places alike.

"""


def _front_matter(entry: zoo.ZooEntry, generator: Generator) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    weights = entry.weights or {}
    result = EvalResult(
        task_type=PIPELINE_TAG,
        dataset_type=re.sub(r"[^a-z0-9]+", "-", entry.data["name"].lower()).strip("-"),
        dataset_name=entry.data["name"],
        metric_type=weights["score"].lower(),
        metric_name=weights["score"],
        metric_value=weights["fid"],
        metric_args={"num_images": weights["num_images"], "seed": weights["seed"]},
    )
    data = ModelCardData(
        license=weights["license"],
        library_name=LIBRARY_NAME,
        pipeline_tag=PIPELINE_TAG,
        tags=["gan", "sagan", "self-attention", *(["class-conditional"] if generator.num_classes else [])],
        model_name=entry.name,
        eval_results=[result],
        data_license=entry.data["license"],
    )
    return data.to_yaml()


def _looking(image: Image.Image, weights: np.ndarray, point: tuple[int, int], side: int) -> Image.Image:
    """The image, dark, with one point's attention map (side / 2, side / 2) in yellow and the point in red."""
    glow = Image.fromarray((weights / weights.max() * 255).astype(np.uint8))
    mark = Image.new("L", (side, side))
    mark.putpixel(point, 255)
    panel = image.point(lambda value: value * 2 // 5)
    for color, where in (("yellow", glow), ("red", mark)):
        panel.paste(color, mask=where.resize(image.size, Image.Resampling.NEAREST))
    return panel


def _copy(path: Path, folder: Path) -> None:
    write_atomically(folder / path.name, lambda temporary: shutil.copyfile(path, temporary))
