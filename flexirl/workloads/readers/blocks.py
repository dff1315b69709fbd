"""Block hashes: which leading part of a prompt an earlier request had, from one hash per block of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexirl.errors import UserError
from flexirl.workloads.readers.formats import Column, Table
from flexirl.workloads.readers.rows import rows_of
from flexirl.workloads.readers.text import json_lines, numbers_of
from flexirl.workloads.trace import CONTENT

Hash = int | str
Blocks = list[Hash]


def hashes_of(path: Path, place: str, value: Any) -> Blocks:
    """A request's block hashes, none where it has None; raises UserError for anything but a flat list of them."""
    if value is None:
        return []
    if not isinstance(value, list) or any(isinstance(h, bool) or not isinstance(h, Hash) for h in value):
        raise UserError(
            f"{path}: {place} has hash_ids={str(value)[:80]}; it should be a list of whole numbers or strings, one "
            "per block."
        )
    return value


def prefix_tokens(
    path: Path,
    places: Sequence[str],
    blocks: Sequence[Blocks],
    prompt: Column,
    arrival_s: Column | None,
    block_size: int,
) -> Column:
    """Tokens of each prompt's leading blocks that an earlier request had, as in an endless prefix cache.

    places: where each request stands, for messages. Raises UserError where a request has other than one hash per
    block, a last one that is partly filled with or without: its hashes are then of blocks of another size.
    """
    for place, hashes, tokens in zip(places, blocks, prompt, strict=True):
        if hashes and len(hashes) not in (tokens // block_size, -(-tokens // block_size)):
            raise UserError(
                f"{path}: {place} has {len(hashes)} hash_ids for {tokens:.0f} prompt tokens, which does not fit "
                f"blocks of {block_size} tokens; the file is of another format, or its blocks are of another size."
            )
    order = np.arange(len(blocks)) if arrival_s is None else np.argsort(arrival_s, kind="stable")
    seen: set[Hash] = set()
    found = np.zeros(len(blocks), dtype=np.int64)
    for row in order:
        leading = True
        for block in blocks[row]:
            leading = leading and block in seen
            found[row] += block_size * leading
            seen.add(block)
    # The last block of a prompt may be partly filled.
    return np.minimum(found, prompt)


def describe(rows: np.ndarray, blocks: Sequence[Blocks], block_size: int) -> np.ndarray:
    """Sets what the prompts of `rows` say; array of `CONTENT`.

    Blocks that all who have the first of them have, too, are one stretch.
    """
    numbers: dict[tuple[int, Hash], int] = {}  # of a block, by the one before it and its hash
    paths: list[list[int]] = []
    for hashes in blocks:
        path = [0]
        for block in hashes:
            path.append(numbers.setdefault((path[-1], block), len(numbers) + 1))
        paths.append(path[1:])
    children = np.zeros(len(numbers) + 1, np.int64)
    np.add.at(children, [before for before, _ in numbers], 1)
    goes_on = children == 1
    goes_on[[path[-1] for path in paths if path]] = False
    contents: list[tuple[int, int]] = []
    for row, path in zip(rows, paths, strict=True):
        row["content_first"] = len(contents)
        for index, number in enumerate(path):
            if not goes_on[number]:
                contents.append((number, min((index + 1) * block_size, int(row["prompt_tokens"]))))
        row["content_count"] = len(contents) - row["content_first"]
    return np.array(contents, CONTENT)


def read_hashed_lines(path: Path, tick_s: float, block_size: int) -> Table:
    """A JSONL file of timestamp (ticks), input_length, output_length and hash_ids, which may be missing."""
    columns: list[tuple[float, ...]] = []
    blocks: list[Blocks] = []
    places: list[str] = []
    for line, record in json_lines(path):
        places.append(f"line {line}")
        columns.append(numbers_of(path, places[-1], record, "timestamp", "input_length", "output_length"))
        blocks.append(hashes_of(path, places[-1], record.get("hash_ids")))
    ticks, prompt, output = np.array(columns).T
    arrival_s = ticks * tick_s
    prefix = prefix_tokens(path, places, blocks, prompt, arrival_s, block_size)
    rows = rows_of(path, arrival_s, prompt, output, prefix_tokens=prefix)
    return Table(rows, contents=describe(rows, blocks, block_size))
