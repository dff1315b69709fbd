"""What a policy observes: numbers in units of the promise and of the engine's capacity, so that they transfer.

`TABLE` documents every number in its place. Compiled code fills them in for an environment, and the same code does for
a policy deployed in an engine. `SCHEMA` changes whenever the meaning of any number does.
"""

from __future__ import annotations

from typing import NamedTuple

import numba as nb
import numpy as np

from flexirl.runtime.profile.step_time import prefill_slope, step_time
from flexirl.runtime.scheduler.queues import NONE, first_waiting, head, owed_tokens
from flexirl.runtime.scheduler.state import RUNNING, State
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

SCHEMA = "flexirl-observation-3"


class Feature(NamedTuple):
    """One number of the observation: value = clip(quantity / scale, low, high), or log(1 + quantity) / scale."""

    name: str
    meaning: str
    unit: str
    scale: str
    low: float
    high: float


TABLE = (
    Feature("immediate_waiting", "waiting immediate requests not given up", "requests", "log(1 + n) / 5", 0, 3),
    Feature("immediate_owed", "prefill time owed to them", "TTFT SLO", "1", 0, 4),
    Feature("immediate_wait", "longest wait of the head of their queue", "TTFT SLO", "1", 0, 4),
    Feature("immediate_running", "running immediate requests", "seats", "1", 0, 1),
    Feature("immediate_kv", "share of the KV cache they hold", "cache", "1", 0, 1),
    Feature("immediate_unprefilled", "prefill time owed to running ones", "TTFT SLO", "1", 0, 4),
    Feature("immediate_ahead_min", "least lead of a running one over its TPOT promise", "8 tokens", "1", -2, 2),
    Feature("immediate_ahead_mean", "mean lead over the TPOT promise", "8 tokens", "1", -2, 2),
    Feature("immediate_behind", "share of running ones behind their TPOT promise", "requests", "1", 0, 1),
    Feature("deferred_waiting", "waiting deferred requests", "requests", "log(1 + n) / 5", 0, 3),
    Feature("deferred_urgency", "prefill time owed over time to the head's deadline", "1", "1", 0, 2),
    Feature("deferred_running", "running deferred requests", "seats", "1", 0, 1),
    Feature("deferred_kv", "share of the KV cache they hold", "cache", "1", 0, 1),
    Feature("deferred_unprefilled", "prefill time owed to running ones", "TTFT SLO", "1", 0, 4),
    Feature("kv_free", "free share of the KV cache", "cache", "1", 0, 1),
    Feature("host_kv_used", "used share of the host memory for swapping", "memory", "1", 0, 1),
    Feature("step_mean", "mean iteration since the last decision", "TPOT SLO", "1", 0, 4),
    Feature("step_all", "predicted iteration of all requests that decode now", "TPOT SLO", "1", 0, 4),
    Feature("step_immediate", "the same for the immediate ones alone", "TPOT SLO", "1", 0, 4),
    Feature("arrivals_1s", "immediate prompt demand, exponential mean over 1 s", "capacity", "1", 0, 4),
    Feature("arrivals_5s", "the same over 5 s", "capacity", "1", 0, 4),
    Feature("arrivals_30s", "the same over 30 s", "capacity", "1", 0, 4),
    Feature("lost_10s", "broken promises per arrival, exponential means over 10 s", "requests", "1", 0, 1),
    Feature("deferred_rate_5s", "deferred tokens done, mean over 5 s", "tokens of prefill capacity", "1", 0, 4),
    Feature("preemptions_5s", "preemptions per second, mean over 5 s", "1/s", "log(1 + n)", 0, 4),
    Feature("immediate_given_up", "waiting immediate requests given up", "requests", "log(1 + n) / 5", 0, 3),
    Feature("prompt_mean_30s", "mean prefill per immediate arrival, over 30 s", "TTFT SLO", "1", 0, 4),
    Feature("arrived_30s", "immediate arrivals per TTFT SLO, mean over 30 s", "requests", "log(1 + n)", 0, 6),
    Feature("least_step", "an iteration of one decode", "TPOT SLO", "1", 0, 4),
    Feature("cache_prefill", "time to prefill the whole cache", "TTFT SLO", "log(1 + n) / 2", 0, 4),
    Feature("immediate_output", "output made per one finished, means over 30 s", "tokens", "log(1 + n) / 5", 0, 2),
    Feature("deferred_output", "output made per one finished, means over 30 s", "tokens", "log(1 + n) / 5", 0, 2),
    Feature("deferred_window", "time to the deadline of the head of their queue", "TTFT SLO", "log(1 + n) / 5", 0, 2),
    Feature("deferred_predicted", "1 if its output is predicted", "1", "1", 0, 1),
)
SIZE = len(TABLE)

