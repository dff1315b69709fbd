"""Times as services write them: seconds or milliseconds, of a clock or from a start of their own, or dates as text."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flexirl.errors import UserError

log = logging.getLogger(__name__)

# Times since 1970 lie, for the years 2001 to 2286, between these in seconds; a thousand times as high in milliseconds.
_EPOCH, _EPOCH_END = 1e9, 1e10
_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


def seconds_of_numbers(path: Path, column: str, times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Arrival times in seconds. Of a clock, they start at 0; from a start of their own, they stay.

    Their unit is what the column's name ends in, else what their size says of times since 1970, else seconds.
    """
    if not len(times) or np.isnan(times).any():
        return times
    middle = float(np.median(times))
    clock = next((unit for unit, tick in _UNITS.items() if _EPOCH <= middle * tick < _EPOCH_END), None)
    ending = column.rsplit("_", 1)[-1].lower() if "_" in column else ""
    unit = ending if ending in _UNITS else clock or "s"
    seconds = times * _UNITS[unit]
    if clock is not None:
        seconds = seconds - seconds.min()
    if unit != "s":
        log.warning("%s: column %s is read as %s", path, column, unit)
    return seconds


def seconds_of_texts(path: Path, column: str, lines: Sequence[int], texts: Sequence[str]) -> NDArray[np.float64]:
    """Seconds since the first of them; raises UserError, naming the line, for what is no date and time."""
    clock = np.array([_instant(path, column, line, text) for line, text in zip(lines, texts, strict=True)])
    return clock - clock.min()


def _instant(path: Path, column: str, line: int, text: str) -> float:
    """Seconds since 1970; without an offset, of UTC."""
    plain = text.strip().replace(",", ".")  # as Python's logging writes milliseconds
    for read in (datetime.datetime.fromisoformat, _common_log):
        try:
            found = read(plain)
        except ValueError:
            continue
        return (found if found.tzinfo else found.replace(tzinfo=datetime.UTC)).timestamp()
    raise no_time(path, column, line, text)


def no_time(path: Path, column: str, line: int, text: str) -> UserError:
    """What is said of a text that is no time."""
    return UserError(
        f"{path}: line {line} has {column}={text[:80]!r}, which is no time; it should be seconds, or a date and time "
        "such as 2026-01-31T12:00:00.250Z."
    )


def _common_log(text: str) -> datetime.datetime:
    return datetime.datetime.strptime(text.strip("[]"), "%d/%b/%Y:%H:%M:%S %z")
