"""Networks as files that run without this package: ONNX, and PyTorch's exported programs (.pt2)."""

import copy
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sagan_kernels.files import write_atomically
from sagan_kernels.models import Discriminator, Generator
from sagan_kernels.nn import fold_spectral_norm

OPSET = 20
TOLERANCE = 1e-4
"""Largest difference of an exported network's output from the network's own, on the scale of images in [-1, 1]."""


def export_onnx(model: Generator | Discriminator, path: str | os.PathLike[str]) -> float:
    """Write `model` as an ONNX file in plain operators, and compare what onnxruntime makes of it.

    Inputs are `z` (batch, z_dim) and `label` (batch,) int64 of a generator, `x` (batch, C, H, W) and `label` of a
    discriminator; label only with classes. The output is `image` (batch, C, H, W) in [-1, 1], or `logit` (batch,). The
    batch is free. Spectral norm is folded, batch norm uses its stored statistics; the metadata has the config.

    Args:
        model: left as it is.
        path: of the file.

    Returns:
        The largest difference from the network's own output, float32, over batches of 1 and 3.

    Raises:
        ImportError: onnx, onnxruntime or onnxscript is missing.
        ValueError: the outputs differ by more than 1e-4; then nothing is written.
    """
    try:
        import onnxruntime  # type: ignore[import-untyped]
        import onnxscript  # noqa: F401  # what torch.onnx needs
    except ImportError as error:
        raise ImportError(
            f"export_onnx: must have onnx, onnxruntime and onnxscript, got no {error.name}; "
            'pip install "sagan-kernels[onnx]"'
        ) from error
    network, names = _plain(model), _input_names(model)
    output = "image" if isinstance(model, Generator) else "logit"
    with _plain_operators(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of the exporter's own code and of the two inputs sharing their batch
        program = torch.onnx.export(
            network, tuple(_inputs(model, 2)), dynamo=True, opset_version=OPSET, input_names=names,
            output_names=[output], dynamic_shapes={name: {0: "batch"} for name in names}, verbose=False,
        )  # fmt: skip
    assert program is not None
    program.model.metadata_props["sagan_kernels.config"] = json.dumps(model.config)
    worst = 0.0

    def write(temporary: Path) -> None:
        nonlocal worst
        program.save(str(temporary))
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])

        def run(*inputs: Tensor) -> Tensor:
            found = session.run([output], {name: t.numpy() for name, t in zip(names, inputs, strict=True)})
            return torch.from_numpy(found[0])

        worst = _worst(network, model, run, "export_onnx")

    write_atomically(path, write)
    return worst


def export_program(model: Generator | Discriminator, path: str | os.PathLike[str]) -> float:
    """Write `model` as a program of `torch.export` (.pt2), in PyTorch's operators, and compare what it computes.

    `torch.export.load(path).module()` runs it, with the inputs of `export_onnx` in that order; the batch is free.

    Returns:
        The largest difference from the network's own output, float32, over batches of 1 and 3.

    Raises:
        ValueError: the outputs differ by more than 1e-4; then nothing is written.
    """
    network = _plain(model)
    batch = torch.export.Dim("batch")
    with _plain_operators(), torch.no_grad():
        shapes = tuple({0: batch} for _ in _input_names(model))
        program = torch.export.export(network, tuple(_inputs(model, 2)), dynamic_shapes=shapes)
    worst = 0.0

    def write(temporary: Path) -> None:
        nonlocal worst
        with temporary.open("wb") as file:
            torch.export.save(program, file)
        with temporary.open("rb") as file:
            loaded = torch.export.load(file).module()
        with torch.no_grad():
            worst = _worst(network, model, loaded, "export_program")

    write_atomically(path, write)
    return worst


FORMATS = {"onnx": export_onnx, "pt2": export_program}


def _plain(model: Generator | Discriminator) -> nn.Module:
    """A copy for inference, on the CPU in float32."""
    return fold_spectral_norm(copy.deepcopy(model)).eval().requires_grad_(False).float().cpu()


def _input_names(model: Generator | Discriminator) -> list[str]:
    return ["z" if isinstance(model, Generator) else "x"] + ["label"] * (model.num_classes > 0)


def _inputs(model: Generator | Discriminator, count: int) -> list[Tensor]:
    """The same at every call, without a trace in anybody's random numbers."""
    random = torch.Generator().manual_seed(0)
    if isinstance(model, Generator):
        inputs = [torch.randn(count, model.z_dim, generator=random)]
    else:
        side, channels = model.resolution, model.config["image_channels"]
        inputs = [torch.rand(count, channels, side, side, generator=random) * 2 - 1]
    if model.num_classes:
        inputs.append(torch.randint(model.num_classes, (count,), generator=random))
    return inputs


def _worst(network: nn.Module, model: Generator | Discriminator, run: Any, where: str) -> float:
    worst = 0.0
    for count in (1, 3):
        inputs = _inputs(model, count)
        with torch.no_grad():
            expected = network(*inputs)
        scale = max(1.0, expected.abs().max().item())
        worst = max(worst, (run(*inputs) - expected).abs().max().item() / scale)
    if not worst <= TOLERANCE:
        raise ValueError(
            f"{where}: the exported network must give the same outputs to {TOLERANCE:g}, got a difference of "
            f"{worst:.1e}; nothing was written, please report it with `sagan doctor`"
        )
    return worst


@contextmanager
def _plain_operators() -> Iterator[None]:
    """Attention in PyTorch's own operators: those of this package would be needed to run the file."""
    before = os.environ.get("SAGAN_KERNELS_IMPL")
    os.environ["SAGAN_KERNELS_IMPL"] = "reference"
    try:
        yield
    finally:
        del os.environ["SAGAN_KERNELS_IMPL"]
        if before is not None:
            os.environ["SAGAN_KERNELS_IMPL"] = before
