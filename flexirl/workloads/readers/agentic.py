"""Agent-session JSON, one file or a folder of them: requests with times in the session, lengths and block hashes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from flexirl.errors import UserError
from flexirl.workloads.readers.blocks import Blocks, describe, hashes_of, prefix_tokens
from flexirl.workloads.readers.formats import Format, Sample, Table
from flexirl.workloads.readers.rows import rows_of
from flexirl.workloads.readers.text import json_of, numbers_of

BLOCK = 64  # where a session does not say


def _recognises(sample: Sample) -> bool:
    if sample.kind == "folder":
        return any(name.endswith(".json") for name in sample.names or ())
    return sample.kind == "json"


def _read(path: Path, seed: int) -> Table:
    """Sessions overlap: each starts at a random time within the span of the longest, since none is recorded."""
    read = [_session(file) for file in (sorted(path.glob("*.json*")) if path.is_dir() else [path])]
    sessions = [rows for rows, _ in read]
    span = max(float(session["arrival_s"].max()) for session in sessions)
    rng = np.random.default_rng(seed)
    for session in sessions if len(sessions) > 1 else []:
        session["arrival_s"] += rng.random() * span
    for number, (rows, contents) in enumerate(read):  # hashes are the same only within a session
        rows["content_first"] += sum(len(before) for _, before in read[:number])
        contents["origin"] += np.uint64(number << 32)
    rows = np.concatenate(sessions)
    rows["max_tokens"] = rows["max_tokens"].max()
    return Table(rows, contents=np.concatenate([contents for _, contents in read]))


def _session(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """One session's requests and what they say, times from its start; a subagent's count from the subagent's start."""
    session = json_of(path)
    columns: list[tuple[float, ...]] = []
    blocks: list[Blocks] = []

    def collect(requests: Any, start: float) -> None:
        if not isinstance(requests, list):
            raise UserError(f"{path} has requests={str(requests)[:80]}; it should be a list.")
        for request in requests:
            place = f"request {len(columns) + 1}"
            (at,) = numbers_of(path, place, request, "t")
            if "requests" in request:
                collect(request["requests"], start + at)
            else:
                columns.append((start + at, *numbers_of(path, place, request, "in", "out")))
                blocks.append(hashes_of(path, place, request.get("hash_ids")))

    collect(session.get("requests") or [] if isinstance(session, dict) else [], 0.0)
    if not columns:
        raise UserError(f"{path} has no list of requests; an agent session has at least one.")
    block_size = session.get("block_size", BLOCK)
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise UserError(f"{path} has block_size={block_size!r}; it should be a whole number of tokens, 1 or more.")
    arrival_s, prompt, output = np.array(columns).T
    places = [f"request {i + 1}" for i in range(len(columns))]
    prefix = prefix_tokens(path, places, blocks, prompt, arrival_s, block_size)
    rows = rows_of(path, arrival_s, prompt, output, prefix_tokens=prefix)
    return rows, describe(rows, blocks, block_size)


FORMAT = Format("agentic", _recognises, _read)
