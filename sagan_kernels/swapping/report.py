"""What a swap did to a model, module by module."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["swapped", "already swapped", "kept", "not ours", "unknown", "refused"]
"""kept: right as it is. not ours: attention of another kind. refused: recognized, yet not swapped."""


@dataclass(frozen=True)
class Row:
    """One module.

    Args:
        path: its name in the model; empty for the model itself.
        module: name of its class.
        kind: what it is.
        variant: how its code base writes it; empty if unknown.
        status: what was done.
        reason: why it was not swapped, or what the swap changes; empty where there is nothing to say.
        error: the largest difference between host and swapped layer, in float64; None where it was not measured.
        size: height and width of the feature map that `saved_bytes` is for.
        saved_bytes: expected memory saved per image in training; None where none is expected.
    """

    path: str
    module: str
    kind: Literal["attention", "spectral norm"]
    variant: str
    status: Status
    reason: str = ""
    error: float | None = None
    size: tuple[int, int] | None = None
    saved_bytes: int | None = None


@dataclass(frozen=True)
class SwapReport:
    """The rows, and the name of the model's class. `print` shows a table; iterating gives the rows."""

    model: str
    rows: tuple[Row, ...]

    @property
    def swapped(self) -> tuple[Row, ...]:
        """What was swapped by this call."""
        return self._with("swapped")

    @property
    def skipped(self) -> tuple[Row, ...]:
        """What looked swappable and was not: refused or unknown."""
        return self._with("refused", "unknown")

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        rows = [asdict(row) for row in self.rows]
        for row in rows:  # JSON has no infinity, which stands for a result of another shape
            if row["error"] is not None and not math.isfinite(row["error"]):
                row["error"] = None
        return {"model": self.model, "rows": rows}

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return f"{self.model}: nothing to swap; no attention layer and no spectral norm was found"
        attention = [row for row in self.rows if row.kind == "attention"]
        norms = [row for row in self.rows if row.kind == "spectral norm"]
        lines = [f"{self.model}: {len(self.swapped)} of {len(self.rows)} modules swapped"]
        cells = [_cells(row) for row in attention] + list(_norm_cells(norms))
        if cells:
            head = ("module", "class", "variant", "", "error", "saved per image", "")
            lines += _table([head, *cells])
        return "\n".join(lines)

    def _with(self, *statuses: Status) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.status in statuses)


def _cells(row: Row) -> tuple[str, ...]:
    error = "" if row.error is None else f"{row.error:.0e}"
    saved = ""
    if row.saved_bytes is not None and row.size is not None:
        saved = f"{row.saved_bytes / 2**20:.2f} MiB at {row.size[0]}×{row.size[1]}"
    return row.path or "(the model)", row.module, row.variant, row.status, error, saved, row.reason


def _norm_cells(rows: Iterable[Row]) -> Iterator[tuple[str, ...]]:
    """Layers of one spectral norm, of which there are many, on one line."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.variant, row.status, row.reason), []).append(row)
    for (variant, status, reason), members in groups.items():
        if len(members) == 1:
            yield _cells(members[0])
            continue
        errors = [row.error for row in members if row.error is not None]
        error = f"{max(errors):.0e}" if errors else ""
        path = f"{members[0].path or '(the model)'} … ({len(members)})"
        yield path, members[0].module, variant, status, error, "", reason


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True) if width)
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines
