"""Figures of the benches: printed as they come, and written as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    """One figure of a bench."""

    name: str
    value: float
    unit: str


def report(figures: Iterable[Row], output: Path) -> None:
    """Prints a line per figure as it comes, and writes them all to `output`."""
    rows = []
    for row in figures:
        rows.append(row._asdict())
        print(f"{row.name:44}{_number(row.value):>16} {row.unit}", flush=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"written to {output}")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.4g}"
