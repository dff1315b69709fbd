"""A service's own log, CSV or JSONL: a request a line, its time and lengths under the names that services give them.

`columns.py` says which names are known, `instants.py` which times. Lines without a length or a time are left out, up to
a limit. Rows need not be sorted.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexirl.errors import UserError
from flexirl.workloads.readers import mooncake
from flexirl.workloads.readers.blocks import Blocks, describe, hashes_of, prefix_tokens
from flexirl.workloads.readers.columns import columns_of, is_log
from flexirl.workloads.readers.formats import Column, Format, Sample, Table
from flexirl.workloads.readers.instants import no_time, seconds_of_numbers, seconds_of_texts
from flexirl.workloads.readers.rows import rows_of
from flexirl.workloads.readers.text import Csv, json_lines
from flexirl.workloads.readers.turns import describe_turns, link, turns_before
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

log = logging.getLogger(__name__)

MOST_LEFT_OUT = 0.1  # of the lines: a log with more of them that say nothing is not what it is taken for
_NOTHING = {"", "null", "none", "nan", "na", "n/a", "-"}
_CLASSES = {
    IMMEDIATE: {"immediate", "interactive", "online", "realtime", "default", "standard", "auto", "priority", "chat",
                "false", "0", "0.0"},
    DEFERRED: {"deferred", "batch", "offline", "flex", "background", "true", "1", "1.0"},
}  # fmt: skip
_HOURS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def read_log(path: Path, asked: Mapping[str, str] | None = None) -> Table:
    """Rows of the log, without times where it has none, and their weights or None. asked: see `columns_of`."""
    names = _names(path)
    column = columns_of(path, names, asked)
    plain = [what for what in column if what not in ("class", "window", "hash_ids")]
    try:
        if path.name.removesuffix(".gz").endswith(".jsonl") or len(plain) < len(column):
            raise ValueError
        # The fast way, for large files of nothing but numbers.
        values = dict(zip(plain, Csv(path).plain_numbers(*(column[what] for what in plain)), strict=True))
        if not all(np.isfinite(values[what]).all() for what in values):
            raise ValueError
        cells: dict[str, list[str]] = {}
        lines = np.arange(2, 2 + len(values["prompt_tokens"])).tolist()
        arrival_s = None
        if "arrival" in values:
            arrival_s = seconds_of_numbers(path, column["arrival"], values["arrival"])
    except ValueError:
        lines, cells = _cells(path, column)
        counts = [what for what in plain if what not in ("arrival", "tenant", "session")]
        values = {what: _numbers(path, column[what], lines, cells[what]) for what in counts}
        arrival_s = _times(path, column["arrival"], lines, cells["arrival"]) if "arrival" in column else None
    rows, contents = _rows(path, column, lines, cells, values, arrival_s)
    return Table(rows, values.get("prob"), contents)


def _rows(
    path: Path,
    column: Mapping[str, str],
    lines: Sequence[int],
    cells: Mapping[str, list[str]],
    values: Mapping[str, Column],
    arrival_s: Column | None,
) -> tuple[np.ndarray, np.ndarray]:
    prompt, output = values["prompt_tokens"], values["output_tokens"]
    optional: dict[str, Column | NDArray[np.int64]] = {
        name: values[name] for name in ("num_images", "image_tokens") if name in values
    }
    if "tenant" in column:
        tenants = values["tenant"] if "tenant" in values else _in_order(cells["tenant"])
        optional["tenant"] = np.unique(tenants, return_inverse=True)[1]
    blocks: list[Blocks] = []
    if "hash_ids" in cells:
        places = [f"line {line}" for line in lines]
        blocks = [_hashes(path, place, text) for place, text in zip(places, cells["hash_ids"], strict=True)]
        optional["prefix_tokens"] = prefix_tokens(path, places, blocks, prompt, arrival_s, mooncake.BLOCK)
    if "cached_tokens" in values:
        optional["prefix_tokens"] = values["cached_tokens"]
    rows = rows_of(path, np.full(len(lines), np.nan) if arrival_s is None else arrival_s, prompt, output, **optional)
    if "max_tokens" in values:
        asked = np.where(np.isnan(values["max_tokens"]), rows["max_tokens"], values["max_tokens"])
        rows["max_tokens"] = np.maximum(np.clip(asked, 1, rows["max_tokens"].max()), rows["output_tokens"])
    if "class" in cells:
        rows["request_class"] = _each(path, column["class"], lines, cells["class"], _class)
    if "window" in cells:
        rows["window_s"] = _each(path, column["window"], lines, cells["window"], _window)
    if "session" in column and arrival_s is not None:
        sessions = values["session"].tolist() if "session" in values else [text or None for text in cells["session"]]
        link(rows, turns_before(rows, sessions))
    return rows, describe(rows, blocks, mooncake.BLOCK) if blocks else describe_turns(rows)


def _names(path: Path) -> list[str]:
    """Of all columns; of a JSONL file, of the fields of its first lines, nested ones with dots."""
    if not path.name.removesuffix(".gz").endswith(".jsonl"):
        return Csv(path).names
    names: dict[str, None] = {}
    for line, record in json_lines(path):
        names |= dict.fromkeys(_flat(path, line, record))
        if line > 100:
            break
    return list(names)


def _flat(path: Path, line: int, record: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UserError(f"{path}: line {line} is {json.dumps(record)[:80]}; each line should be a JSON object.")
    flat: dict[str, Any] = {}
    for name, value in record.items():
        flat |= _flat(path, line, value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _cells(path: Path, column: Mapping[str, str]) -> tuple[list[int], dict[str, list[str]]]:
    """Line numbers and texts of the columns, without the lines that lack a length or a time."""
    wanted = list(column.values())
    needed = [list(column).index(what) for what in ("prompt_tokens", "output_tokens", "arrival") if what in column]
    read: list[tuple[int, list[str]]] = []
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        for line, record in json_lines(path):
            flat = _flat(path, line, record)
            read.append((line, [_text(flat.get(name)) for name in wanted]))
    else:
        table = Csv(path)
        at = [table.names.index(name) for name in wanted]
        read = [(line, [row[i].strip() if i < len(row) else "" for i in at]) for line, row in table.rows()]
    if not read:
        raise UserError(f"{path} has a header line but no requests; a trace has at least one.")
    whole = [(line, row) for line, row in read if not any(row[i].lower() in _NOTHING for i in needed)]
    left_out = len(read) - len(whole)
    if left_out:
        line, row = next((line, row) for line, row in read if any(row[i].lower() in _NOTHING for i in needed))
        lacking = next(wanted[i] for i in needed if row[i].lower() in _NOTHING)
        if left_out > MOST_LEFT_OUT * len(read):
            raise UserError(
                f"{path}: {left_out} of {len(read)} lines lack a length or a time, the first in line {line}, column "
                f"{lacking}; up to {MOST_LEFT_OUT:.0%} would be left out. If it is in another column, name that in "
                "workload.columns."
            )
        log.warning(
            "%s: %d of %d lines lack a length or a time and are left out (%.2f%%), the first in line %d, column %s",
            path, left_out, len(read), 100 * left_out / len(read), line, lacking,
        )  # fmt: skip
    lines = [line for line, _ in whole]
    return lines, {what: [row[i] for _, row in whole] for i, what in enumerate(column)}


def _in_order(names: Sequence[str]) -> NDArray[Any]:
    """Names that sort as numbers where they are numbers."""
    try:
        return np.array(names, dtype=np.float64)
    except ValueError:
        return np.array(names)


def _text(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def _numbers(path: Path, name: str, lines: Sequence[int], texts: Sequence[str]) -> Column:
    """NaN where there is nothing; raises UserError, naming line and text, for what is no number."""
    return np.array(_each(path, name, lines, texts, _number), dtype=np.float64)


def _number(text: str) -> float:
    return np.nan if text.lower() in _NOTHING else float(text)


def _times(path: Path, name: str, lines: Sequence[int], texts: Sequence[str]) -> Column:
    numbers = np.array([_finite(text) for text in texts])
    bad = np.isnan(numbers)
    if bad.mean() > 0.5:  # dates, then
        return seconds_of_texts(path, name, lines, texts)
    if bad.any():
        at = int(np.argmax(bad))
        raise no_time(path, name, lines[at], texts[at])
    return seconds_of_numbers(path, name, numbers)


def _finite(text: str) -> float:
    """NaN for what is no finite number."""
    try:
        number = float(text)
    except ValueError:
        return np.nan
    return number if np.isfinite(number) else np.nan


def _class(text: str) -> int:
    word = text.lower()
    if word in _NOTHING:
        return IMMEDIATE
    for request_class, words in _CLASSES.items():
        if word in words:
            return request_class
    raise ValueError("immediate or deferred (or interactive, batch, flex, true, false)")


def _window(text: str) -> float:
    """Seconds; infinity where there is none."""
    if text.lower() in _NOTHING:
        return np.inf
    match = re.fullmatch(r"([0-9.]+)\s*([smhd]?)", text)
    if match is None or not float(match[1]) > 0:
        raise ValueError("seconds, or a number with s, m, h or d, such as 24h")
    return float(match[1]) * _HOURS[match[2] or "s"]


def _each(path: Path, name: str, lines: Sequence[int], texts: Sequence[str], read: Callable[[str], Any]) -> list[Any]:
    """`read` of every text; raises UserError that names the first line of which it raises ValueError."""
    values = []
    for line, text in zip(lines, texts, strict=True):
        try:
            values.append(read(text))
        except ValueError as error:
            should = "a number" if read is _number else error
            raise UserError(f"{path}: line {line}, column {name} is {text[:80]!r}; it should be {should}.") from None
    return values


def _hashes(path: Path, place: str, text: str) -> Blocks:
    """Hashes with blanks between them, or a JSON list of them."""
    if not text.lstrip().startswith(("[", "{", '"')):
        return list(text.split())
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    return hashes_of(path, place, value)


def _recognises(sample: Sample) -> bool:
    # These fields are Mooncake's, whose times are milliseconds from a start of their own; without its block hashes they
    # may be anybody's, so the user is asked.
    unsure = sample.kind == "jsonl" and sample.has("timestamp", "input_length", "output_length")
    return sample.kind in ("csv", "jsonl") and sample.names is not None and is_log(sample.names) and not unsure


FORMAT = Format("log", _recognises, lambda path, seed: read_log(path))
