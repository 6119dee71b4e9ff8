"""Draws the images that sagan_32_avatars was trained on, and checks that they are the same to the bit.

    python -m venv avatars && avatars/bin/pip install numpy==2.4.6 pillow==13.0.0 dicebear-core==10.7.0 \\
        dicebear-styles==10.6.0 dicebear-schema==2.0.2 resvg-py==0.5.0
    avatars/bin/python zoo/data/avatars.py avatars_32.npz

Sixteen styles of DiceBear, each CC0 1.0, with 2,000 avatars of different pixels a style, drawn from the seeds
"<style>-0", "<style>-1", ... at 64 px and averaged 2×2. Three styles have no background of their own: theirs are
pastels, listed in avatars_backgrounds.npz.
"""

import hashlib
import io
import json
import sys
from pathlib import Path

import dicebear_styles
import numpy as np
import resvg_py
from dicebear import Avatar, Style
from PIL import Image

STYLES = [
    "critters", "clay", "moods", "marbles", "sprouts", "planets", "landscape", "voxel-art", "voxel-bot", "cutouts",
    "open-peeps", "pixel-art", "shadows", "stack", "cameo", "thumbs",
]  # fmt: skip
COUNT = 2000
SHA256 = (
    "89d75a029af82abf35fdee975ceee38d66ba91de8be515fb4756bffb6eca5149"  # of images, uint8 (32000, 32, 32, 3)
)


def draw(style: Style, seed: str) -> Image.Image:
    """One avatar, 64 px, RGBA."""
    svg = Avatar(style, {"seed": seed, "size": 64}).to_string()
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")


def main(out: Path) -> None:
    """Write the pack to `out`; fails where the images are others than those of the training run."""
    folder = Path(next(iter(dicebear_styles.__path__)))
    backgrounds = np.load(Path(__file__).with_name("avatars_backgrounds.npz"))
    images = []
    for name in STYLES:
        style, seen, seed = Style(json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))), set(), 0
        while len(seen) < COUNT:
            image = draw(style, f"{name}-{seed}")
            seed += 1
            if image.tobytes() in seen:
                continue
            if name in backgrounds:
                color = tuple(int(c) for c in backgrounds[name][len(seen)])
                seen.add(image.tobytes())
                image = Image.alpha_composite(Image.new("RGBA", image.size, (*color, 255)), image)
            else:
                seen.add(image.tobytes())
            whole = np.asarray(image.convert("RGB")).reshape(32, 2, 32, 2, 3)
            images.append(np.round(whole.mean((1, 3))).astype(np.uint8))
        print(f"{name}: {seed} seeds", flush=True)
    pack = np.stack(images)
    found = hashlib.sha256(pack.tobytes()).hexdigest()
    if found != SHA256:
        sys.exit(
            f"avatars: sha256 must be {SHA256[:12]}…, got {found[:12]}…; use the versions named in this file"
        )
    np.savez_compressed(out, images=pack, labels=np.repeat(np.arange(len(STYLES)), COUNT), class_names=STYLES)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
