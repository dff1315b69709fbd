"""Calibration: measures an executor iteration by iteration and fits the step-time model to what it measured.

Iterations are drawn over the whole range that an engine can plan, log-uniformly, so that small ones count as much as
large ones: decodes alone, prefill chunks alone, both together, and chunks with images where the model takes any.
Decodes of a batch are of different lengths, and chunks of one or several prompts, as an engine's are: both cost time.
Half of the weight in the fit goes to iterations of the engine itself, running requests of a workload: the form is a
little wrong everywhere, and should be least so where the engine works. The run also shows what the host does between
two iterations. How well the fitted model predicts an engine is measured on a second run, of other requests.
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
from flexirl.policies.interface.policy import Policy
from flexirl.runtime.live.clock import VirtualClock
from flexirl.runtime.live.engine import LiveEngine
from flexirl.runtime.live.executor import Batch, Executor, Moves
from flexirl.runtime.live.options import Options
from flexirl.runtime.live.random_prompts import draw_prompt
from flexirl.runtime.live.requests import Request
from flexirl.runtime.live.sampling import Sampling
from flexirl.runtime.live.step import Step
from flexirl.runtime.profile.engine import UNITS, EngineProfile, make_profile
from flexirl.runtime.profile.step_time import BATCH, COEFFICIENTS, design_matrix, fit
from flexirl.runtime.scheduler.kv_cache import blocks_for
from flexirl.workloads.slo import SLO
from flexirl.workloads.trace import DEFERRED, IMMEDIATE, Trace

REPEATS = 5  # runs of each drawn iteration: their median is its time, their spread the noise
LEAST_SHAPES = 40  # iterations drawn at least, however slow the engine is
SWAP_BLOCKS = 64  # blocks moved at once to measure the way to host memory
PROMPTS = 4  # that an iteration's chunk is of, at most
RUN_REQUESTS = 96  # of each run on the engine


@dataclass(frozen=True)
class Shape:
    """An iteration: `decodes` sequences, and `chunk` prompt tokens of `prompts` prompts.

    context: tokens that the decodes attend to, from `context - spread` to `context + spread`, evenly; before: tokens of
    the first prompt computed before; the others begin. Of the chunk, `image_tokens` stand for `images` images, all of
    one size and in the one prompt there is then.
    """

    decodes: int
    context: int
    chunk: int
    before: int
    spread: int = 0
    prompts: int = 1
    images: int = 0
    image_tokens: int = 0


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    profile: the fitted engine; features, times_s: `BATCH` records (n,) and seconds (n,) of the iterations measured for
    the fit; steps: iterations of the engine's second run, and predicted_s what the profile says they take.
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
        # A block of each decode, and of each prompt but the first, may be partly filled.
        prompts = min(int(rng.integers(1, PROMPTS + 1)), chunk // 2, int(limits["max_running"]) - decodes)
        room -= (max(prompts, 1) - 1) * int(limits["block_size"])
        context = min(log_uniform(longest), room // max(decodes, 1) - int(limits["block_size"]))
        if decodes == 0 or context >= 1:
            spread = int(rng.uniform() * min(context - 1, longest - context)) if decodes else 0
            count = size = 0
            if images and chunk and rng.random() < 0.5:
                prompts = 1
                size = log_uniform(chunk - 1)
                count = log_uniform(chunk // (size + 1))
            yield Shape(decodes, context if decodes else 0, chunk, before, spread, prompts, count, count * size)
            kind = (kind + 1) % 3


def _padded(tokens: int, limits: Any) -> int:
    return blocks_for(tokens, int(limits["block_size"])) * int(limits["block_size"])


def make_batch(shape: Shape, executor: Executor, rng: np.random.Generator) -> tuple[Batch, np.ndarray, Request | None]:
    """The flattened batch of a shape, random tokens in blocks of their own, and its features (0-d `BATCH`).

    And the request of the chunk, in place `shape.decodes`, if it has images.
    """
    block_size = int(executor.profile.values["block_size"])
    share, rest = divmod(shape.chunk, max(shape.prompts, 1))
    chunks = np.array([share + rest] + [share] * (shape.prompts - 1) if shape.chunk else [], np.int64)
    before = shape.before * (np.arange(len(chunks)) == 0)
    contexts = shape.context + np.rint(shape.spread * np.linspace(-1.0, 1.0, shape.decodes)).astype(np.int64)
    query_lens = np.concatenate([np.ones(shape.decodes, np.int64), chunks])
    context_lens = np.concatenate([rng.permutation(contexts), before + chunks])
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
    features["decode_context"] = contexts.sum()
    features["chunk_context"] = (chunks * (before + 0.5 * chunks)).sum()
    return Batch(
        tokens=tokens, positions=positions, slots=slots, query_lens=query_lens,
        context_lens=context_lens, block_table=table, sampled_rows=ends - 1,
        draws=np.zeros(len(blocks)), requests=np.arange(len(blocks), dtype=np.int32),
    ), features, pictured  # fmt: skip


def calibrate(
    executor: Executor, policy: Policy, trace: Trace, name: str, about: dict[str, Any], seconds: float, seed: int,
    progress: Callable[[float], object] = lambda share: None, now_s: Callable[[], float] = time.perf_counter,
) -> Calibration:  # fmt: skip
    """Measures for about `seconds` and fits; the profile keeps the limits of the executor's own.

    policy: decides in the engine's runs; trace: whose requests run there, all that the engine can hold; about: machine,
    model and versions, kept in the profile beside the fit's error; progress: called with the share of `seconds` that
    has passed; now_s: the clock that the executor's work moves. Raises UserError for too little time, or if no request
    fits.
    """
    if not seconds > 0:
        raise UserError(f"seconds={seconds} is out of range; give the engine some seconds to be measured in.")
    rng = np.random.default_rng(seed)
    features, times_s, deviations = _measure(executor, rng, seconds, progress, now_s)
    per_swap_token_s = _measure_swap(executor, now_s)
    # Moves and images were measured by themselves; of an image, the features of a step have a share only.
    planned = [
        step for step in _run_engine(executor, policy, trace, rng, now_s)
        if step.features["swap_tokens"] == step.features["image_tokens"] == 0
    ]  # fmt: skip
    weights = np.repeat([1.0, len(features) / len(planned)], [len(features), len(planned)])
    features = np.concatenate([features, [step.features for step in planned]])
    times_s = np.concatenate([times_s, [step.execute_s for step in planned]])
    found = fit(features, times_s, seed, weights)
    host_s = float(np.mean([step.elapsed_s - step.execute_s for step in planned]))
    steps = _run_engine(executor, policy, trace, rng, now_s)
    # The spread of repeats as a standard deviation, by its median: an interruption of the process is not noise.
    noise = 1.4826 * float(np.median(deviations))
    measured = {**found.coefficients, "host_s": host_s, "per_swap_token_s": per_swap_token_s, "noise": noise}
    limits = {field: executor.profile.values[field].item() for field in UNITS}
    origin = {**executor.profile.origin, **dict.fromkeys(measured, f"measured: {about['machine']}, {about['date']}")}
    if executor.image_token is None:
        origin["per_image_token_s"] = "not measured: the model takes no images"
    profile = make_profile(name, {**limits, **measured}, origin, {})

    predicted_s = _predicted_s(profile, steps)
    actual_s = np.array([step.elapsed_s for step in steps])
    error = np.abs(predicted_s / actual_s - 1)
    report = {
        **found.report, "noise": noise, "run_iterations": len(steps), "run_mape": float(error.mean()),
        "run_total_error": float(predicted_s.sum() / actual_s.sum() - 1), **about,
    }  # fmt: skip
    fitted = EngineProfile(name, profile.values, profile.origin, report)
    return Calibration(fitted, features, times_s, steps, predicted_s)


def _predicted_s(profile: EngineProfile, steps: list[Step]) -> np.ndarray:
    """Seconds that the steps take by the profile."""
    coefficients = np.array([profile.values[name] for name in COEFFICIENTS])
    return design_matrix(np.array([step.features for step in steps])) @ coefficients + profile.values["host_s"]


def measure_pace(executor: Executor, policy: Policy, trace: Trace, seed: int) -> float:
    """What an engine of this process takes for its iterations, as a share of what its profile says.

    A processor's speed changes with what else the machine does, and from one process to the next with where its memory
    lies: on two virtual cores by 7% either way. trace: whose requests run, all that the engine can hold.
    """
    steps = _run_engine(executor, policy, trace, np.random.default_rng(seed), time.perf_counter)
    return float(sum(step.elapsed_s for step in steps) / _predicted_s(executor.profile, steps).sum())


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


def _run_engine(
    executor: Executor, policy: Policy, trace: Trace, rng: np.random.Generator, now_s: Callable[[], float]
) -> list[Step]:
    """Iterations of the engine on requests like the trace's that arrive at once, as many of each class there is."""
    longest = int(executor.profile.values["max_model_len"])
    rows = trace.rows[trace.rows["prompt_tokens"] + trace.rows["output_tokens"] <= longest]
    if not len(rows):
        raise UserError(f"No request of {trace.name} fits into {longest} tokens; choose a workload of shorter ones.")
    steps: list[Step] = []
    options = Options(clock=VirtualClock(now_s), max_requests=RUN_REQUESTS, on_step=steps.append)
    engine = LiveEngine(executor, policy, SLO(1.0, 0.05), options)
    classes = [rows[rows["request_class"] == kind] for kind in (IMMEDIATE, DEFERRED)]
    classes = [mine for mine in classes if len(mine)]
    for i in range(RUN_REQUESTS):
        row = rng.choice(classes[i % len(classes)])
        prompt, images = draw_prompt(
            executor, int(row["prompt_tokens"]), int(row["num_images"]), int(row["image_tokens"]), rng
        )
        engine.add_request(
            Request(
                str(i), prompt, int(row["output_tokens"]), int(row["request_class"]), Sampling(ignore_eos=True),
                images=images,
            )
        )  # fmt: skip
    engine.drain()
    return [step for step in steps if not step.abandoned]
