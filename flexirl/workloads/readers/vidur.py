"""Vidur CSV: num_prefill_tokens, num_decode_tokens, and arrived_at in seconds where there are times."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flexirl.workloads.readers.formats import Format, Table
from flexirl.workloads.readers.rows import rows_of
from flexirl.workloads.readers.text import Csv


def _read(path: Path, seed: int) -> Table:
    table = Csv(path)
    prompt, output = table.numbers("num_prefill_tokens", "num_decode_tokens")
    timed = "arrived_at" in table.names
    arrival_s = table.numbers("arrived_at")[0] if timed else np.full(len(prompt), np.nan)
    return Table(rows_of(path, arrival_s, prompt, output))


FORMAT = Format("vidur", lambda sample: sample.kind == "csv" and sample.has("num_prefill_tokens"), _read)
