"""Tables and plots of results: python -m benchmarks.report RESULTS.json... [--brief] [--out FOLDER] [--against OLD].

Takes what `pytest benchmarks --benchmark-only --benchmark-json=RESULTS.json` and `python -m benchmarks.scaling` write.
Prints Markdown. With --out, writes report.md and the plots there; plots need matplotlib, which the extra `dev` has.
With --brief, prints a line a shape: ours beside the fastest of the others.
With --against, only compares: a change counts where it is more than twice the noise of both files together.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.roofline import Ceilings, Work, bound_ms
from sagan_kernels.files import write_atomically

Row = dict[str, Any]
HOST = (
    "Device time is a GPU's while its queue is full, host time what it takes to queue a call: "
    "the longer of both is what a loop takes, and † marks where it is the host's."
)


def main() -> None:
    """Print the report, or write it with its plots."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--against", type=Path, help="earlier results to compare with")
    parser.add_argument("--brief", action="store_true", help="one line a shape")
    parser.add_argument("--out", type=Path, help="folder for report.md and plots")
    arguments = parser.parse_args()
    try:
        show(arguments)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    except (KeyError, TypeError) as error:
        sys.exit(
            "report: results must have the fields that benchmarks of this version write, "
            f"got {type(error).__name__} {error}; measure again"
        )


def show(arguments: argparse.Namespace) -> None:
    """What `main` was asked for."""
    results = [load(path) for path in arguments.results]
    if arguments.against:
        print("\n\n".join(regressions(load(arguments.against), new) for new in results))
        return
    names = [result["name"] for result in results]
    if arguments.out and len(set(names)) < len(names):
        sys.exit(
            f"report: --out needs files of different names, which plots get, got {', '.join(sorted(names))}"
        )
    tabulate = brief if arguments.brief else table
    text = "\n\n".join(part for result in results for part in sections(result, tabulate)) + "\n"
    print(text)
    if arguments.out:
        from benchmarks import plots

        write_atomically(arguments.out / "report.md", lambda path: path.write_text(text, encoding="utf-8"))
        for path in plots.write_all(results, arguments.out):
            print(path, file=sys.stderr)


