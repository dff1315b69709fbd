"""BurstGPT CSV: Timestamp in seconds, Request tokens, Response tokens; a request without a response has failed."""

from __future__ import annotations

import logging
from pathlib import Path

from flexirl.errors import UserError
from flexirl.workloads.readers.formats import Format, Table
from flexirl.workloads.readers.rows import rows_of
from flexirl.workloads.readers.text import Csv

log = logging.getLogger(__name__)


def _read(path: Path, seed: int) -> Table:
    arrival_s, prompt, output = Csv(path).numbers("Timestamp", "Request tokens", "Response tokens")
    failed = output == 0
    if failed.any():
        log.warning(
            "%s: %d failed requests (no response tokens) are dropped, %.1f%% of all", path, int(failed.sum()),
            100 * failed.mean(),
        )  # fmt: skip
    if failed.all():
        raise UserError(f"{path} has only failed requests (Response tokens = 0); a trace has at least one that ran.")
    return Table(rows_of(path, arrival_s[~failed], prompt[~failed], output[~failed]))


FORMAT = Format("burstgpt", lambda sample: sample.kind == "csv" and sample.has("Request tokens"), _read)
