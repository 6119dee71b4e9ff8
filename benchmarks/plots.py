"""The plots of the report: speed over eager, fraction of the roofline, memory and time against a size."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.measuring import BASELINE, OURS
from benchmarks.report import Row, fraction, label
from sagan_kernels.files import write_atomically

COLOURS = {
    "grouped": "#c23b22", "layers": "#e58a77", "hook": "#1f77b4", "compiled": "#9467bd",
    BASELINE: "#555555", "parametrization": "#555555",
    OURS: "#c23b22", "ours, bf16": "#e58a77", "ours, training form": "#8c564b",
    "SDPA flash": "#1f77b4", "SDPA efficient": "#5aa5d8", "SDPA cuDNN": "#17becf", "SDPA math": "#aec7e8",
    "FlexAttention": "#2ca02c", "torch.compile": "#9467bd",
}  # fmt: skip


def write_all(results: list[dict[str, Any]], folder: Path) -> Iterator[Path]:
    """Write every plot the results have data for, named after its file; one figure a suite, dtype and layout.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError(
            "benchmarks.report: plots need matplotlib: pip install sagan-kernels[dev]"
        ) from None
    matplotlib.use("agg")
    for result in results:
        for told, cases in _figures(result["cases"]):
            name = re.sub(r"\W+", "_", " ".join([result["name"], *told]))
            title = f"{', '.join(told)} on {_where(result['run'])}"
            yield _save(speedups(cases, title), folder / f"{name}_speedup.png")
            if any(case["work"] for case in cases):
                yield _save(roofline(cases, result["run"], title), folder / f"{name}_roofline.png")
        curves = [curve for curve in result["curves"] if curve["x"]]
        if any(any(curve["peak_mib"]) for curve in curves if curve["axis"] == "L"):
            yield _save(memory(curves, result["run"]), folder / f"{result['name']}_memory.png")
        if curves:
            yield _save(scaling(curves, result["run"]), folder / f"{result['name']}_scaling.png")


def speedups(cases: list[Row], title: str) -> Any:
    """Bars from 1, to the right where faster than the baseline, to the left where slower."""
    figure, panels, names = _panels(cases, title)
    baseline, *contenders = _contenders(cases)
    height = 0.8 / len(contenders)
    for axes, (task, by_shape) in zip(panels, _by_task(cases).items(), strict=True):
        for i, contender in enumerate(contenders):
            for y, name in enumerate(names):
                row = by_shape.get(name, {}).get("contenders", {}).get(contender, {})
                at = y + (i - (len(contenders) - 1) / 2) * height
                if "speedup" in row:
                    low, high = row["quartiles_speedup"]
                    value = row["speedup"]
                    axes.barh(at, value - 1, left=1, height=height, color=_colour(contender))
                    axes.plot([low, high], [at, at], color="black", linewidth=0.8)
                elif "unavailable" in row:
                    axes.plot(1, at, marker="x", markersize=4, color=_colour(contender))
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0.5), max(high, 2))
        axes.axvline(1, color="black", linewidth=1)
        _plain_ticks(axes.xaxis)
        axes.set_title(task, fontsize=10)
        axes.set_xlabel(f"speed over {baseline}")
    _legend(
        figure, contenders, f"× marks a contender that cannot run; left of the line is slower than {baseline}"
    )
    return figure


def roofline(cases: list[Row], run: Row, title: str) -> Any:
    """Dots at the fraction of the measured roofline that each contender reaches."""
    figure, panels, names = _panels(cases, title)
    contenders = _contenders(cases)
    for axes, (task, by_shape) in zip(panels, _by_task(cases).items(), strict=True):
        for y, name in enumerate(names):
            case = by_shape.get(name)
            if case is None:
                continue
            resource = ""
            for contender, row in case["contenders"].items():
                reached = (
                    fraction(case, row["median_ms"], run.get("ceilings")) if "median_ms" in row else None
                )
                if reached:
                    size = 70 if contender == OURS else 30
                    axes.scatter(100 * reached[0], y, s=size, color=_colour(contender), zorder=3)
                    resource = reached[1]
            if resource:
                axes.annotate(
                    resource, (1.01, y), xycoords=("axes fraction", "data"), fontsize=7, va="center"
                )
        axes.set_xscale("log")
        axes.axvline(100, color="black", linewidth=1)
        _plain_ticks(axes.xaxis)
        axes.set_title(task, fontsize=10)
        axes.set_xlabel("% of the roofline")
    _legend(figure, contenders, "right of each row: the resource that sets the bound")
    return figure


