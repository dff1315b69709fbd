"""Trace readers: recorded requests, in the formats in which they are published, become a `Trace`.

Two readings hold for every format. A length of 0 tokens becomes 1 (an engine cannot run an empty prompt, and prefill
samples one token in any case); their number is logged. `max_tokens` of every row is the longest output in the file:
recorded traces do not say what the client asked for, and a tighter limit would reveal the true output length.
"""

from __future__ import annotations

import ast
import csv
import gzip
import json
import logging
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexirl.errors import UserError
from flexirl.workloads.arrivals import ArrivalProcess, Gamma, Poisson, Weibull
from flexirl.workloads.trace import Trace, check, empty_rows

log = logging.getLogger(__name__)

Column = NDArray[np.float64]
MAX_TOKENS = 2**31 - 1  # trace columns are 32-bit
MOONCAKE_BLOCK, BAILIAN_BLOCK = 512, 16  # prompt tokens per entry of hash_ids
SERVEGEN_MAX_ROWS = 1_000_000  # resampling a larger ServeGen folder scales its rates down to about this many requests


def read_trace(path: str | Path, format: str | None = None, seed: int = 0) -> Trace:
    """Reads a trace, detecting its format from the file's name and first line where `format` is None.

    | format | what it is |
    |---|---|
    | normalised | CSV: arrival_s, prompt_tokens, output_tokens; optional columns are named below |
    | azure | Azure LLM inference CSV: TIMESTAMP, ContextTokens, GeneratedTokens |
    | burstgpt | BurstGPT CSV: Timestamp (s), Request tokens, Response tokens; rows without a response are dropped |
    | vidur | Vidur CSV: arrived_at, num_prefill_tokens, num_decode_tokens |
    | mooncake | Mooncake JSONL: timestamp (ms), input_length, output_length, hash_ids of 512 tokens |
    | bailian | Bailian JSONL: chat_id and the same, but timestamp (s) and hash_ids of 16 tokens |
    | agentic | agent-session JSON, one file or a folder of them; sessions start at seeded random times |
    | servegen | ServeGen folder of chunk-N-trace.csv and chunk-N-dataset.json, resampled with the seed |

    The normalised format's num_images, image_tokens, client_id (becomes the tenant), and prefix_hit_tokens or hash_ids
    may be missing. Any file may be gzipped (name ending in .gz). Rows are stable-sorted by arrival; the original
    offset is kept, and clock times start at 0. Prefix tokens count a prompt's leading blocks that an earlier request
    had.

    Raises UserError, in one sentence naming the place, for a missing, empty, truncated or malformed file.
    """
    path, read = _reader(path, format)
    rows, _ = read(path, seed)
    untimed = np.isnan(rows["arrival_s"])
    if untimed.all():
        raise UserError(f"{path} has lengths but no arrival times; use it as a length model (kind: empirical) instead.")
    if untimed.any():
        raise UserError(
            f"{path}: request {int(np.argmax(untimed)) + 1} has no arrival time, though others do; "
            "give it one, or take it out."
        )
    rows = rows[np.argsort(rows["arrival_s"], kind="stable")]
    check(rows, str(path))
    return Trace(rows, path.name, int(rows["tenant"].max()) + 1)


def read_lengths(path: str | Path, format: str | None = None) -> tuple[np.ndarray, Column | None]:
    """The rows of any trace file, with or without arrival times, and their relative weights (column `prob`) or None.

    Arrival times are NaN where the file has none. Raises UserError as `read_trace` does.
    """
    path, read = _reader(path, format)
    rows, weights = read(path, 0)
    if weights is not None and not (np.isfinite(weights).all() and weights.min() >= 0 and weights.sum() > 0):
        raise UserError(f"{path} has a column prob with a negative or missing weight; weights are 0 or more.")
    return rows, weights


# A reader returns unsorted rows and weights or None.
Reader = Callable[[Path, int], tuple[np.ndarray, Column | None]]


def _reader(path: str | Path, format: str | None) -> tuple[Path, Reader]:
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; give the path of a trace file or folder.")
    name = _detect(path) if format is None else format
    if name not in FORMATS:
        raise UserError(f"{name!r} is not a trace format; choose from {', '.join(FORMATS)}.")
    return path, FORMATS[name]


