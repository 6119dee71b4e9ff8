"""What every attention kernel costs on GPUs that are not there: python benchmarks/static_report.py.

Compiles each kernel, for each shape that people run, with the tiling that `ops/configs.py` chooses, through the same
launch code that a GPU would see. ptxas, cuobjdump and nvdisasm come with the Triton wheel. Writes
`benchmarks/results/static.csv`; about 25 minutes on one core. --plan only lists what would be compiled.
"""

import argparse
import collections
import csv
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch

from sagan_kernels.files import write_atomically
from sagan_kernels.ops import attention_launch, configs, sagan_layer

RESULTS = Path(__file__).parent / "results"

# (L, S, E, Ev): the layers that published SAGANs and BigGANs run
SHAPES = {
    "G128 32×32 C256": (1024, 256, 32, 128),
    "G64 32×32 C128": (1024, 256, 16, 64),
    "G128 64×64 C128": (4096, 1024, 16, 64),
    "D128 64×64 C64": (4096, 1024, 8, 32),
    "mimicry D32 8×8 C128": (64, 16, 16, 64),
    "mimicry D128 32×32 C16": (1024, 256, 2, 8),
    "BigGAN ch96 64×64 C192": (4096, 1024, 24, 96),
    "heykeetae G 16×16 C128, unpooled": (256, 256, 16, 128),
    "heykeetae G 32×32 C64, unpooled": (1024, 1024, 8, 64),
    "heykeetae D 8×8 C256, unpooled": (64, 64, 32, 256),
    "heykeetae D 4×4 C512, unpooled": (16, 16, 64, 512),
}
TARGETS: dict[configs.Arch, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# bytes of shared memory a program may have, registers and warps of a multiprocessor
LIMITS = {
    "sm_80": (163, 65536, 64),
    "sm_90": (227, 65536, 64),
    "sm_100": (227, 65536, 64),
    "gfx942": (64, 65536, 32),
}
PRECISIONS = {"bf16": torch.bfloat16, "tf32": torch.float32, "tf32x3": torch.float32, "fp32": torch.float32}
ARITHMETIC: dict[str, configs.Arithmetic] = {
    "bf16": "half",
    "tf32": "tf32",
    "tf32x3": "tf32x3",
    "fp32": "ieee",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One compiled kernel. Registers a thread, spilling instructions, bytes of shared memory."""

    kernel: str
    shape: str
    layout: str
    precision: str
    target: str
    tiling: str
    registers: int = 0
    spills: int = 0
    shared: int = 0
    programs_per_sm: int = 0
    tensor_core: int = 0
    exponentials: int = 0
    triton: str = ""


def main() -> None:
    """Compile everything and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--rows", nargs="+", help="only these, each as KERNEL|SHAPE|LAYOUT|PRECISION|TARGET")
    parser.add_argument("--plan", action="store_true", help="tilings only, nothing compiled")
    parser.add_argument("--out", type=Path, default=RESULTS / "static.csv")
    arguments = parser.parse_args()
    rows = []
    for target in arguments.targets:
        for shape, layout, precision in cases(target):
            kernels = None
            if arguments.rows:
                case = [shape, layout, precision, target]
                kernels = {
                    kernel for kernel, *rest in (row.split("|") for row in arguments.rows) if rest == case
                }
            if shape in arguments.shapes and precision in arguments.precisions and kernels != set():
                rows += compile_case(target, shape, layout, precision, plan=arguments.plan, kernels=kernels)
                print(f"{target} {shape} {layout} {precision}", file=sys.stderr)
    write_atomically(arguments.out, lambda temporary: write(rows, temporary))


def write(rows: list[Row], path: Path) -> None:
    """The rows as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
        table.writeheader()
        table.writerows(dataclasses.asdict(row) for row in rows)


def read(path: Path) -> list[Row]:
    """The rows of a CSV file that `write` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        numbers = {field.name for field in dataclasses.fields(Row) if field.type is int}
        return [
            Row(**{name: int(text) if name in numbers else text for name, text in row.items()})
            for row in csv.DictReader(file)
        ]


def cases(target: configs.Arch) -> Iterator[tuple[str, str, str]]:
    """Names of shape, layout and precision that the report has for `target`."""
    for shape in SHAPES:
        for precision in ("bf16", "fp32" if target == "gfx942" else "tf32x3"):
            yield shape, "NCHW", precision
        if target == "sm_90":
            yield shape, "NHWC", "bf16"
            yield shape, "NCHW", "tf32"


def compile_case(
    target: configs.Arch,
    shape: str,
    layout: str,
    precision: str,
    *,
    plan: bool = False,
    kernels: set[str] | None = None,
) -> list[Row]:
    """Every kernel of the attention operators at one shape, or `kernels`, as a launch on `target` would compile it."""
    L, S, E, Ev = SHAPES[shape]
    C = 2 * Ev

    def matrix(rows: int, width: int) -> torch.Tensor:
        if layout == "NCHW":
            return torch.empty(1, width, rows, dtype=PRECISIONS[precision]).mT
        return torch.empty(1, rows, width, dtype=PRECISIONS[precision])

    q, k, v, g = matrix(L, E), matrix(S, E), matrix(S, Ev), matrix(L, Ev)
    lse = torch.empty(1, 2, L)
    side = int(L**0.5)
    x = matrix(L, C).mT.unflatten(2, (side, side))
    calls: list[Callable[[], Any]] = [
        lambda: attention_launch.forward(q, k, v),
        lambda: attention_launch.over_queries(q, k, v),
        lambda: attention_launch.backward(q, k, v, g, lse, g),
        lambda: attention_launch.double_backward(q, k, v, g, lse, g, q, q, k, v),
        lambda: attention_launch.tangent(q, k, v, g, lse, q, k, v),
    ]
    if S * 4 == L:
        calls.append(lambda: sagan_layer._launch_project_pool(x, q.new_empty(E + Ev, C), None))
    if configs.layer_tiling(C, E, Ev, ARITHMETIC[precision], target):
        wq, wo, gamma = q.new_empty(E, C), q.new_empty(C, Ev), torch.zeros(1)
        calls.append(lambda: sagan_layer._launch_sagan_forward(x, wq, None, k, v, wo, None, gamma))
    rows = {}
    for name, tiling, compiled in _compile(calls, target, precision, plan, kernels):
        resources = {} if plan else _resources(compiled, target)
        rows.setdefault(name, Row(name, shape, layout, precision, target, tiling, **resources))
    return list(rows.values())


def _compile(
    calls: list[Callable[[], Any]],
    target: configs.Arch,
    precision: str,
    plan: bool,
    kernels: set[str] | None,
) -> list[tuple[str, str, Any]]:
    import triton
    from triton.backends.compiler import GPUTarget

    found = []
    run = triton.runtime.jit.JITFunction.run

    def warm_up(self: Any, *args: Any, **keywords: Any) -> Any:
        name = self.fn.__name__.removesuffix("_kernel")
        if kernels is not None and name not in kernels:
            return None
        keywords["warmup"] = True
        compiled = None if plan else run(self, *args, **keywords)
        blocks = [
            f"{k.removeprefix('BLOCK_')} {v}"
            for k, v in keywords.items()
            if k in ("BLOCK_L", "BLOCK_S", "BLOCK_K", "BLOCK_C")
        ]
        tiling = f"{' '.join(blocks)} warps {keywords['num_warps']} stages {keywords['num_stages']}"
        found.append((name, tiling, compiled))
        return compiled

    triton.runtime.driver.set_active(_StubDriver(GPUTarget(*TARGETS[target])))
    with (
        mock.patch.object(triton.runtime.jit.JITFunction, "run", warm_up),
        mock.patch.object(configs, "architecture", return_value=target),
        mock.patch.object(configs, "arithmetic", return_value=ARITHMETIC[precision]),
    ):
        for call in calls:
            _forget_other_targets()
            call()
    return found


def _forget_other_targets() -> None:
    """A compiled kernel is kept for the current device, which is always the same stub here."""
    from sagan_kernels.kernels import (
        attention_backward,
        attention_double_backward,
        attention_forward,
        sagan_layer,
    )

    for module in (attention_forward, attention_backward, attention_double_backward, sagan_layer):
        for kernel in vars(module).values():
            if hasattr(kernel, "device_caches"):
                kernel.device_caches.clear()


class _StubDriver:
    """All that a warm-up asks of a driver."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _resources(compiled: Any, target: str) -> dict[str, Any]:
    import triton

    registers, spills, opcodes = (_amd if target == "gfx942" else _nvidia)(compiled)
    warps = compiled.metadata.num_warps
    kib, file, most_warps = LIMITS[target]
    lanes = 64 if target == "gfx942" else 32
    per_program = -(-registers // 8) * 8 * lanes * warps
    # a multiprocessor keeps 1 KiB of shared memory a program for itself
    programs = min(
        file * (2 if target == "gfx942" else 1) // per_program,
        kib * 1024 // (compiled.metadata.shared + 1024),
        most_warps // warps,
    )
    matrix = ("HGMMA", "HMMA", "UTCHMMA")
    return {
        "registers": registers,
        "spills": spills,
        "shared": compiled.metadata.shared,
        "programs_per_sm": programs,
        "tensor_core": sum(n for op, n in opcodes.items() if op in matrix or op.startswith("v_mfma")),
        "exponentials": opcodes["MUFU.EX2"] + opcodes["v_exp_f32_e32"],
        "triton": triton.__version__,
    }


_OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.[A-Z0-9_]+)*)")


def _nvidia(compiled: Any) -> tuple[int, int, collections.Counter[str]]:
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run(
                [tools / tool, option, file.name], check=True, capture_output=True, text=True
            ).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    opcodes = collections.Counter(
        f"{op}.EX2" if op == "MUFU" and ".EX2" in suffix else op for op, suffix in _OPCODE.findall(code)
    )
    found = re.search(r"REG:(\d+)", usage)
    assert found, usage
    return int(found[1]), opcodes["STL"] + opcodes["LDL"], opcodes


def _amd(compiled: Any) -> tuple[int, int, collections.Counter[str]]:
    code = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", code)
        assert found, key
        return int(found[1])

    opcodes = collections.Counter(re.findall(r"^\s+([a-z][a-z0-9_]+)\b", code, re.M))
    scratch = sum(n for op, n in opcodes.items() if op.startswith("scratch_"))
    return number("vgpr_count"), number("vgpr_spill_count") + scratch, opcodes


if __name__ == "__main__":
    main()
