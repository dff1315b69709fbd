"""The plain CSV: arrival_s, prompt_tokens, output_tokens, and optional columns for images, tenants, prefix hits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flexirl.errors import UserError
from flexirl.workloads.readers import mooncake
from flexirl.workloads.readers.blocks import Blocks, hashes_of, prefix_tokens
from flexirl.workloads.readers.formats import Column, Format, Table
from flexirl.workloads.readers.rows import rows_of
from flexirl.workloads.readers.text import Csv

COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens", "num_images", "image_tokens", "client_id",
           "prefix_hit_tokens", "prob")  # fmt: skip


def _read(path: Path, seed: int) -> Table:
    table = Csv(path)
    table.require("prompt_tokens", "output_tokens")
    present = [name for name in COLUMNS if name in table.names]
    column = dict(zip(present, table.numbers(*present), strict=True))
    if "arrival_s" in column and np.isnan(column["arrival_s"]).any():
        at = int(np.argmax(np.isnan(column["arrival_s"])))
        raise UserError(f"{path}: request {at + 1} has no arrival_s; it should be a number of seconds.")
    optional: dict[str, Column | NDArray[np.int64]] = {
        name: column[name] for name in ("num_images", "image_tokens") if name in column
    }
    if "client_id" in column:
        optional["tenant"] = np.unique(column["client_id"], return_inverse=True)[1]
    if "prefix_hit_tokens" in column:
        optional["prefix_tokens"] = column["prefix_hit_tokens"]
    elif "hash_ids" in table.names:
        cells = table.strings("hash_ids")
        places = [f"line {line}" for line, _ in cells]
        blocks = [_hashes(path, place, text) for place, (_, text) in zip(places, cells, strict=True)]
        prompt = column["prompt_tokens"]
        optional["prefix_tokens"] = prefix_tokens(path, places, blocks, prompt, column.get("arrival_s"), mooncake.BLOCK)
    arrival_s = column.get("arrival_s", np.full(len(column["prompt_tokens"]), np.nan))
    rows = rows_of(path, arrival_s, column["prompt_tokens"], column["output_tokens"], **optional)
    return rows, column.get("prob")


def _hashes(path: Path, place: str, text: str) -> Blocks:
    """Hashes with blanks between them, or a JSON list of them."""
    if not text.lstrip().startswith(("[", "{", '"')):
        return list(text.split())
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    return hashes_of(path, place, value)


FORMAT = Format("normalised", lambda sample: sample.kind == "csv" and sample.has("prompt_tokens"), _read)