def memory(curves: list[Row], run: Row) -> Any:
    """Peak memory against L."""
    drawn = [curve for curve in curves if curve["axis"] == "L" and any(curve["peak_mib"])]
    return _curves(drawn, "peak_mib", "MiB beyond the inputs", f"Peak memory on {run['device']}")


def scaling(curves: list[Row], run: Row) -> Any:
    """Time against each axis, with fitted exponents."""
    return _curves(curves, "ms", "ms", f"Time on {_where(run)}")


def _where(run: Row) -> str:
    return f"{run['device']}, {run['threads']} thread{'s' * (run['threads'] != 1)}"


def _curves(curves: list[Row], key: str, unit: str, title: str) -> Any:
    from matplotlib import pyplot

    whats = list(dict.fromkeys((curve["what"], curve["axis"]) for curve in curves))
    columns = min(3, len(whats))
    rows = -(-len(whats) // columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(5 * columns, 0.6 + 3.9 * rows), squeeze=False, layout="constrained"
    )
    figure.suptitle(title)
    for axes, what in itertools.zip_longest(grid.flat, whats):
        if what is None:
            axes.set_visible(False)
            continue
        for curve in curves:
            if (curve["what"], curve["axis"]) == what:
                points = [(x, y) for x, y in zip(curve["x"], curve[key], strict=True) if y]
                exponent = curve["exponent"] if key == "ms" else None
                label = curve["contender"] + (
                    f", {curve['axis']}^{exponent:.2f}" if exponent is not None else ""
                )
                axes.plot(
                    [x for x, _ in points], [y for _, y in points], marker="o",
                    color=_colour(curve["contender"]), label=label,
                )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        middle = (low * high) ** 0.5
        axes.set_ylim(min(low, middle / 4), max(high, middle * 4))
        _plain_ticks(axes.yaxis)
        xs = sorted({x for c in curves if (c["what"], c["axis"]) == what for x in c["x"]})
        axes.set_xticks(xs, [str(x) for x in xs])
        axes.set_xlabel(what[1])
        axes.set_ylabel(unit)
        axes.set_title(what[0], fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def _figures(cases: list[Row]) -> Iterator[tuple[tuple[str, ...], list[Row]]]:
    """Cases that fit one figure, with what they have in common; a batch size has its own where there are many."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for case in cases:
        groups.setdefault((case["suite"], case["dtype"], case["layout"]), []).append(case)
    for told, group in groups.items():
        if len({label(case) for case in group}) <= 24:
            yield told, group
            continue
        for batch in dict.fromkeys(case["batch"] for case in group):
            yield (*told, f"B {batch}"), [case for case in group if case["batch"] == batch]


def _panels(cases: list[Row], title: str) -> tuple[Any, list[Any], list[str]]:
    from matplotlib import pyplot

    tasks = _by_task(cases)
    names = list(dict.fromkeys(label(case) for case in cases))
    bars = len(_contenders(cases))
    figure, grid = pyplot.subplots(
        1, len(tasks), figsize=(3.2 + 4.2 * len(tasks), 1.8 + len(names) * max(0.32, 0.1 * bars)),
        sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    figure.suptitle(title)
    grid[0, 0].set_yticks(range(len(names)), names)
    grid[0, 0].set_ylim(len(names) - 0.4, -0.6)
    for axes in grid.flat:
        axes.grid(axis="x", alpha=0.3)
        for y in range(1, len(names)):
            axes.axhline(y - 0.5, color="#dddddd", linewidth=0.6)
    return figure, list(grid.flat), names


def _by_task(cases: list[Row]) -> dict[str, dict[str, Row]]:
    found: dict[str, dict[str, Row]] = {}
    for case in cases:
        found.setdefault(case["task"], {})[label(case)] = case
    return found


def _contenders(cases: list[Row]) -> list[str]:
    return list(dict.fromkeys(name for case in cases for name in case["contenders"]))


def _colour(contender: str) -> str:
    return COLOURS.get(contender, "#bcbd22")


def _plain_ticks(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 300 else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: Any, contenders: list[str], note: str) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=_colour(name), label=name) for name in contenders]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 5), fontsize=8, title=note
    )


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot
    from PIL import Image

    def write(temporary: Path) -> None:
        figure.savefig(temporary, dpi=110)
        with Image.open(temporary) as image:  # few colours are a third of the size
            palette = image.convert("RGB").quantize(64)
        palette.save(temporary, format="PNG", optimize=True)

    write_atomically(path, write)
    pyplot.close(figure)
    return path
