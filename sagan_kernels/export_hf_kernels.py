"""The attention layer as a kernel repository of Hugging Face's `kernels`.

python -m sagan_kernels.export_hf_kernels OUT

A kernel repository holds Python files that import nothing but PyTorch and each other, once for each kind of device.
These are this package's operators, kernels and layer with their imports made relative, and with a namespace for their
operators that no other version and no installed package has.
"""

import argparse
import base64
import hashlib
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import sagan_kernels
from sagan_kernels.nn import SelfAttention2d

NAME = "sagan-attention"
LAYER = SelfAttention2d.kernel_layer_name
BACKENDS = ("cpu", "cuda", "rocm")
LICENSE = "MIT"
_PARTS = ("reference.py", "kernels", "ops", "nn/attention.py")

_LAYERS = f'''"""Layers whose forward `kernels.kernelize` takes; parameters are those of the layer it is given to."""

from torch import Tensor, nn

from .nn.attention import SelfAttention2d


class {LAYER}(nn.Module):
    """`sagan_kernels.nn.SelfAttention2d`."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return SelfAttention2d.forward(self, x)
'''

_INIT = '''"""Self-attention of SAGAN: fused Triton kernels, forward, backward and double backward."""

from . import layers
from .ops import attention, sagan_attention

__all__ = ["attention", "layers", "sagan_attention"]
'''

_CARD = """---
license: {license}
library_name: kernels
tags:
- kernels
- gan
---

# {name}

SAGAN's self-attention as fused Triton kernels with first and second gradients, from sagan-kernels {package}.

```python
from kernels import LayerRepository, Mode, kernelize, use_kernel_mapping
from sagan_kernels.nn import SelfAttention2d

repository = LayerRepository("{repo}", layer_name="{layer}", version={version}, trust_remote_code=True)
with use_kernel_mapping({{"{layer}": {{"cuda": repository}}}}):
    model = kernelize(model, mode=Mode.TRAINING, device="cuda")
```

`model` has `SelfAttention2d` layers, or layers of your own with `kernel_layer_name = "{layer}"` and its attributes
`query`, `key`, `value`, `out` (1×1 convolutions) and `gamma`.

`get_kernel("{repo}", version={version})` gives `attention` and `sagan_attention`.
"""


def export(out: str | Path, *, version: int = 1, repo: str = "namespace/sagan-attention") -> Path:
    """Write the kernel repository to the folder `out`, whole or not at all, in place of what was there.

    Args:
        out: a new folder, or one that an earlier export has written.
        version: of the interface; a repository has a branch `v1` for version 1.
        repo: the repository's name on the Hub, for its card.

    Returns:
        `out`.

    Raises:
        ValueError: version below 1, or a folder that holds other things.
    """
    out = Path(out)
    if version < 1:
        raise ValueError(f"export_hf_kernels: version must be at least 1, got {version}; begin with 1")
    known = {"build", "README.md"}
    if out.is_file() or (out.is_dir() and not {path.name for path in out.iterdir()} <= known):
        raise ValueError(
            f"{out}: must be a new folder or an earlier export, got something else there; name another"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        folder = Path(temporary) / out.name
        for backend in BACKENDS:
            _write_variant(folder / "build" / f"torch-{backend}", backend, version)
        card = _CARD.format(
            license=LICENSE.lower(),
            name=NAME,
            package=sagan_kernels.__version__,
            repo=repo,
            layer=LAYER,
            version=version,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)
    return out


def _write_variant(folder: Path, backend: str, version: int) -> None:
    files = {"__init__.py": _INIT, "layers.py": _LAYERS, "nn/__init__.py": '"""Modules."""\n'}
    package = Path(__file__).parent
    for part in _PARTS:
        for path in sorted((package / part).rglob("*.py")) if (package / part).is_dir() else [package / part]:
            name = path.relative_to(package).as_posix()
            files[name] = _relative(path.read_text(encoding="utf-8"), depth=name.count("/") + 1)
    digest = hashlib.sha256(json.dumps([files, backend, version], sort_keys=True).encode()).hexdigest()[:8]
    unique = f"{NAME.replace('-', '_')}_{backend}_{digest}"
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(_own_namespace(text, unique), encoding="utf-8")
    metadata = {
        "id": unique,
        "name": NAME,
        "version": version,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": {name: _sha256(folder / name) for name in sorted(files)}},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def _relative(text: str, depth: int) -> str:
    """Imports of this package as imports of the folder's own files."""
    dots = "." * depth
    text = re.sub(r"^( *)from sagan_kernels import ", rf"\1from {dots} import ", text, flags=re.M)
    return re.sub(r"^( *)from sagan_kernels\.", rf"\1from {dots}", text, flags=re.M)


def _own_namespace(text: str, unique: str) -> str:
    """Operators under a name of this very export: one process may hold several, and the package itself."""
    text = text.replace("torch.ops.sagan_kernels", f"torch.ops.{unique}").replace(
        "sagan_kernels::", f"{unique}::"
    )
    return text.replace('Library("sagan_kernels"', f'Library("{unique}"')


def _sha256(path: Path) -> str:
    return base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--version", type=int, default=1, help="of the interface (default: 1)")
    parser.add_argument(
        "--repo", default="namespace/sagan-attention", help="its name on the Hub, for the card"
    )
    arguments = parser.parse_args()
    try:
        print(export(arguments.out, version=arguments.version, repo=arguments.repo))
    except (OSError, ValueError) as error:
        sys.exit(f"export_hf_kernels: {error}")


if __name__ == "__main__":
    main()
