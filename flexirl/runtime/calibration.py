"""Calibration: measures an executor iteration by iteration and fits the step-time model to what it measured.

Iterations are drawn over the whole range that an engine can plan, log-uniformly, so that small ones count as much as
large ones: decodes alone, a prefill chunk alone, both together, and chunks with images where the model takes any. What
the host does between two iterations is measured on the engine itself, running a mix of requests, and so is how well the
fitted model predicts that run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from flexirl.errors import UserError
from flexirl.runtime.clock import VirtualClock
from flexirl.runtime.engine import UNITS, EngineProfile, make_profile
from flexirl.runtime.executor import Batch, Executor, Moves
from flexirl.runtime.kv_cache import blocks_for
from flexirl.runtime.live import LiveEngine, Request, Step
from flexirl.runtime.policy import Policy
from flexirl.runtime.random_prompts import draw_prompt
from flexirl.runtime.sampling import Sampling
from flexirl.runtime.step_time import BATCH, COEFFICIENTS, design_matrix, fit
from flexirl.workloads.scenario import SLO
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

REPEATS = 5  # runs of each drawn iteration: their median is its time, their spread the noise
LEAST_SHAPES = 40  # iterations drawn at least, however slow the engine is
SWAP_BLOCKS = 64  # blocks moved at once to measure the way to host memory
RUN_REQUESTS = 64  # of the run on the engine


@dataclass(frozen=True)
class Shape:
    """An iteration: `decodes` sequences at `context` tokens each, and a chunk of `chunk` tokens behind `before`.

    Of the chunk, `image_tokens` stand for `images` images, all of one size.
    """

    decodes: int
    context: int
    chunk: int
    before: int
    images: int = 0
    image_tokens: int = 0


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    profile: the fitted engine; features, times_s: `BATCH` records (n,) and seconds (n,) of the drawn iterations;
    steps: iterations of the engine's own run, and predicted_s what the profile says they take.
    """

    profile: EngineProfile
    features: np.ndarray
    times_s: np.ndarray
    steps: list[Step]
    predicted_s: np.ndarray


