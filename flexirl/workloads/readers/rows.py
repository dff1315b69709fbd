"""From one file's columns to `TRACE_ROW` rows: what every format is held to."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flexirl.errors import UserError
from flexirl.workloads.readers.formats import Column
from flexirl.workloads.trace import empty_rows

log = logging.getLogger(__name__)

MAX_TOKENS = 2**31 - 1  # trace columns are 32-bit


def rows_of(
    source: Path, arrival_s: Column, prompt: Column, output: Column, **optional: Column | NDArray[np.int64]
) -> np.ndarray:
    """Unsorted rows; `arrival_s` is NaN throughout where there are no times.

    Raises UserError for a value that is not a count of tokens, and for a request without a time among others.
    """
    columns = {"prompt_tokens": prompt, "output_tokens": output, **optional}
    for name, values in columns.items():
        bad = ~((values >= 0) & (values <= MAX_TOKENS) & (values == np.floor(values)))
        if bad.any():
            at = int(np.argmax(bad))
            raise UserError(
                f"{source}: request {at + 1} has {name}={values[at]:g}; it should be a whole number, 0 or more."
            )
    untimed = np.isnan(arrival_s)
    if untimed.any() and not untimed.all():
        raise UserError(
            f"{source}: request {int(np.argmax(untimed)) + 1} has no arrival time; {untimed.sum()} of {len(untimed)} "
            "have none, give all of them one."
        )
    bad = arrival_s < 0
    if bad.any():
        at = int(np.argmax(bad))
        raise UserError(f"{source}: request {at + 1} arrives at {arrival_s[at]:g} s; arrivals start at 0 or later.")
    rows = empty_rows(len(arrival_s))
    rows["arrival_s"] = arrival_s
    for name, values in columns.items():
        rows[name] = values
    for name in ("prompt_tokens", "output_tokens"):
        zeros = int((rows[name] == 0).sum())
        if zeros:
            log.warning("%s: %d requests with %s=0 are read as 1", source, zeros, name)
            rows[name] = np.maximum(rows[name], 1)
    rows["max_tokens"] = rows["output_tokens"].max()
    return rows
