"""Qwen-Bailian JSONL: chat_id, timestamp in seconds, input_length, output_length, hash_ids of blocks of 16 tokens."""

from __future__ import annotations

from pathlib import Path

from flexirl.workloads.readers.blocks import read_hashed_lines
from flexirl.workloads.readers.formats import Format, Sample, Table

BLOCK = 16


def _recognises(sample: Sample) -> bool:
    return sample.kind == "jsonl" and sample.has("chat_id", "parent_chat_id", "timestamp", "input_length")


def _read(path: Path, seed: int) -> Table:
    return read_hashed_lines(path, tick_s=1.0, block_size=BLOCK)


FORMAT = Format("bailian", _recognises, _read)