def draw_shapes(profile: EngineProfile, rng: np.random.Generator, images: bool = False) -> Iterator[Shape]:
    """Endless iterations that the engine could plan; every third has decodes alone, every third a chunk alone.

    images: whether half of the chunks have images.
    """
    limits = profile.values
    longest = int(limits["max_model_len"])
    tokens = int(limits["max_tokens_per_step"])
    cache_tokens = int(limits["kv_blocks"] * limits["block_size"])

    def log_uniform(most: int) -> int:
        return int(np.exp(rng.uniform(0.0, np.log(most + 1.0))))

    kind = 0
    while True:
        decodes = log_uniform(min(int(limits["max_running"]) - 1, tokens - 2)) if kind != 1 else 0
        # A chunk of one token would be a decode by another name.
        chunk = max(log_uniform(min(tokens - decodes, longest)), 2) if kind != 0 else 0
        before = log_uniform(longest - chunk) - 1 if chunk < longest and rng.random() < 0.5 else 0
        room = cache_tokens - _padded(chunk + before, limits) if chunk else cache_tokens
        # A block of each decode may be partly filled.
        context = min(log_uniform(longest), room // max(decodes, 1) - int(limits["block_size"]))
        if decodes == 0 or context >= 1:
            count = size = 0
            if images and chunk and rng.random() < 0.5:
                size = log_uniform(chunk - 1)
                count = log_uniform(chunk // (size + 1))
            yield Shape(decodes, context if decodes else 0, chunk, before, count, count * size)
            kind = (kind + 1) % 3


def _padded(tokens: int, limits: Any) -> int:
    return blocks_for(tokens, int(limits["block_size"])) * int(limits["block_size"])


def make_batch(shape: Shape, executor: Executor, rng: np.random.Generator) -> tuple[Batch, np.ndarray, Request | None]:
    """The flattened batch of a shape, random tokens in blocks of their own, and its features (0-d `BATCH`).

    And the request of the chunk, in place `shape.decodes`, if it has images.
    """
    block_size = int(executor.profile.values["block_size"])
    query_lens = np.array([1] * shape.decodes + [shape.chunk] * (shape.chunk > 0), np.int64)
    chunk_end = shape.before + shape.chunk
    context_lens = np.array([shape.context] * shape.decodes + [chunk_end] * (shape.chunk > 0), np.int64)
    blocks = -(-context_lens // block_size)
    table = np.zeros((len(blocks), blocks.max()), np.int32)
    free = rng.permutation(int(executor.profile.values["kv_blocks"])).astype(np.int32)
    for row, count, last in zip(table, blocks, np.cumsum(blocks), strict=True):
        row[:count] = free[last - count : last]
    sequence = np.repeat(np.arange(len(blocks)), query_lens)
    ends = np.cumsum(query_lens)
    positions = context_lens[sequence] - ends[sequence] + np.arange(ends[-1])
    slots = table[sequence, positions // block_size].astype(np.int64) * block_size + positions % block_size
    tokens = rng.integers(0, executor.vocab_size, ends[-1])
    chunk, images = draw_prompt(executor, shape.chunk, shape.images, shape.image_tokens, rng)
    tokens[shape.decodes :] = chunk
    pictured = None
    features = np.zeros((), BATCH)
    if images:
        pictured = Request("chunk", [*[0] * shape.before, *chunk], 1, images=images)
        features["image_tokens"] = executor.check_images(pictured)
    features["prefill_tokens"] = shape.chunk
    features["decode_sequences"] = shape.decodes
    features["sampled_sequences"] = len(blocks)
    features["decode_context"] = shape.decodes * shape.context
    features["chunk_context"] = shape.chunk * (shape.before + 0.5 * shape.chunk)
    return Batch(
        tokens=tokens, positions=positions, slots=slots, query_lens=query_lens,
        context_lens=context_lens, block_table=table, sampled_rows=ends - 1,
        draws=np.zeros(len(blocks)), requests=np.arange(len(blocks), dtype=np.int32),
    ), features, pictured  # fmt: skip


def calibrate(
    executor: Executor, policy: Policy, name: str, about: dict[str, Any], seconds: float, seed: int,
    progress: Callable[[float], object] = lambda share: None, now_s: Callable[[], float] = time.perf_counter,
) -> Calibration:  # fmt: skip
    """Measures for about `seconds` and fits; the profile keeps the limits of the executor's own.

    policy: decides in the engine's run; about: machine, model and versions, kept in the profile beside the fit's
    error; progress: called with the share of `seconds` that has passed; now_s: the clock that the executor's work
    moves. Raises UserError for too little time.
    """
    if not seconds > 0:
        raise UserError(f"seconds={seconds} is out of range; give the engine some seconds to be measured in.")
    rng = np.random.default_rng(seed)
    features, times_s, deviations = _measure(executor, rng, seconds, progress, now_s)
    found = fit(features, times_s, seed)
    per_swap_token_s = _measure_swap(executor, now_s)
    steps = _run_engine(executor, policy, rng)
    host_s = float(np.median([step.prepare_s + step.finish_s for step in steps]))
    # The spread of repeats as a standard deviation, by its median: an interruption of the process is not noise.
    noise = 1.4826 * float(np.median(deviations))
    measured = {**found.coefficients, "host_s": host_s, "per_swap_token_s": per_swap_token_s, "noise": noise}
    limits = {field: executor.profile.values[field].item() for field in UNITS}
    origin = {**executor.profile.origin, **dict.fromkeys(measured, f"measured: {about['machine']}, {about['date']}")}
    if executor.image_token is None:
        origin["per_image_token_s"] = "not measured: the model takes no images"
    profile = make_profile(name, {**limits, **measured}, origin, {})

    coefficients = np.array([measured[coefficient] for coefficient in COEFFICIENTS])
    predicted_s = design_matrix(np.array([step.features for step in steps])) @ coefficients + host_s
    actual_s = np.array([step.elapsed_s for step in steps])
    error = np.abs(predicted_s / actual_s - 1)
    report = {
        **found.report, "noise": noise, "run_iterations": len(steps), "run_mape": float(error.mean()),
        "run_total_error": float(predicted_s.sum() / actual_s.sum() - 1), **about,
    }  # fmt: skip
    fitted = EngineProfile(name, profile.values, profile.origin, report)
    return Calibration(fitted, features, times_s, steps, predicted_s)


def _measure(
    executor: Executor, rng: np.random.Generator, seconds: float, progress: Callable[[float], object],
    now_s: Callable[[], float],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Features and seconds of drawn iterations, and all repeats' distance from their median in log(seconds)."""
    features: list[np.ndarray] = []
    times_s: list[float] = []
    deviations: list[float] = []
    began_s = now_s()
    for shape in draw_shapes(executor.profile, rng, executor.image_token is not None):
        passed_s = now_s() - began_s
        if passed_s > seconds and len(times_s) >= LEAST_SHAPES:
            break
        progress(min(passed_s / seconds, 1.0))
        # Other blocks each time, as an engine would have; the first run pays for buffers and, on a GPU, compilation.
        runs_s = []
        for _ in range(REPEATS + 1):
            batch, batch_features, pictured = make_batch(shape, executor, rng)
            if pictured is not None:
                executor.take_images(shape.decodes, pictured)
            runs_s.append(_seconds(partial(executor.execute, batch, None, None), now_s))
            executor.forget(shape.decodes)
        repeats_s = np.array(runs_s[1:])
        features.append(batch_features)
        times_s.append(float(np.median(repeats_s)))
        deviations += np.abs(np.log(repeats_s / times_s[-1])).tolist()
    progress(1.0)
    return np.array(features), np.array(times_s), np.array(deviations)


def _seconds(work: Callable[[], object], now_s: Callable[[], float]) -> float:
    began_s = now_s()
    work()
    return now_s() - began_s


def _measure_swap(executor: Executor, now_s: Callable[[], float]) -> float:
    """Seconds per token to or from host memory; 0 where there is none."""
    limits = executor.profile.values
    blocks = list(range(min(SWAP_BLOCKS, int(limits["kv_blocks"]), int(limits["host_kv_blocks"]))))
    if not blocks:
        return 0.0

    def there_and_back() -> None:
        executor.move(Moves(out={0: blocks}))
        executor.move(Moves(back={0: blocks}, kept={0: 0}))
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    there_and_back()
    taken_s = float(np.median([_seconds(there_and_back, now_s) for _ in range(REPEATS)]))
    executor.forget(0)
    return taken_s / (2 * len(blocks) * int(limits["block_size"]))


def _run_engine(executor: Executor, policy: Policy, rng: np.random.Generator) -> list[Step]:
    """Iterations of the engine on requests of both classes that arrive at once."""
    steps: list[Step] = []
    engine = LiveEngine(
        executor, policy, SLO(1.0, 0.05), clock=VirtualClock(), max_requests=RUN_REQUESTS, on_step=steps.append
    )
    longest = min(int(executor.profile.values["max_model_len"]) // 2, 256)
    for i in range(RUN_REQUESTS):
        tokens, output = rng.integers(1, longest + 1, 2).tolist()
        prompt, images = draw_prompt(executor, tokens, int(rng.integers(3)), tokens // 2, rng)
        kind = DEFERRED if i % 2 else IMMEDIATE
        engine.add_request(Request(str(i), prompt, output, kind, Sampling(ignore_eos=True), images=images))
    engine.drain()
    return [step for step in steps if not step.abandoned]