def load(path: Path) -> dict[str, Any]:
    """A results file as {"name": its own, "run": where it was measured, "cases": rows, "curves": rows, "failed": rows}.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a results file.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        cases = [b["extra_info"] for b in stored.get("benchmarks", []) if "contenders" in b["extra_info"]]
        found = {"name": path.stem, "run": stored["run"], "cases": cases, "curves": stored.get("curves", [])}
        found["failed"] = stored.get("failed", [])
    except FileNotFoundError:
        raise FileNotFoundError(f"report: {path} must exist, got no such file; measure first") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        found = {}
    if not found or not found["cases"] + found["curves"]:
        raise ValueError(
            f"report: {path} must hold results, got none; "
            f"write it with pytest benchmarks --benchmark-only --benchmark-json={path}"
        )
    return found


def sections(
    result: dict[str, Any], tabulate: Callable[[list[Row], Row], str] | None = None
) -> Iterator[str]:
    """The report of one file: where it was measured, what has no figures, a table a suite, the curves."""
    yield provenance(result["run"])
    if result["failed"]:
        yield "Failed, so without figures:\n\n" + "\n".join(
            f"- `{row['name']}`: {row['why']}" for row in result["failed"]
        )
    for suite in dict.fromkeys(case["suite"] for case in result["cases"]):
        cases = [case for case in result["cases"] if case["suite"] == suite]
        told = f"{HOST}\n\n" if _has_host(cases) else ""
        yield f"### {suite}\n\n{told}" + (tabulate or table)(cases, result["run"])
    if result["curves"]:
        yield "### scaling\n\n" + curve_table(result["curves"])


def provenance(run: Row) -> str:
    """A line of what a figure needs to be believed."""
    ceilings = run.get("ceilings")
    told = [f"{key} {value}" for key, value in run.items() if key not in ("ceilings", "command") and value]
    lines = ["; ".join(told), f"Measured again by `{run['command']}`."]
    if ceilings:
        flops = ", ".join(f"{dtype} {rate / 1e9:.0f} GF/s" for dtype, rate in ceilings["flops"].items())
        lines.append(
            f"Ceilings measured in the same run: copy {ceilings['bytes'] / 1e9:.1f} GB/s, products {flops}, "
            f"{ceilings['exponentials'] / 1e9:.2f} G exp/s."
        )
    return "\n\n".join(lines)


def table(cases: list[Row], run: Row) -> str:
    """Every contender of every case, the losing ones too: time, speed over the first, memory, roofline."""
    host = _has_host(cases)
    lines = ["images/s are a loop's.", ""] if host else []
    lines += [
        "| task | shape | B | dtype | layout | contender | median ms | images/s | speed over the first "
        f"{'| host ms ' if host else ''}| error | peak MiB | compile s | of the roofline |",
        f"|---|---|---:|---|---|---|---:|---:|---:|{'---:|' if host else ''}---:|---:|---:|---|",
    ]
    for case in cases:
        what = [case["task"], case["shape"], case["batch"] or "", case["dtype"], case["layout"]]
        for name, row in case["contenders"].items():
            label = f"{name} ({row['note']})" if "note" in row else name
            if "unavailable" in row:
                cells = [f"unavailable: {row['unavailable']}".replace("|", "/"), *[""] * (6 + host)]
            else:
                reached = fraction(case, row["median_ms"], run.get("ceilings"))
                loop_ms = max(row["median_ms"], row.get("host_ms", 0))
                cells = [
                    f"{row['median_ms']:.3g}",
                    f"{1e3 * case['batch'] / loop_ms:.3g}" if case["batch"] else "",
                    speed(row), *[_host_cell(row)] * host,
                    f"{row['error']:.0e}" if "error" in row else "",
                    f"{row['peak_mib']:.1f}" if "peak_mib" in row else "", row.get("compile_s", ""),
                    f"{reached[0]:.0%} ({reached[1]})" if reached else "",
                ]  # fmt: skip
            lines.append("| " + " | ".join(str(cell) for cell in [*what, label, *cells]) + " |")
    return "\n".join(lines)


def _has_host(cases: list[Row]) -> bool:
    return any("host_ms" in row for case in cases for row in case["contenders"].values())


def _host_cell(row: Row) -> str:
    """The host's time, marked where a loop takes it, and in parentheses its speed over the first contender's."""
    told = f"{row['host_ms']:.3g}{host_mark(row)}" if "host_ms" in row else ""
    return f"{told} ({times(row['speedup_host'])})" if "speedup_host" in row else told


def host_mark(row: Row) -> str:
    """A dagger where the host takes longer to queue a call than the GPU to do it."""
    return "†" if row.get("host_ms", 0) > row["median_ms"] else ""


def times(ratio: float, digits: int = 2) -> str:
    """A speed; below 1 in bold, since a loss is to be seen."""
    return f"{ratio:.{digits}f}×" if ratio >= 1 else f"**{ratio:.{digits}f}×**"


def brief(cases: list[Row], run: Row) -> str:
    """A line a shape, a column a task: the baseline's time, our speed over it, and the fastest of the others."""
    tasks = list(dict.fromkeys(case["task"] for case in cases))
    by_shape: dict[tuple[str, ...], dict[str, Row]] = {}
    for case in cases:
        by_shape.setdefault((label(case), case["dtype"], case["layout"]), {})[case["task"]] = case
    lines = [f"| shape | {' | '.join(tasks)} |", f"|---|{'---|' * len(tasks)}"]
    for (shape, dtype, layout), found in by_shape.items():
        form = "".join(f", {word}" for word in (dtype, layout) if word not in ("float32", "NCHW"))
        cells = [_brief_cell(found[task]["contenders"]) if task in found else "" for task in tasks]
        lines.append(f"| {shape}{form} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _brief_cell(contenders: dict[str, Row]) -> str:
    """Baseline, ours (the last, and other forms of it), then the fastest of the rest."""
    first, *_, last = contenders
    if "speedup" not in contenders[first]:
        return f"{first} cannot run; {last} {contenders[last]['median_ms']:.3g} ms"
    baseline, *names = [name for name, row in contenders.items() if "speedup" in row]
    ours = [names[-1], *(name for name in names[:-1] if name.startswith("ours"))]
    others = [name for name in names if name not in ours]
    told = [f"{baseline} {contenders[baseline]['median_ms']:.3g} ms"]
    for name in [*ours, *sorted(others, key=lambda name: -contenders[name]["speedup"])[:1]]:
        ratio = contenders[name]["speedup"]
        told.append(f"{name} {times(ratio) if name in ours else f'{ratio:.2f}×'}")
        if name in ours and "speedup_host" in contenders[name]:
            told[-1] += f"{host_mark(contenders[name])} (host {times(contenders[name]['speedup_host'], 1)})"
    return "; ".join(told)


def label(case: Row) -> str:
    """A case's shape, with its batch where it has images."""
    return f"{case['shape']}, B {case['batch']}" if case["batch"] else str(case["shape"])


def speed(row: Row) -> str:
    """The median ratio with its quartiles."""
    if "speedup" not in row:
        return ""
    low, high = row["quartiles_speedup"]
    return f"{times(row['speedup'])} ({low:.2f} to {high:.2f})"


def fraction(case: Row, median_ms: float, ceilings: Row | None) -> tuple[float, str] | None:
    """Which part of the roofline is reached, and the resource that sets it; None for a case without one."""
    if not case["work"] or not ceilings or case["dtype"] not in ceilings["flops"]:
        return None
    bound, resource = bound_ms(Work(**case["work"]), Ceilings(**ceilings), case["dtype"])
    return bound / median_ms, resource


def curve_table(curves: list[Row]) -> str:
    """Each curve's points and the exponent fitted to them."""
    lines = ["| what | contender | axis | points | exponent |", "|---|---|---|---|---:|"]
    for curve in curves:
        points = [f"{x}: {ms:.3g} ms" for x, ms in zip(curve["x"], curve["ms"], strict=True)]
        if curve["unavailable"]:
            points.append(f"unavailable {curve['unavailable']}".replace("|", "/"))
        points = ", ".join(points)
        exponent = "" if curve["exponent"] is None else f"{curve['exponent']:.2f}"
        lines.append(f"| {curve['what']} | {curve['contender']} | {curve['axis']} | {points} | {exponent} |")
    return "\n".join(lines)


def regressions(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What became faster or slower over the baseline of its own run, beside the noise of both runs.

    The speed over the baseline is compared, which a busy or another machine moves less than it moves a time.
    """

    def key(case: Row) -> tuple[Any, ...]:
        return tuple(case[k] for k in ("suite", "task", "shape", "batch", "dtype", "layout"))

    before = {key(case): case["contenders"] for case in old["cases"]}
    after = {key(case): case["contenders"] for case in new["cases"]}
    lines = [
        "| case | contender | old | new | change | noise | verdict |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for case in before | after:
        _, *names = before.get(case, {}) | after.get(case, {})
        for name in names:
            label = f"| {', '.join(map(str, case))} | {name} | "
            earlier, row = before.get(case, {}).get(name), after.get(case, {}).get(name)
            if earlier is None or row is None:
                told = ("", _or_reason(row)) if row else (_or_reason(earlier or {}), "")
                lines.append(label + f"{' | '.join(told)} | | | only in the {'new' if row else 'old'} |")
                continue
            if "speedup" not in row or "speedup" not in earlier:
                if ("speedup" in row) != ("speedup" in earlier):
                    lines.append(label + f"{_or_reason(earlier)} | {_or_reason(row)} | | | changed |")
                continue
            change = row["speedup"] / earlier["speedup"] - 1
            if min(row["rounds"], earlier["rounds"]) < 5:
                level = float("inf")  # too few rounds to know
            else:
                level = (noise(row) ** 2 + noise(earlier) ** 2) ** 0.5
            lines.append(
                label + f"{earlier['speedup']:.2f}× | {row['speedup']:.2f}× | {change:+.1%} | ±{level:.1%} | "
                f"{verdict(change, level)} |"
            )
    runs = "; ".join(
        f"{name}: {run['device']}, {run['threads']} threads, {run['commit']}"
        for name, run in (("old", old["run"]), ("new", new["run"]))
    )
    found = ["\n".join(lines)] if before | after else []
    if old["curves"] or new["curves"]:
        found.append(curve_changes(old["curves"], new["curves"]))
    return "\n\n".join([runs, *found])


def curve_changes(old: list[Row], new: list[Row]) -> str:
    """Exponents of both runs, and the range of the new times over the old; one time a size has no noise level."""

    def by_name(curves: list[Row]) -> dict[tuple[str, ...], Row]:
        return {(curve["what"], curve["axis"], curve["contender"]): curve for curve in curves}

    def exponent(curve: Row) -> str:
        return "–" if curve.get("exponent") is None else f"{curve['exponent']:.2f}"

    lines = [
        "| curve | contender | old exponent | new exponent | new time over the old |",
        "|---|---|---:|---:|---|",
    ]
    before, after = by_name(old), by_name(new)
    for what, axis, contender in before | after:
        earlier, later = (found.get((what, axis, contender), {}) for found in (before, after))
        old_ms, new_ms = (dict(zip(c.get("x", []), c.get("ms", []), strict=True)) for c in (earlier, later))
        ratios = [new_ms[x] / old_ms[x] for x in new_ms if x in old_ms]
        told = f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "no size in common"
        if not earlier or not later:
            told = f"only in the {'new' if later else 'old'}"
        lines.append(
            f"| {what} against {axis} | {contender} | {exponent(earlier)} | {exponent(later)} | {told} |"
        )
    return "\n".join(lines)


def noise(row: Row) -> float:
    """Half the distance between the quartiles of the speed, over its median."""
    low, high = row["quartiles_speedup"]
    return (high - low) / 2 / row["speedup"]


def verdict(change: float, level: float) -> str:
    """A change counts beyond twice the noise."""
    if level == float("inf"):
        return "noise unknown, under 5 rounds"
    if abs(change) <= 2 * level:
        return "within noise"
    return "faster" if change > 0 else "slower"


def _or_reason(row: Row) -> str:
    return f"{row['speedup']:.2f}×" if "speedup" in row else row.get("unavailable", "not timed")


if __name__ == "__main__":
    main()