# The same for each of the first requests in the queues and in the running batch, for the scores action space.
REQUEST_TABLE = (
    Feature("present", "1 where there is such a request, else all are 0", "1", "1", 0, 1),
    Feature("deferred", "1 for a deferred request", "1", "1", 0, 1),
    Feature("owed", "prefill time owed", "TTFT SLO", "1", 0, 4),
    Feature("slack", "time to its next due time (first token, next token, deadline)", "TTFT SLO", "1", -2, 4),
    Feature("kv", "share of the KV cache it holds or needs", "cache", "4", 0, 1),
    Feature("generated", "output tokens so far", "tokens", "log(1 + n) / 5", 0, 2),
    Feature("predicted", "predicted output tokens to come; 0 without a predictor", "tokens", "log(1 + n) / 5", 0, 2),
)
VISIBLE_PER_QUEUE = 4  # of each class in the waiting queues; and twice as many of the running batch
VISIBLE = 4 * VISIBLE_PER_QUEUE

PROMISE = np.dtype([("ttft_s", "f8"), ("tpot_s", "f8")], align=True)  # the units of time

MEMORY = np.dtype(  # what the running means need between two observations
    [
        ("now_s", "f8"),
        ("busy_s", "f8"),
        ("iterations", "i8"),
        ("arrived", "i8"),
        ("arrived_prompt", "i8"),
        ("lost", "i8"),
        ("deferred_done", "i8"),
        ("preemptions", "i8"),
        ("output", "i8", (2,)),  # by class, as all that follows with two entries
        ("finished", "i8", (2,)),
        ("arrivals_1s", "f8"),
        ("arrivals_5s", "f8"),
        ("arrivals_30s", "f8"),
        ("arrived_10s", "f8"),
        ("arrived_30s", "f8"),
        ("lost_10s", "f8"),
        ("deferred_5s", "f8"),
        ("preemptions_5s", "f8"),
        ("output_30s", "f8", (2,)),
        ("finished_30s", "f8", (2,)),
    ],
    align=True,
)


