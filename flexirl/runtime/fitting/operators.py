"""Iteration times composed from measured operator times, and the engine profile that fits them.

A run folder holds `meta.json` (the settings of a recorded vLLM run), `requests.jsonl` (what it served) and
`operators/`: times in microseconds of one layer's operators, profiled one by one on the same GPU:

    dense.csv         layer, tokens, time_us
    per_sequence.csv  layer, sequences, time_us
    attention.csv     prefill_chunk, kv_prefill, n_decode, kv_decode, time_us

One iteration of T tokens and S sampled sequences takes

    embedding(T) + layers x [every other dense operator at T + attention] + final_layernorm(T) + per-sequence ops(S)

where `layernorm` counts twice a layer (before attention and before the MLP). Where the run captured CUDA graphs, the
dense operators see T padded to the next captured size. Nothing is added for the host: an engine that schedules
asynchronously hides that work behind the device, and no table tells how much is left of it. No recorded latency is
used anywhere, so a profile made here predicts the run instead of repeating it. Batches whose decodes differ in length
count at their mean, and the all-reduces of tensor parallelism are left out, since the tables measure neither.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.interpolate import RegularGridInterpolator

from flexirl.errors import UserError
from flexirl.runtime.fitting.recorded_engine import capacity_of
from flexirl.runtime.fitting.requests import read_requests
from flexirl.runtime.profile.engine import EngineProfile, make_profile
from flexirl.runtime.profile.step_time import BATCH, design_matrix, fit

ONCE = ("embedding", "final_layernorm")  # dense operators outside the layers
REPEATS = {"layernorm": 2}  # how often one layer runs an operator, where not once
NEEDED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")  # without these a table is no dense decoder
ATTENTION_AXES = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")

# Published layer counts (config.json, num_hidden_layers), for recorded runs whose meta.json does not say.
LAYERS = {
    "llama-2-7b": 32,
    "llama-2-13b": 40,
    "llama-2-70b": 80,
    "llama-3-8b": 32,
    "llama-3-70b": 80,
    "llama-3.1-8b": 32,
    "llama-3.1-70b": 80,
    "llama-3.2-1b": 16,
    "llama-3.2-3b": 28,
    "llama-3.3-70b": 80,
    "mistral-7b": 32,
    "qwen2.5-0.5b": 24,
    "qwen2.5-1.5b": 28,
    "qwen2.5-3b": 36,
    "qwen2.5-7b": 28,
    "qwen2.5-14b": 48,
    "qwen2.5-32b": 64,
    "qwen2.5-72b": 80,
    "qwen3-0.6b": 28,
    "qwen3-1.7b": 28,
    "qwen3-4b": 36,
    "qwen3-8b": 36,
    "qwen3-14b": 40,
    "qwen3-32b": 64,
}


def _read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; a run folder needs operators/{path.name}.")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    missing = [column for column in columns if not rows or column not in rows[0]]
    if missing:
        raise UserError(f"{path} has no rows with a column {missing[0]}; it needs {', '.join(columns)}.")
    return rows


def _number(row: dict[str, str], column: str, path: Path) -> float:
    try:
        number = float(row[column])
    except (TypeError, ValueError):
        number = float("nan")
    if not (np.isfinite(number) and number >= 0):
        raise UserError(f"{path} has {column}={row[column]}; it needs a number that is not negative.")
    return number


def read_meta(folder: str | Path) -> dict[str, Any]:
    """The settings of a recorded run; raises UserError where `meta.json` is missing or is not JSON."""
    path = Path(folder) / "meta.json"
    try:
        meta = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; a run folder needs the settings of its run.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(meta, dict):
        raise UserError(f"{path} needs one JSON object with the settings of its run.")
    return meta


def model_layers(meta: dict[str, Any]) -> int:
    """Layers of the run's model: the figure `layers` in `meta.json`, else the published count of a known model."""
    if "layers" in meta:
        return int(meta["layers"])
    model = str(meta.get("model", "")).rsplit("/", 1)[-1].lower()
    # A name goes on with "-" and a variant (-instruct, -2507), so "llama-3.1-8b" must not match "llama-3.1-80b".
    for name, layers in LAYERS.items():
        if f"{model}-".startswith(f"{name}-") or f"{model}-".startswith(f"meta-{name}-"):
            return layers
    raise UserError(f'meta.json names the model {model!r}, whose layers are not known; add "layers": N to it.')


