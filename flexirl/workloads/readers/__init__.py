"""Trace readers: recorded requests, in the formats in which they are published, become a `Trace`.

Each format is one module here, which says how it is recognised and how it is read (`formats.Format`); `FORMATS` lists
them. Three readings hold for every format. A length of 0 tokens becomes 1 (an engine cannot run an empty prompt, and
prefill samples one token in any case); their number is logged. What is left out is logged with its share, what does
not fit the format is refused. `max_tokens` of every row is the longest output in the file: recorded traces do not say
what the client asked for, and a tighter limit would reveal the true output length.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from flexirl.errors import UserError
from flexirl.workloads.readers import agentic, azure, bailian, burstgpt, mooncake, servegen, vidur
from flexirl.workloads.readers import log as service_log
from flexirl.workloads.readers.formats import Column, Format, sample_of
from flexirl.workloads.trace import Trace, check, take

FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT
    for module in (azure, burstgpt, vidur, bailian, mooncake, servegen, agentic, service_log)
}


def read_trace(
    path: str | Path, format: str | None = None, seed: int = 0, columns: Mapping[str, str] | None = None
) -> Trace:
    """Reads a trace, detecting its format from the file's name and first line where `format` is None.

    | format | what it is |
    |---|---|
    | log | CSV or JSONL with a time, prompt tokens and output tokens by any common name; see `columns.NAMES` |
    | azure | Azure LLM and LMM inference CSV: TIMESTAMP, ContextTokens, GeneratedTokens, optional NumImages |
    | burstgpt | BurstGPT CSV: Timestamp (s), Request tokens, Response tokens; rows without a response are dropped |
    | vidur | Vidur CSV: arrived_at, num_prefill_tokens, num_decode_tokens |
    | bailian | Qwen-Bailian JSONL: chat_id, timestamp (s), input_length, output_length, hash_ids of 16-token blocks |
    | mooncake | Mooncake JSONL: timestamp (ms), input_length, output_length, hash_ids of 512-token blocks |
    | agentic | agent-session JSON, one file or a folder of them; sessions start at seeded random times |
    | servegen | ServeGen folder of chunk-N-trace.csv and chunk-N-dataset.json, resampled with the seed |

    columns: which column of a log is what, by the keys of `columns.NAMES`, where its names are not the common ones. A
    log may lack max_tokens, class, window, tenant, images and cached tokens. Any file may be gzipped (name ending in
    .gz). Rows are stable-sorted by arrival; the original offset is kept, and clock times start at 0. Prefix tokens
    count a prompt's leading blocks that an earlier request had.

    Raises UserError, in one sentence naming the place, for a missing, empty, truncated or malformed file.
    """
    path, chosen = _chosen(path, "log" if columns else format)
    table = service_log.read_log(path, columns) if columns else chosen.read(path, seed)
    rows = table.rows
    if np.isnan(rows["arrival_s"]).any():
        raise UserError(f"{path} has lengths but no arrival times; use it as a length model (kind: empirical) instead.")
    rows = take(rows, np.argsort(rows["arrival_s"], kind="stable"))
    check(rows, str(path))
    return Trace(rows, path.name, int(rows["tenant"].max()) + 1, contents=table.contents)


def read_lengths(path: str | Path, format: str | None = None) -> tuple[np.ndarray, Column | None]:
    """The rows of any trace file, with or without arrival times, and their relative weights (column `prob`) or None.

    Arrival times are NaN where the file has none. Raises UserError as `read_trace` does.
    """
    path, chosen = _chosen(path, format)
    rows, weights, _ = chosen.read(path, 0)
    if weights is not None and not (np.isfinite(weights).all() and weights.min() >= 0 and weights.sum() > 0):
        raise UserError(f"{path} has a column prob with a negative or missing weight; weights are 0 or more.")
    return rows, weights


def _chosen(path: str | Path, name: str | None) -> tuple[Path, Format]:
    """The path, which exists, and the format of that name, or the one that recognises what lies there."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; give the path of a trace file or folder.")
    if name is not None:
        if name not in FORMATS:
            raise UserError(f"{name!r} is not a trace format; choose from {', '.join(FORMATS)}.")
        return path, FORMATS[name]
    sample = sample_of(path)
    for format in FORMATS.values():
        if format.recognises(sample):
            return path, format
    if sample.kind == "folder":
        raise UserError(f"{path} is a folder without ServeGen chunk-N-trace.csv or agent-session .json files.")
    fields = ", ".join(sample.names or ())[:200]
    if sample.kind == "jsonl":
        raise UserError(
            f"{path} has lines with {fields or 'no fields'}, which no known format has; if its times are milliseconds "
            "and its blocks have 512 tokens, say so with workload.immediate.format=mooncake."
        )
    raise UserError(
        f"{path} has columns {fields}, in which no known format has its lengths; name them in workload.columns, as in "
        "'{arrival: NAME, prompt_tokens: NAME, output_tokens: NAME}'."
    )