def _detect(path: Path) -> str:
    if path.is_dir():
        if any(path.glob("chunk-*-trace.csv")):
            return "servegen"
        if any(path.glob("*.json")):
            return "agentic"
        raise UserError(f"{path} is a folder without ServeGen chunk-N-trace.csv or agent-session .json files.")
    if ".jsonl" in path.suffixes:
        return "bailian" if '"chat_id"' in _lines(path)[0] else "mooncake"
    if ".json" in path.suffixes:
        return "agentic"
    names = _header(path)
    for format, column in (
        ("azure", "ContextTokens"),
        ("burstgpt", "Request tokens"),
        ("vidur", "num_prefill_tokens"),
        ("normalised", "prompt_tokens"),
    ):
        if column in names:
            return format
    raise UserError(
        f"{path} has columns {', '.join(names)[:200]}, which no known format has; "
        "name them arrival_s, prompt_tokens, output_tokens."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Text and CSV
# ---------------------------------------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    """The whole file as text, unzipped; raises UserError where it cannot be read or has nothing in it."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is not a complete gzip file ({error}); copy or download it again.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file; a trace is UTF-8 text, gzipped if its name ends in .gz.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from None
    if not text.strip():
        raise UserError(f"{path} is empty; a trace has a header line and at least one request.")
    return text


def _lines(path: Path) -> list[str]:
    """The file's lines, however they end. A text inside JSON may hold other characters that separate lines."""
    return _text(path).replace("\r\n", "\n").replace("\r", "\n").rstrip("\n").split("\n")


def _header(path: Path) -> list[str]:
    return next(csv.reader([_lines(path)[0].strip()]))


class _Csv:
    """A CSV file whose columns are read by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = _lines(path)
        self.names = next(csv.reader([self.lines[0]]))
        if not any(line.strip() for line in self.lines[1:]):
            raise UserError(f"{path} has a header line but no requests; a trace has at least one.")

    def require(self, *names: str) -> None:
        """Raises UserError unless every column is there."""
        for name in names:
            if name not in self.names:
                raise UserError(f"{self.path} has no column {name}; its columns are {', '.join(self.names)[:200]}.")

    def numbers(self, *names: str) -> list[Column]:
        """The columns as float64 arrays; raises UserError, naming line and value, where one is not a number."""
        self.require(*names)
        at = [self.names.index(name) for name in names]
        try:
            table = np.loadtxt(self.lines, delimiter=",", skiprows=1, usecols=at, ndmin=2, comments=None, quotechar='"')
        except ValueError as error:
            self._blame(at)
            raise UserError(f"{self.path} is not a valid CSV file ({error}).") from None
        return [table[:, i] for i in range(len(names))]

    def _blame(self, columns: Sequence[int]) -> None:
        """Finds the first bad value the slow way, for the sake of the message."""
        for line, row in self._rows():
            for column in columns:
                value = row[column] if column < len(row) else ""
                try:
                    float(value)
                except ValueError:
                    raise UserError(
                        f"{self.path}: line {line}, column {self.names[column]} is {value!r}; it should be a number."
                    ) from None

    def strings(self, name: str) -> list[str]:
        """One column as text."""
        self.require(name)
        at = self.names.index(name)
        return [row[at] if at < len(row) else "" for _, row in self._rows()]

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        for line, text in enumerate(self.lines[1:], start=2):
            if text.strip():
                yield line, next(csv.reader([text]))


def _rows(
    source: Path, arrival_s: Column, prompt: Column, output: Column, **optional: Column | NDArray[np.int64]
) -> np.ndarray:
    """Unsorted `TRACE_ROW` rows of one file's columns; raises UserError for a value that is not a count of tokens."""
    columns = {"prompt_tokens": prompt, "output_tokens": output, **optional}
    for name, values in columns.items():
        bad = ~((values >= 0) & (values <= MAX_TOKENS) & (values == np.floor(values)))
        if bad.any():
            at = int(np.argmax(bad))
            raise UserError(
                f"{source}: request {at + 1} has {name}={values[at]:g}; it should be a whole number, 0 or more."
            )
    bad = arrival_s < 0
    if bad.any():
        at = int(np.argmax(bad))
        raise UserError(f"{source}: request {at + 1} arrives at {arrival_s[at]:g} s; arrivals start at 0 or later.")
    rows = empty_rows(len(arrival_s))
    rows["arrival_s"] = arrival_s
    for name, values in columns.items():
        rows[name] = values
    for name in ("prompt_tokens", "output_tokens"):
        zeros = int((rows[name] == 0).sum())
        if zeros:
            log.warning("%s: %d requests with %s=0 are read as 1", source, zeros, name)
            rows[name] = np.maximum(rows[name], 1)
    rows["max_tokens"] = rows["output_tokens"].max()
    return rows


def _normalised(path: Path, seed: int) -> tuple[np.ndarray, Column | None]:
    table = _Csv(path)
    table.require("prompt_tokens", "output_tokens")
    wanted = ("arrival_s", "prompt_tokens", "output_tokens", "num_images", "image_tokens", "client_id",
              "prefix_hit_tokens", "prob")  # fmt: skip
    present = [name for name in wanted if name in table.names]
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
        blocks = [text.split() for text in table.strings("hash_ids")]
        optional["prefix_tokens"] = _prefix_tokens(
            blocks, column["prompt_tokens"], column.get("arrival_s"), MOONCAKE_BLOCK
        )
    arrival_s = column.get("arrival_s", np.full(len(column["prompt_tokens"]), np.nan))
    rows = _rows(path, arrival_s, column["prompt_tokens"], column["output_tokens"], **optional)
    return rows, column.get("prob")


def _azure(path: Path, seed: int) -> tuple[np.ndarray, Column | None]:
    table = _Csv(path)
    table.require("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    stamps = table.strings("TIMESTAMP")
    try:
        # The 2024 files carry a UTC offset, which is the same in every row.
        clock = np.array([stamp.removesuffix("+00:00") for stamp in stamps], dtype="datetime64[ns]")
    except ValueError as error:
        raise UserError(f"{path} has a TIMESTAMP that is not a date and time ({error}).") from None
    prompt, output = table.numbers("ContextTokens", "GeneratedTokens")
    arrival_s = (clock - clock.min()) / np.timedelta64(1, "s")
    return _rows(path, arrival_s, prompt, output), None


def _burstgpt(path: Path, seed: int) -> tuple[np.ndarray, Column | None]:
    arrival_s, prompt, output = _Csv(path).numbers("Timestamp", "Request tokens", "Response tokens")
    failed = output == 0
    if failed.any():
        log.warning("%s: %d failed requests (no response tokens) are dropped", path, int(failed.sum()))
    if failed.all():
        raise UserError(f"{path} has only failed requests (Response tokens = 0); a trace has at least one that ran.")
    return _rows(path, arrival_s[~failed], prompt[~failed], output[~failed]), None


def _vidur(path: Path, seed: int) -> tuple[np.ndarray, Column | None]:
    table = _Csv(path)
    prompt, output = table.numbers("num_prefill_tokens", "num_decode_tokens")
    timed = "arrived_at" in table.names
    arrival_s = table.numbers("arrived_at")[0] if timed else np.full(len(prompt), np.nan)
    return _rows(path, arrival_s, prompt, output), None


# ---------------------------------------------------------------------------------------------------------------------
# JSON
# ---------------------------------------------------------------------------------------------------------------------


def _prefix_tokens(
    blocks: Sequence[Iterable[object]], prompt: Column, arrival_s: Column | None, block_size: int
) -> NDArray[np.int64]:
    """Tokens of each prompt's leading blocks that an earlier request had, int64, as in an endless prefix cache."""
    order = np.arange(len(blocks)) if arrival_s is None else np.argsort(arrival_s, kind="stable")
    seen: set[object] = set()
    tokens = np.zeros(len(blocks), dtype=np.int64)
    for row in order:
        leading = True
        for block in blocks[row]:
            leading = leading and block in seen
            tokens[row] += block_size * leading
            seen.add(block)
    # The last block of a prompt may be partly filled.
    return np.minimum(tokens, prompt.astype(np.int64))


def _fields(path: Path, place: str, record: Any, *names: str) -> tuple[float, ...]:
    """Numbers of one JSON object; raises UserError where one is missing or not a number."""
    for name in names:
        value = record.get(name) if isinstance(record, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{path}: {place} has {name}={value!r}; it should be a number.")
    return tuple(float(record[name]) for name in names)


def _hashes(path: Path, line: int, record: dict[str, Any], prompt: float, block: int) -> list[int]:
    """The block hashes of one request; raises UserError for what is no list of numbers or of blocks of another size."""
    hashes = record.get("hash_ids")
    if hashes is None:
        return []
    if not isinstance(hashes, list) or not all(
        isinstance(entry, int) and not isinstance(entry, bool) for entry in hashes
    ):
        raise UserError(f"{path}: line {line} has hash_ids={str(hashes)[:60]}; it should be a list of whole numbers.")
    expected = math.ceil(prompt / block)
    if hashes and len(hashes) != expected:
        raise UserError(
            f"{path}: line {line} has {len(hashes)} hash_ids for {prompt:g} prompt tokens, not the {expected} blocks "
            f"of {block} tokens; it is a trace of another kind, so convert it to CSV with arrival_s in seconds."
        )
    return hashes


def _hashed(path: Path, block: int, per_second: float) -> tuple[np.ndarray, Column | None]:
    """A request a line with hashes of its prompt's blocks of `block` tokens; `per_second` units of its timestamp."""
    columns: list[tuple[float, ...]] = []
    blocks: list[list[int]] = []
    for line, text in enumerate(_lines(path), start=1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path}: line {line} is not JSON ({error}); each line should be one request.") from None
        columns.append(_fields(path, f"line {line}", record, "timestamp", "input_length", "output_length"))
        blocks.append(_hashes(path, line, record, columns[-1][1], block))
    table = np.array(columns)
    arrival_s, prompt, output = table[:, 0] / per_second, table[:, 1], table[:, 2]
    prefix = _prefix_tokens(blocks, prompt, arrival_s, block)
    return _rows(path, arrival_s, prompt, output, prefix_tokens=prefix), None


def _mooncake(path: Path, seed: int) -> tuple[np.ndarray, Column | None]:
    return _hashed(path, MOONCAKE_BLOCK, 1e3)


def _bailian(path: Path, seed: int) -> tuple[np.ndarray, Column | None]:
    return _hashed(path, BAILIAN_BLOCK, 1.0)


def _agentic(path: Path, seed: int) -> tuple[np.ndarray, Column | None]:
    """Sessions overlap: each starts at a random time within the span of the longest, since none is recorded."""
    sessions = [_session(file) for file in (sorted(path.glob("*.json*")) if path.is_dir() else [path])]
    span = max(float(session["arrival_s"].max()) for session in sessions)
    rng = np.random.default_rng(seed)
    for session in sessions if len(sessions) > 1 else []:
        session["arrival_s"] += rng.random() * span
    rows = np.concatenate(sessions)
    rows["max_tokens"] = rows["max_tokens"].max()
    return rows, None


def _session(path: Path) -> np.ndarray:
    """One session's requests, times from its start; a subagent's times count from the subagent's start."""
    try:
        session = json.loads(_text(path))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not a JSON file ({error}).") from None
    columns: list[tuple[float, ...]] = []
    blocks: list[list[int]] = []

    def collect(requests: list[Any], start: float) -> None:
        for request in requests:
            (at,) = _fields(path, f"request {len(columns) + 1}", request, "t")
            if "requests" in request:
                collect(request["requests"], start + at)
            else:
                columns.append((start + at, *_fields(path, f"request {len(columns) + 1}", request, "in", "out")))
                blocks.append(request.get("hash_ids") or [])

    collect(session.get("requests") or [] if isinstance(session, dict) else [], 0.0)
    if not columns:
        raise UserError(f"{path} has no list of requests; an agent session has at least one.")
    arrival_s, prompt, output = np.array(columns).T
    prefix = _prefix_tokens(blocks, prompt, arrival_s, int(session.get("block_size", 64)))
    return _rows(path, arrival_s, prompt, output, prefix_tokens=prefix)


# ---------------------------------------------------------------------------------------------------------------------
# ServeGen
# ---------------------------------------------------------------------------------------------------------------------


def _servegen(path: Path, seed: int) -> tuple[np.ndarray, Column | None]:
    """Resamples every client: in each window, gaps of the fitted family at the window's rate; lengths independent.

    A trace file has rows of start (s), rate (1/s), cv of the gaps, family, and two parameters (shape, scale). As in
    ServeGen's own generator the rate comes from the rate column and the family only sets the shape of the gaps.
    """
    files = sorted(path.glob("chunk-*-trace.csv"), key=lambda file: int(re.sub(r"\D", "", file.name) or 0))
    if not files:
        raise UserError(f"{path} has no chunk-N-trace.csv; give the folder of one ServeGen service.")
    clients = [(_windows(file), _datasets(Path(str(file).replace("-trace.csv", "-dataset.json")))) for file in files]
    expected = sum(rate * length for windows, dataset in clients if dataset for _, length, rate, _ in windows)
    scale = min(1.0, SERVEGEN_MAX_ROWS / max(expected, 1.0))
    if scale < 1:
        log.warning("%s: about %.3g requests; rates are scaled by %.3g to resample it", path, expected, scale)
    drawn: list[np.ndarray] = []
    children = np.random.SeedSequence(seed).spawn(len(clients))
    for tenant, ((windows, dataset), child) in enumerate(zip(clients, children, strict=True)):
        if not dataset:
            continue  # a client without recorded lengths cannot be resampled
        rng = np.random.default_rng(child)
        starts = np.array([start for start, _ in dataset])
        for start, length, rate, process in windows:
            times = start + process.draw(rate * scale, length, rng)
            at = max(int(np.searchsorted(starts, start, side="right")) - 1, 0)
            drawn.append(_servegen_rows(path, times, dataset[at][1], tenant, rng))
    if sum(map(len, drawn)) == 0:
        raise UserError(f"{path} has no client with both arrivals and lengths; add its chunk-N-dataset.json files.")
    rows = np.concatenate(drawn)
    rows["max_tokens"] = rows["output_tokens"].max()
    # Tenants are numbered densely: some clients have no requests.
    rows["tenant"] = np.unique(rows["tenant"], return_inverse=True)[1]
    return rows, None


def _windows(path: Path) -> list[tuple[float, float, float, ArrivalProcess]]:
    """Start (s), length (s), rate (1/s) and arrival process of each window with arrivals."""
    entries: list[tuple[float, float, ArrivalProcess]] = []
    for line, row in enumerate(csv.reader(_lines(path)), start=1):
        try:
            start, rate = float(row[0]), float(row[1])
            entries.append((start, rate, _process(row) if rate > 0 else Poisson()))
        except (ValueError, IndexError):
            raise UserError(
                f"{path}: line {line} is {','.join(row)[:80]!r}; it should be start, rate, cv, Gamma or Weibull, "
                "shape, scale."
            ) from None
    starts = [start for start, _, _ in entries]
    length = np.diff(starts, append=starts[-1] + (starts[-1] - starts[-2] if len(starts) > 1 else 600.0))
    return [
        (start, float(span), rate, process)
        for (start, rate, process), span in zip(entries, length, strict=True)
        if rate > 0
    ]


def _process(row: list[str]) -> ArrivalProcess:
    family, shape = row[3], float(row[4])
    if family == "Gamma":
        return Gamma(cv=shape**-0.5)
    if family == "Weibull":
        return Weibull(shape=shape)
    if family in ("Exponential", "Poisson"):
        return Poisson()
    raise ValueError(family)


Table = tuple[NDArray[np.int64], Column]  # values and the running sum of their probabilities


def _datasets(path: Path) -> list[tuple[float, dict[str, Table]]]:
    """Start and distributions of each length window that has any, in time order; empty without a dataset file."""
    if not path.exists():
        return []
    try:
        windows = json.loads(_text(path))
        parsed = [
            (float(start), {name: _table(text) for name, text in fields.items()}) for start, fields in windows.items()
        ]
    except UserError:
        raise
    except (ValueError, SyntaxError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a ServeGen dataset ({error}); it should map window starts to distributions."
        ) from None
    usable = [(start, fields) for start, fields in parsed if all(len(values) for values, _ in fields.values())]
    return sorted(usable, key=lambda window: window[0])


def _table(text: str) -> Table:
    """A distribution written as the text of a Python dict {value: probability}; `literal_eval` runs no code."""
    pairs = ast.literal_eval(text)
    values = np.array(list(pairs.keys()), dtype=np.int64)
    ends = np.cumsum(np.array(list(pairs.values()), dtype=np.float64))
    return values, ends / ends[-1] if len(ends) else ends


def _draw(table: Table, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    values, ends = table
    return values[np.minimum(np.searchsorted(ends, rng.random(count), side="right"), len(values) - 1)]


def _servegen_rows(
    path: Path, times: Column, fields: dict[str, Table], tenant: int, rng: np.random.Generator
) -> np.ndarray:
    """One window's requests. Text-only services have input_tokens, multimodal ones text and image tokens."""
    text = fields.get("text_tokens") or fields.get("input_tokens")
    if text is None or "output_tokens" not in fields:
        raise UserError(f"{path} has a dataset without input_tokens (or text_tokens) and output_tokens.")
    count = len(times)
    rows = empty_rows(count)
    rows["arrival_s"], rows["tenant"] = times, tenant
    prompt = _draw(text, count, rng)
    rows["output_tokens"] = np.maximum(_draw(fields["output_tokens"], count, rng), 1)
    if "image_tokens" in fields:
        images = _draw(fields["image_count"], count, rng)
        owner = np.repeat(np.arange(count), images)
        tokens = np.bincount(owner, _draw(fields["image_tokens"], len(owner), rng), minlength=count).astype(np.int64)
        rows["num_images"] = np.where(tokens > 0, images, 0)
        rows["image_tokens"] = tokens
        prompt = prompt + tokens
    rows["prompt_tokens"] = np.maximum(prompt, 1)
    return rows


FORMATS: dict[str, Reader] = {
    "normalised": _normalised,
    "azure": _azure,
    "burstgpt": _burstgpt,
    "vidur": _vidur,
    "mooncake": _mooncake,
    "bailian": _bailian,
    "agentic": _agentic,
    "servegen": _servegen,
}
