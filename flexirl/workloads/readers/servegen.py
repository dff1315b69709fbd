"""ServeGen folder: per client chunk-N-trace.csv (rates) and chunk-N-dataset.json (lengths), resampled with a seed."""

from __future__ import annotations

import ast
import csv
import logging
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexirl.errors import UserError
from flexirl.workloads.arrivals import ArrivalProcess, Gamma, Poisson, Weibull
from flexirl.workloads.readers.formats import Column, Format, Sample, Table
from flexirl.workloads.readers.text import json_of, lines_of
from flexirl.workloads.trace import empty_rows

log = logging.getLogger(__name__)

MAX_ROWS = 1_000_000  # resampling a larger folder scales its rates down to about this many requests


def _recognises(sample: Sample) -> bool:
    return sample.kind == "folder" and any(fnmatch(name, "chunk-*-trace.csv") for name in sample.names or ())


def _read(path: Path, seed: int) -> Table:
    """Resamples every client: in each window, gaps of the fitted family at the window's rate; lengths independent.

    A trace file has rows of start (s), rate (1/s), cv of the gaps, family, and two parameters (shape, scale). As in
    ServeGen's own generator the rate comes from the rate column and the family only sets the shape of the gaps.
    """
    files = sorted(path.glob("chunk-*-trace.csv"), key=lambda file: int(re.sub(r"\D", "", file.name) or 0))
    if not files:
        raise UserError(f"{path} has no chunk-N-trace.csv; give the folder of one ServeGen service.")
    clients = [(_windows(file), _datasets(Path(str(file).replace("-trace.csv", "-dataset.json")))) for file in files]
    requests = [sum(rate * length for _, length, rate, _ in windows) for windows, _ in clients]
    expected = sum(count for count, (_, dataset) in zip(requests, clients, strict=True) if dataset)
    scale = min(1.0, MAX_ROWS / max(expected, 1.0))
    without = sum(not dataset for _, dataset in clients)
    if without and expected:
        log.warning(
            "%s: %d of %d clients have no lengths (chunk-N-dataset.json) and are left out, %.1f%% of all requests",
            path, without, len(clients), 100 * (1 - expected / sum(requests)),
        )  # fmt: skip
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
    return Table(rows)


def _windows(path: Path) -> list[tuple[float, float, float, ArrivalProcess]]:
    """Start (s), length (s), rate (1/s) and arrival process of each window with arrivals."""
    entries: list[tuple[float, float, ArrivalProcess]] = []
    for line, row in enumerate(csv.reader(lines_of(path)), start=1):
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


Lengths = tuple[NDArray[np.int64], Column]  # values and the running sum of their probabilities


def _datasets(path: Path) -> list[tuple[float, dict[str, Lengths]]]:
    """Start and distributions of each length window that has any, in time order; empty without a dataset file."""
    if not path.exists():
        return []
    try:
        windows: Any = json_of(path)
        parsed = [
            (float(start), {name: _lengths(text) for name, text in fields.items()}) for start, fields in windows.items()
        ]
    except UserError:
        raise
    except (ValueError, SyntaxError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a ServeGen dataset ({error}); it should map window starts to distributions."
        ) from None
    usable = [(start, fields) for start, fields in parsed if all(len(values) for values, _ in fields.values())]
    return sorted(usable, key=lambda window: window[0])


def _lengths(text: str) -> Lengths:
    """A distribution written as the text of a Python dict {value: probability}; `literal_eval` runs no code."""
    pairs = ast.literal_eval(text)
    values = np.array(list(pairs.keys()), dtype=np.int64)
    ends = np.cumsum(np.array(list(pairs.values()), dtype=np.float64))
    return values, ends / ends[-1] if len(ends) else ends


def _draw(table: Lengths, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    values, ends = table
    return values[np.minimum(np.searchsorted(ends, rng.random(count), side="right"), len(values) - 1)]


def _servegen_rows(
    path: Path, times: Column, fields: dict[str, Lengths], tenant: int, rng: np.random.Generator
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


FORMAT = Format("servegen", _recognises, _read)