class _Grid:
    """Multilinear interpolation in tokens over a measured grid of attention times.

    Attention costs a launch plus work linear in each of its four sizes (quadratic in a chunk alone), so straight
    lines between measured points follow it: on an RTX 4090's grid with every second point left out they predicted
    those within 1.5 to 4.6% along each axis, logarithmic interpolation within 3.5 to 7.5%. Below the grid the
    smallest measured size counts, above it the last line goes on. Combinations that were not measured are filled
    along the axes in turn, from the last one.
    """

    def __init__(self, keys: np.ndarray, times_us: np.ndarray) -> None:
        self.axes = [np.unique(column) for column in keys.T]
        grid = np.full([len(axis) for axis in self.axes], np.nan)
        grid[tuple(np.searchsorted(axis, column) for axis, column in zip(self.axes, keys.T, strict=True))] = times_us
        for dimension in reversed(range(grid.ndim)):
            grid = np.apply_along_axis(_fill, dimension, grid, self.axes[dimension])
        if np.isnan(grid).any():
            raise UserError("attention.csv measures too few combinations to interpolate between them.")
        # One measured size along an axis means a constant; the interpolator wants two.
        for dimension, axis in enumerate(self.axes):
            if len(axis) == 1:
                self.axes[dimension] = np.array([axis[0], axis[0] + 1])
                grid = np.repeat(grid, 2, axis=dimension)
        self.lowest = np.array([axis[0] for axis in self.axes])
        self.lookup = RegularGridInterpolator(self.axes, grid, bounds_error=False, fill_value=None)

    def __call__(self, *point: float) -> float:
        return float(self.lookup(np.maximum(point, self.lowest))[0])