def bounds(with_requests: bool) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest value of each number: two float32 arrays."""
    features = list(TABLE) + (list(REQUEST_TABLE) * VISIBLE if with_requests else [])
    return (
        np.array([feature.low for feature in features], np.float32),
        np.array([feature.high for feature in features], np.float32),
    )


@nb.njit(cache=True)
def _remember(state: State, memory) -> float:
    """Moves the running means to now; returns the mean step since the last observation, or 0."""
    scheduler = state.scheduler[0]
    immediate, deferred = state.classes[IMMEDIATE], state.classes[DEFERRED]
    slope = prefill_slope(state.engine[0])
    elapsed_s = scheduler.now_s - memory.now_s
    preemptions = immediate.preemptions + deferred.preemptions
    deferred_done = deferred.prompt_done + deferred.output_done
    iterations = scheduler.iterations - memory.iterations
    step_s = (scheduler.busy_s - memory.busy_s) / iterations if iterations > 0 else 0.0
    if elapsed_s > 0:
        demand = (immediate.arrived_prompt - memory.arrived_prompt) * slope / elapsed_s
        memory.arrivals_1s += (1 - np.exp(-elapsed_s)) * (demand - memory.arrivals_1s)
        keep_5s = 1 - np.exp(-elapsed_s / 5.0)
        memory.arrivals_5s += keep_5s * (demand - memory.arrivals_5s)
        keep_30s = 1 - np.exp(-elapsed_s / 30.0)
        memory.arrivals_30s += keep_30s * (demand - memory.arrivals_30s)
        arrived = (immediate.arrived - memory.arrived) / elapsed_s
        memory.arrived_30s += keep_30s * (arrived - memory.arrived_30s)
        keep_10s = 1 - np.exp(-elapsed_s / 10.0)
        memory.arrived_10s += keep_10s * (arrived - memory.arrived_10s)
        memory.lost_10s += keep_10s * ((immediate.lost - memory.lost) / elapsed_s - memory.lost_10s)
        done = (deferred_done - memory.deferred_done) * slope / elapsed_s
        memory.deferred_5s += keep_5s * (done - memory.deferred_5s)
        memory.preemptions_5s += keep_5s * ((preemptions - memory.preemptions) / elapsed_s - memory.preemptions_5s)
        for c in range(2):
            output = (state.classes[c].output_done - memory.output[c]) / elapsed_s
            memory.output_30s[c] += keep_30s * (output - memory.output_30s[c])
            finished = (state.classes[c].finished - memory.finished[c]) / elapsed_s
            memory.finished_30s[c] += keep_30s * (finished - memory.finished_30s[c])
    memory.now_s = scheduler.now_s
    memory.busy_s = scheduler.busy_s
    memory.iterations = scheduler.iterations
    memory.arrived = immediate.arrived
    memory.arrived_prompt = immediate.arrived_prompt
    memory.lost = immediate.lost
    memory.deferred_done = deferred_done
    memory.preemptions = preemptions
    for c in range(2):
        memory.output[c] = state.classes[c].output_done
        memory.finished[c] = state.classes[c].finished
    return step_s


@nb.njit(cache=True)
def observe(state: State, memory, promise, batch, low: np.ndarray, high: np.ndarray, out: np.ndarray) -> None:
    """Fills `out` (float32) with the observation: `TABLE`, then, where `out` is longer, `REQUEST_TABLE` per request.

    memory: a `MEMORY` record, changed; promise: a `PROMISE` record; batch: a `BATCH` record to work with.
    """
    step_s = _remember(state, memory)
    scheduler, engine = state.scheduler[0], state.engine[0]
    immediate, deferred = state.classes[IMMEDIATE], state.classes[DEFERRED]
    slope_per_ttft = prefill_slope(engine) / promise.ttft_s
    decodes, contexts = np.zeros(2), np.zeros(2)
    owed = np.zeros(2)
    ahead_min, ahead_sum, paced, behind = 2.0, 0.0, 0, 0
    for i in range(scheduler.running):
        request = state.requests[state.running[i]]
        group = request.request_class
        tokens = owed_tokens(request)
        if tokens > 1:
            owed[group] += tokens
            continue
        decodes[group] += 1
        contexts[group] += request.computed + 1
        if group == IMMEDIATE and request.tpot_slo_s < np.inf:
            lead = _lead(request, scheduler.now_s) / 8.0
            ahead_min = min(ahead_min, lead)
            ahead_sum += min(max(lead, -2.0), 2.0)
            behind += 1 if lead < 0 else 0
            paced += 1

    out[0] = np.log1p(immediate.waiting - immediate.relegated) / 5.0
    out[1] = (immediate.waiting_tokens - immediate.relegated_tokens) * slope_per_ttft
    first = head(state, IMMEDIATE)
    out[2] = 0.0
    if first != NONE and not state.requests[first].relegated:
        out[2] = (scheduler.now_s - state.requests[first].arrival_s) / promise.ttft_s
    out[3] = immediate.running / engine.max_running
    out[4] = immediate.kv_blocks / engine.kv_blocks
    out[5] = owed[IMMEDIATE] * slope_per_ttft
    out[6] = ahead_min
    out[7] = ahead_sum / paced if paced > 0 else 2.0
    out[8] = behind / paced if paced > 0 else 0.0
    out[9] = np.log1p(deferred.waiting) / 5.0
    first = head(state, DEFERRED)
    out[10] = 0.0
    out[32] = np.inf
    out[33] = 0.0
    if first != NONE:
        next_one = state.requests[first]
        left_s = max(next_one.deadline_s - scheduler.now_s, 1e-3)
        out[10] = deferred.waiting_tokens * prefill_slope(engine) / left_s
        out[32] = np.log1p(left_s / promise.ttft_s) / 5.0
        out[33] = 1.0 if next_one.predicted_output_tokens > 0 else 0.0
    out[11] = deferred.running / engine.max_running
    out[12] = deferred.kv_blocks / engine.kv_blocks
    out[13] = owed[DEFERRED] * slope_per_ttft
    out[14] = scheduler.free_blocks / engine.kv_blocks
    out[15] = 1.0 - scheduler.host_free_blocks / engine.host_kv_blocks if engine.host_kv_blocks > 0 else 0.0
    out[16] = step_s / promise.tpot_s
    out[17] = _decode_step(engine, batch, decodes.sum(), contexts.sum()) / promise.tpot_s
    out[18] = _decode_step(engine, batch, decodes[IMMEDIATE], contexts[IMMEDIATE]) / promise.tpot_s
    out[19] = memory.arrivals_1s
    out[20] = memory.arrivals_5s
    out[21] = memory.arrivals_30s
    out[22] = memory.lost_10s / memory.arrived_10s if memory.arrived_10s > 0 else 0.0
    out[23] = memory.deferred_5s
    out[24] = np.log1p(memory.preemptions_5s)
    out[25] = np.log1p(immediate.relegated) / 5.0
    out[26] = memory.arrivals_30s / (memory.arrived_30s * promise.ttft_s) if memory.arrived_30s > 0 else 0.0
    out[27] = np.log1p(memory.arrived_30s * promise.ttft_s)
    out[28] = _decode_step(engine, batch, 1.0, 1.0) / promise.tpot_s
    out[29] = np.log1p(engine.kv_blocks * engine.block_size * slope_per_ttft) / 2.0
    for c in range(2):
        finished = memory.finished_30s[c]
        out[30 + c] = np.log1p(memory.output_30s[c] / finished) / 5.0 if finished > 0 else 0.0
    if len(out) > SIZE:
        _observe_requests(state, promise, slope_per_ttft, out[SIZE:])
    for i in range(len(out)):
        out[i] = min(max(out[i], low[i]), high[i])


@nb.njit(cache=True)
def _lead(request, now_s: float) -> float:
    """Tokens by which a decoding request is ahead of its promised pace."""
    return request.generated - (now_s - request.first_token_s) / request.tpot_slo_s


@nb.njit(cache=True)
def _decode_step(engine, batch, sequences: float, context: float) -> float:
    batch.decode_sequences = int(sequences)
    batch.sampled_sequences = int(sequences)
    batch.decode_context = context
    return step_time(engine, batch)


@nb.njit(cache=True)
def visible_requests(state: State, out: np.ndarray) -> None:
    """Writes the numbers of the visible requests into `out` (int32, VISIBLE), NONE where there is no such request.

    The first immediate and deferred ones waiting, then the newest of the running batch.
    """
    out[:] = NONE
    first_waiting(state, IMMEDIATE, out[:VISIBLE_PER_QUEUE])
    first_waiting(state, DEFERRED, out[VISIBLE_PER_QUEUE : 2 * VISIBLE_PER_QUEUE])
    running = state.scheduler[0].running
    for i in range(min(running, 2 * VISIBLE_PER_QUEUE)):
        out[2 * VISIBLE_PER_QUEUE + i] = state.running[running - 1 - i]


@nb.njit(cache=True)
def _observe_requests(state: State, promise, slope_per_ttft: float, out: np.ndarray) -> None:
    engine, now_s = state.engine[0], state.scheduler[0].now_s
    numbers = np.empty(VISIBLE, np.int32)
    visible_requests(state, numbers)
    width = len(REQUEST_TABLE)
    for i in range(VISIBLE):
        row = out[i * width : (i + 1) * width]
        row[:] = 0.0
        if numbers[i] == NONE:
            continue
        request = state.requests[numbers[i]]
        due_s = request.deadline_s
        if request.request_class == IMMEDIATE:
            due_s = request.ttft_deadline_s
            if request.generated > 0:
                due_s = request.first_token_s + request.tpot_slo_s * request.generated
        blocks = request.kv_blocks
        if request.status != RUNNING:
            blocks = (request.prompt_tokens + request.generated) // engine.block_size + 1
        row[0] = 1.0
        row[1] = 1.0 if request.request_class == DEFERRED else 0.0
        row[2] = owed_tokens(request) * slope_per_ttft
        row[3] = (due_s - now_s) / promise.ttft_s
        row[4] = 4.0 * blocks / engine.kv_blocks
        row[5] = np.log1p(request.generated) / 5.0
        row[6] = np.log1p(max(request.predicted_output_tokens - request.generated, 0)) / 5.0
