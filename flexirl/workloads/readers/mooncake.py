"""Mooncake JSONL: timestamp in milliseconds, input_length, output_length, hash_ids of blocks of 512 tokens."""

from __future__ import annotations

from pathlib import Path

from flexirl.workloads.readers.blocks import read_hashed_lines
from flexirl.workloads.readers.formats import Format, Sample, Table

BLOCK = 512
_NUMBERS = ("timestamp", "input_length", "output_length")


def _recognises(sample: Sample) -> bool:
    """By its hashes, whose number then confirms the size of the blocks; what is malformed is read to say where."""
    if sample.kind != "jsonl":
        return False
    return sample.has("hash_ids") or not sample.has(*_NUMBERS)


def _read(path: Path, seed: int) -> Table:
    return read_hashed_lines(path, tick_s=1e-3, block_size=BLOCK)


FORMAT = Format("mooncake", _recognises, _read)