def _fill(line: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """`line` with its gaps filled on straight lines through the nearest two measured points."""
    known = np.flatnonzero(~np.isnan(line))
    if len(known) < 2 or len(known) == len(line):
        return line
    gaps = np.flatnonzero(np.isnan(line))
    right = np.clip(np.searchsorted(known, gaps), 1, len(known) - 1)
    low, high = known[right - 1], known[right]
    slope = (line[high] - line[low]) / (axis[high] - axis[low])
    filled = line.copy()
    filled[gaps] = np.maximum(line[low] + slope * (axis[gaps] - axis[low]), 0.0)
    return filled


@dataclass(frozen=True)
class OperatorTables:
    """Measured operator times of one model on one GPU, and how many layers they repeat over.

    dense, per_sequence: operator -> (sizes, microseconds), sorted by size; capture_sizes: token counts of the
    captured CUDA graphs, ascending, empty for an eager engine.
    """

    dense: dict[str, tuple[np.ndarray, np.ndarray]]
    per_sequence: dict[str, tuple[np.ndarray, np.ndarray]]
    decode_attention: _Grid  # n_decode, kv_decode
    prefill_attention: _Grid  # prefill_chunk, kv_prefill
    mixed_attention: _Grid  # prefill_chunk, kv_prefill, n_decode, kv_decode
    layers: int
    capture_sizes: np.ndarray

    @staticmethod
    def read(folder: str | Path) -> OperatorTables:
        """The tables of a run folder; raises UserError that names what is missing or malformed."""
        folder = Path(folder)
        meta = read_meta(folder)
        dense = _read_lines(folder / "operators" / "dense.csv", "tokens")
        for layer in NEEDED:
            if layer not in dense:
                raise UserError(f"dense.csv has no operator {layer}; only dense decoders can be composed.")
        path = folder / "operators" / "attention.csv"
        rows = _read_csv(path, (*ATTENTION_AXES, "time_us"))
        table = np.array([[_number(row, column, path) for column in (*ATTENTION_AXES, "time_us")] for row in rows])
        keys, times_us = table[:, :4], table[:, 4]
        has_chunk, has_decodes = keys[:, 0] > 0, keys[:, 2] > 0
        for kind, there in (
            ("decodes alone", ~has_chunk & has_decodes),
            ("a chunk alone", has_chunk & ~has_decodes),
            ("a chunk with decodes", has_chunk & has_decodes),
        ):
            if not there.any():
                raise UserError(f"{path} has no row that measures {kind}.")
        resolved = meta.get("resolved_config", {})
        eager = resolved.get("model_config", {}).get("enforce_eager", False)
        sizes = [] if eager else resolved.get("compilation_config", {}).get("cudagraph_capture_sizes") or []
        return OperatorTables(
            dense=dense,
            per_sequence=_read_lines(folder / "operators" / "per_sequence.csv", "sequences"),
            decode_attention=_Grid(keys[~has_chunk & has_decodes][:, 2:], times_us[~has_chunk & has_decodes]),
            prefill_attention=_Grid(keys[has_chunk & ~has_decodes][:, :2], times_us[has_chunk & ~has_decodes]),
            mixed_attention=_Grid(keys[has_chunk & has_decodes], times_us[has_chunk & has_decodes]),
            layers=model_layers(meta),
            capture_sizes=np.array(sorted(sizes), dtype=int),
        )

    def attention_us(self, chunks: Sequence[tuple[int, int]], decode_contexts: Sequence[int] | np.ndarray) -> float:
        """One layer's attention in microseconds, over `chunks` of (tokens, already computed) and the decodes.

        The tables measure one chunk beside decodes of one length. So the chunk that does most work is looked up
        beside all decodes at their mean length, and each further chunk adds its time alone, less the time of the
        smallest measured chunk: one launch serves the whole batch.
        """
        count = len(decode_contexts)
        mean = float(np.mean(decode_contexts)) if count else 0.0
        if not chunks:
            return self.decode_attention(count, mean) if count else 0.0
        largest, *others = sorted(chunks, key=lambda chunk: chunk[0] * (chunk[1] + chunk[0] / 2), reverse=True)
        first = self.mixed_attention(*largest, count, mean) if count else self.prefill_attention(*largest)
        launch = self.prefill_attention(0, 0)
        return first + sum(max(self.prefill_attention(*chunk) - launch, 0.0) for chunk in others)

    def iteration_time_s(
        self,
        chunks: Sequence[tuple[int, int]],
        decode_contexts: Sequence[int] | np.ndarray,
        sampled: int | None = None,
    ) -> float:
        """Seconds of one iteration.

        chunks: (tokens, tokens already computed) per prefill chunk; decode_contexts: tokens each decode attends to;
        sampled: sequences that sample a token, by default all of them.
        """
        tokens = sum(chunk for chunk, _ in chunks) + len(decode_contexts)
        sampled = len(chunks) + len(decode_contexts) if sampled is None else sampled
        captured = self.capture_sizes[self.capture_sizes >= tokens]
        padded = captured[0] if len(captured) else tokens
        once = layer = 0.0
        for name, line in self.dense.items():
            if name in ONCE:
                once += _at(line, padded)
            else:
                layer += REPEATS.get(name, 1) * _at(line, padded)
        if sampled:
            once += sum(_at(line, sampled) for line in self.per_sequence.values())
        return (once + self.layers * (layer + self.attention_us(chunks, decode_contexts))) * 1e-6


def _read_lines(path: Path, size: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    points: dict[str, dict[float, float]] = defaultdict(dict)
    for row in _read_csv(path, ("layer", size, "time_us")):
        points[row["layer"]][_number(row, size, path)] = _number(row, "time_us", path)
    return {
        layer: (np.array(sorted(times)), np.array([times[at] for at in sorted(times)]))
        for layer, times in points.items()
    }


def _at(line: tuple[np.ndarray, np.ndarray], size: float) -> float:
    """Linear interpolation; below the first point its value, above the last one the last line goes on."""
    sizes, times = line
    if size > sizes[-1] and len(sizes) > 1:
        return float(times[-1] + (size - sizes[-1]) * (times[-1] - times[-2]) / (sizes[-1] - sizes[-2]))
    return float(np.interp(size, sizes, times))


def read_lengths(folder: str | Path) -> np.ndarray:
    """Prompt and output tokens of the run's requests: int array (requests, 2)."""
    path = Path(folder) / "requests.jsonl"
    rows: list[list[int]] = []
    for number, request in read_requests(Path(folder)):
        try:
            row = [int(request[name]) for name in ("input_toks", "output_toks")]
        except (KeyError, OverflowError, TypeError, ValueError):
            raise UserError(f"{path}: line {number} needs the numbers input_toks and output_toks.") from None
        if min(row) < 1:
            raise UserError(
                f"{path}: line {number} has {row[0]} + {row[1]} tokens; each request has 1 or more either way."
            )
        rows.append(row)
    return np.array(rows)


def sample_iterations(
    lengths: np.ndarray, kv_tokens: int, max_tokens: int, max_sequences: int, count: int, seed: int = 0
) -> list[tuple[list[tuple[int, int]], np.ndarray, int]]:
    """`count` iterations (chunks, decode contexts, sampled) that an engine of this size may run on these requests.

    Running requests are drawn at a uniform point of their output until a uniform share of the KV cache is full.
    Every second iteration also has prefill: prompts drawn in turn, cut off at a token count that is log-uniform up
    to the iteration's budget; a first prompt may be half done already, as chunked prefill leaves it.
    """
    random = np.random.default_rng(seed)
    iterations: list[tuple[list[tuple[int, int]], np.ndarray, int]] = []
    while len(iterations) < count:
        room = random.uniform(0.02, 1.0) * kv_tokens
        seats = max_sequences
        budget = 0
        if len(iterations) % 2:
            budget = int(np.exp(random.uniform(np.log(min(16, max_tokens)), np.log(max_tokens))))
        drawn = lengths[random.integers(len(lengths), size=max_sequences)]
        contexts = drawn[:, 0] + random.integers(1, drawn[:, 1] + 1)
        running = contexts[: int(np.searchsorted(np.cumsum(contexts), room))][:seats]
        running = running[: max(max_tokens - budget, 0)]
        chunks: list[tuple[int, int]] = []
        sampled = len(running)
        while budget > 0 and len(running) + len(chunks) < seats:
            prompt = int(lengths[random.integers(len(lengths)), 0])
            computed = int(random.integers(prompt)) if not chunks and random.random() < 0.5 else 0
            chunk = min(prompt - computed, budget)
            sampled += computed + chunk == prompt
            chunks.append((chunk, computed))
            budget -= chunk
        if len(running) or chunks:
            iterations.append((chunks, running, sampled))
    return iterations


def features_of(iterations: Sequence[tuple[Sequence[tuple[int, int]], np.ndarray, int]]) -> np.ndarray:
    """The `BATCH` records of iterations given as (chunks, decode contexts, sampled)."""
    features = np.zeros(len(iterations), dtype=BATCH)
    for row, (chunks, contexts, sampled) in zip(features, iterations, strict=True):
        row["prefill_tokens"] = sum(chunk for chunk, _ in chunks)
        row["decode_sequences"] = len(contexts)
        row["sampled_sequences"] = sampled
        row["decode_context"] = np.sum(contexts)
        row["chunk_context"] = sum(chunk * computed + chunk**2 / 2 for chunk, computed in chunks)
    return features


def fit_profile(folder: str | Path, count: int = 8000, given: Mapping[str, int | None] | None = None) -> EngineProfile:
    """The engine of a recorded run: step time fitted to `count` composed iterations, capacity as `capacity_of` has it.

    Deterministic. The fit's report has, beside the usual errors, the mean error on iterations of decodes alone
    (`decode_mape`, `decode_bias`) and on the rest (`mixed_mape`, `mixed_bias`), as shares.
    """
    folder = Path(folder)
    values, origin = capacity_of(folder / "meta.json", read_meta(folder), read_lengths(folder), given or {})
    tables = OperatorTables.read(folder)
    iterations = sample_iterations(
        read_lengths(folder),
        int(values["kv_blocks"] * values["block_size"]),
        int(values["max_tokens_per_step"]),
        int(values["max_running"]),
        count,
    )
    times_s = np.array([tables.iteration_time_s(*iteration) for iteration in iterations])
    features = features_of(iterations)
    fitted = fit(features, times_s)
    values |= fitted.coefficients
    origin |= {
        field: f"fitted to {count} iterations composed from measured operator times" for field in fitted.coefficients
    }
    error = design_matrix(features) @ list(fitted.coefficients.values()) / times_s - 1
    mixed = features["prefill_tokens"] > 0
    report = fitted.report | {
        f"{kind}_{statistic}": float(figure)
        for kind, rows in (("decode", ~mixed), ("mixed", mixed))
        for statistic, figure in (("mape", np.abs(error[rows]).mean()), ("bias", error[rows].mean()))
    }
    return make_profile(folder.resolve().name, values, origin, report)
