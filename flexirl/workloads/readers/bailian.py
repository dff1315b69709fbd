"""Qwen-Bailian JSONL: chat_id, timestamp in seconds, input_length, output_length, hash_ids of blocks of 16 tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from flexirl.workloads.readers.blocks import read_hashed_lines
from flexirl.workloads.readers.formats import Format, Sample, Table
from flexirl.workloads.readers.text import json_lines
from flexirl.workloads.readers.turns import link

BLOCK = 16


def _recognises(sample: Sample) -> bool:
    return sample.kind == "jsonl" and sample.has("chat_id", "parent_chat_id", "timestamp", "input_length")


def _read(path: Path, seed: int) -> Table:
    """A request with a parent above it is the next turn of a conversation."""
    table = read_hashed_lines(path, tick_s=1.0, block_size=BLOCK)
    at: dict[Any, int] = {}
    before = np.full(len(table.rows), -1, np.int64)
    for number, (_, record) in enumerate(json_lines(path)):
        chat, parent = record["chat_id"], record["parent_chat_id"]
        if isinstance(parent, int | str):
            before[number] = at.get(parent, -1)
        if isinstance(chat, int | str):
            at[chat] = number
    link(table.rows, before)
    return table


FORMAT = Format("bailian", _recognises, _read)
