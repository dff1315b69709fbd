"""What a trace format is, and what is looked at to recognise one."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexirl.workloads.readers.text import lines_of
from flexirl.workloads.trace import CONTENT

Column = NDArray[np.float64]


class Table(NamedTuple):
    """What is read from a file."""

    rows: np.ndarray  # TRACE_ROW, unsorted
    weights: Column | None = None
    contents: np.ndarray = np.zeros(0, CONTENT)


@dataclass(frozen=True)
class Sample:
    """What is seen of a trace before it is read.

    kind: by the name, `csv` where it says nothing else; names: columns of a CSV file, or the fields of the first line
    of a JSONL file, None where that is no JSON object; files in a folder.
    """

    path: Path
    kind: Literal["folder", "csv", "jsonl", "json"]
    names: tuple[str, ...] | None

    def has(self, *names: str) -> bool:
        """Whether all of them are there."""
        return self.names is not None and set(names) <= set(self.names)


@dataclass(frozen=True)
class Format:
    """A trace format; `read` takes a path and a seed, for formats that are resampled, and may raise UserError."""

    name: str
    recognises: Callable[[Sample], bool]
    read: Callable[[Path, int], Table]


def sample_of(path: Path) -> Sample:
    """Looks at a file or folder, which exists; raises UserError for a CSV file that cannot be read or is empty."""
    if path.is_dir():
        return Sample(path, "folder", tuple(sorted(file.name for file in path.iterdir())))
    name = path.name.removesuffix(".gz")
    if name.endswith(".json"):
        return Sample(path, "json", None)
    first = lines_of(path)[0]
    if not name.endswith(".jsonl"):
        return Sample(path, "csv", tuple(next(csv.reader([first.strip()]), [])))
    try:
        record = json.loads(first)
    except ValueError:
        record = None
    return Sample(path, "jsonl", tuple(record) if isinstance(record, dict) else None)
