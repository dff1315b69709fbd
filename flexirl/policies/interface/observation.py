"""What a policy observes: numbers in units of the promise and of the engine's capacity, so that they transfer.

`TABLE` documents every number in its place. Compiled code fills them in by name, from the view of an engine: the same
for an environment and for a policy deployed anywhere. `SCHEMA` changes whenever the meaning of any number does.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flexirl.compiled import compiled
from flexirl.policies.interface.view import AHEAD_LIMIT, NONE, VISIBLE, ViewArrays
from flexirl.runtime.profile.step_time import decode_step_time, prefill_slope
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

SCHEMA = "flexirl-observation-4"


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
    Feature("immediate_idle", "share of the cache that is kept for immediate requests to come", "cache", "1", 0, 1),
    Feature("immediate_found", "share of their prompts that was found there, means over 30 s", "tokens", "1", 0, 1),
    Feature("deferred_idle", "share of the cache that is kept for deferred requests to come", "cache", "1", 0, 1),
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
        ("admitted_prompt", "i8"),
        ("found_prompt", "i8"),
        ("admitted_30s", "f8"),
        ("found_30s", "f8"),
    ],
    align=True,
)


NUMBERS = np.dtype([(feature.name, "f4") for feature in TABLE])
REQUEST_NUMBERS = np.dtype([(feature.name, "f4") for feature in REQUEST_TABLE])


class Observer(NamedTuple):
    """What it takes to observe one engine; those of many engines have a leading axis, but for the bounds."""

    memory: np.ndarray  # MEMORY (1,), what it remembers of the engine
    numbers: np.ndarray  # NUMBERS (1,): the observation by name
    requests: np.ndarray  # REQUEST_NUMBERS (VISIBLE,), or (0,) where single requests are not looked at
    flat_numbers: np.ndarray  # float32 (SIZE,): the same memory as `numbers`
    flat_requests: np.ndarray  # float32, and as `requests`
    low: np.ndarray  # float32: the least value of each number of an observation
    high: np.ndarray  # float32: the greatest


def bounds(with_requests: bool) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest value of each number: two float32 arrays."""
    features = list(TABLE) + (list(REQUEST_TABLE) * VISIBLE if with_requests else [])
    return (
        np.array([feature.low for feature in features], np.float32),
        np.array([feature.high for feature in features], np.float32),
    )


def new_observers(count: int, with_requests: bool) -> Observer:
    """Observers of `count` engines that have not seen them yet; with_requests: the visible requests one by one too."""
    numbers = np.zeros((count, 1), NUMBERS)
    requests = np.zeros((count, VISIBLE if with_requests else 0), REQUEST_NUMBERS)
    return Observer(
        np.zeros((count, 1), MEMORY), numbers, requests, numbers.view(np.float32),
        requests.view(np.float32), *bounds(with_requests),
    )  # fmt: skip


@compiled
def one_observer(observers: Observer, m: int) -> Observer:
    """Number m of many."""
    return Observer(
        observers.memory[m], observers.numbers[m], observers.requests[m], observers.flat_numbers[m],
        observers.flat_requests[m], observers.low, observers.high,
    )  # fmt: skip


@compiled
def _remember(view: ViewArrays, memory) -> float:
    """Moves the running means to now; returns the mean step since the last observation, or 0."""
    now, immediate, deferred = view.now[0], view.groups[IMMEDIATE], view.groups[DEFERRED]
    slope = prefill_slope(view.profile[0])
    elapsed_s = now.now_s - memory.now_s
    preemptions = immediate.preemptions + deferred.preemptions
    deferred_done = deferred.prompt_done + deferred.output_done
    iterations = now.iterations - memory.iterations
    step_s = (now.busy_s - memory.busy_s) / iterations if iterations > 0 else 0.0
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
        admitted = (immediate.admitted_prompt - memory.admitted_prompt) / elapsed_s
        memory.admitted_30s += keep_30s * (admitted - memory.admitted_30s)
        found = (immediate.found_prompt - memory.found_prompt) / elapsed_s
        memory.found_30s += keep_30s * (found - memory.found_30s)
        for c in range(2):
            output = (view.groups[c].output_done - memory.output[c]) / elapsed_s
            memory.output_30s[c] += keep_30s * (output - memory.output_30s[c])
            finished = (view.groups[c].finished - memory.finished[c]) / elapsed_s
            memory.finished_30s[c] += keep_30s * (finished - memory.finished_30s[c])
    memory.now_s = now.now_s
    memory.busy_s = now.busy_s
    memory.iterations = now.iterations
    memory.arrived = immediate.arrived
    memory.arrived_prompt = immediate.arrived_prompt
    memory.lost = immediate.lost
    memory.deferred_done = deferred_done
    memory.preemptions = preemptions
    memory.admitted_prompt = immediate.admitted_prompt
    memory.found_prompt = immediate.found_prompt
    for c in range(2):
        memory.output[c] = view.groups[c].output_done
        memory.finished[c] = view.groups[c].finished
    return step_s


@compiled
def observe(view: ViewArrays, observer: Observer, out: np.ndarray) -> None:
    """Fills `out` (float32) with the observation: `TABLE`, then, if it looks at them, `REQUEST_TABLE` per request."""
    numbers, memory, promise = observer.numbers[0], observer.memory[0], view.promise[0]
    step_s = _remember(view, memory)
    engine = view.profile[0]
    slope_per_ttft = prefill_slope(engine) / promise.ttft_s
    _observe_immediate(view, slope_per_ttft, numbers)
    _observe_deferred(view, slope_per_ttft, numbers)
    _observe_engine(view, slope_per_ttft, numbers)
    numbers.step_mean = step_s / promise.tpot_s
    _observe_past(memory, promise.ttft_s, numbers)
    for i in range(len(observer.requests)):
        _observe_request(view, i, slope_per_ttft, observer.requests[i])
    size = len(observer.flat_numbers)
    for i in range(size):
        out[i] = min(max(observer.flat_numbers[i], observer.low[i]), observer.high[i])
    for i in range(len(observer.flat_requests)):
        out[size + i] = min(max(observer.flat_requests[i], observer.low[size + i]), observer.high[size + i])


@compiled
def _observe_immediate(view: ViewArrays, slope_per_ttft: float, numbers) -> None:
    immediate, engine, promise = view.groups[IMMEDIATE], view.profile[0], view.promise[0]
    numbers.immediate_waiting = np.log1p(immediate.waiting - immediate.relegated) / 5.0
    numbers.immediate_owed = (immediate.waiting_tokens - immediate.relegated_tokens) * slope_per_ttft
    numbers.immediate_wait = 0.0
    if immediate.head and not immediate.head_relegated:
        numbers.immediate_wait = (view.now[0].now_s - immediate.head_arrival_s) / promise.ttft_s
    numbers.immediate_running = immediate.running / engine.max_running
    numbers.immediate_kv = immediate.kv_blocks / engine.kv_blocks
    numbers.immediate_unprefilled = immediate.unprefilled * slope_per_ttft
    paced = immediate.paced
    numbers.immediate_ahead_min = min(immediate.ahead_min, AHEAD_LIMIT) / 8.0
    numbers.immediate_ahead_mean = immediate.ahead_sum / 8.0 / paced if paced > 0 else AHEAD_LIMIT / 8.0
    numbers.immediate_behind = immediate.behind / paced if paced > 0 else 0.0
    numbers.immediate_given_up = np.log1p(immediate.relegated) / 5.0


@compiled
def _observe_deferred(view: ViewArrays, slope_per_ttft: float, numbers) -> None:
    deferred, engine, promise = view.groups[DEFERRED], view.profile[0], view.promise[0]
    numbers.deferred_waiting = np.log1p(deferred.waiting) / 5.0
    numbers.deferred_urgency = 0.0
    numbers.deferred_window = np.inf
    numbers.deferred_predicted = 0.0
    if deferred.head:
        left_s = max(deferred.head_deadline_s - view.now[0].now_s, 1e-3)
        numbers.deferred_urgency = deferred.waiting_tokens * prefill_slope(engine) / left_s
        numbers.deferred_window = np.log1p(left_s / promise.ttft_s) / 5.0
        numbers.deferred_predicted = 1.0 if deferred.head_predicted > 0 else 0.0
    numbers.deferred_running = deferred.running / engine.max_running
    numbers.deferred_kv = deferred.kv_blocks / engine.kv_blocks
    numbers.deferred_unprefilled = deferred.unprefilled * slope_per_ttft


@compiled
def _observe_engine(view: ViewArrays, slope_per_ttft: float, numbers) -> None:
    now, engine, tpot_s = view.now[0], view.profile[0], view.promise[0].tpot_s
    immediate, deferred = view.groups[IMMEDIATE], view.groups[DEFERRED]
    numbers.immediate_idle = immediate.idle_blocks / engine.kv_blocks
    numbers.deferred_idle = deferred.idle_blocks / engine.kv_blocks
    numbers.kv_free = now.free_blocks / engine.kv_blocks
    numbers.host_kv_used = 1.0 - now.host_free_blocks / engine.host_kv_blocks if engine.host_kv_blocks > 0 else 0.0
    decodes, context = immediate.decodes + deferred.decodes, immediate.decode_context + deferred.decode_context
    numbers.step_all = decode_step_time(engine, decodes, context) / tpot_s
    numbers.step_immediate = decode_step_time(engine, immediate.decodes, immediate.decode_context) / tpot_s
    numbers.least_step = decode_step_time(engine, 1, 1.0) / tpot_s
    numbers.cache_prefill = np.log1p(engine.kv_blocks * engine.block_size * slope_per_ttft) / 2.0


@compiled
def _observe_past(memory, ttft_s: float, numbers) -> None:
    numbers.arrivals_1s = memory.arrivals_1s
    numbers.arrivals_5s = memory.arrivals_5s
    numbers.arrivals_30s = memory.arrivals_30s
    numbers.lost_10s = memory.lost_10s / memory.arrived_10s if memory.arrived_10s > 0 else 0.0
    numbers.deferred_rate_5s = memory.deferred_5s
    numbers.preemptions_5s = np.log1p(memory.preemptions_5s)
    numbers.prompt_mean_30s = memory.arrivals_30s / (memory.arrived_30s * ttft_s) if memory.arrived_30s > 0 else 0.0
    numbers.arrived_30s = np.log1p(memory.arrived_30s * ttft_s)
    numbers.immediate_found = memory.found_30s / memory.admitted_30s if memory.admitted_30s > 0 else 0.0
    numbers.immediate_output = _output_per_finished(memory, IMMEDIATE)
    numbers.deferred_output = _output_per_finished(memory, DEFERRED)


@compiled
def _output_per_finished(memory, c: int) -> float:
    finished = memory.finished_30s[c]
    return np.log1p(memory.output_30s[c] / finished) / 5.0 if finished > 0 else 0.0


@compiled
def _observe_request(view: ViewArrays, i: int, slope_per_ttft: float, numbers) -> None:
    request, engine = view.visible[i], view.profile[0]
    numbers.present = 0.0
    numbers.deferred = 0.0
    numbers.owed = 0.0
    numbers.slack = 0.0
    numbers.kv = 0.0
    numbers.generated = 0.0
    numbers.predicted = 0.0
    if request.request == NONE:
        return
    blocks = request.kv_blocks
    if not request.running:
        blocks = (request.prompt_tokens + request.generated) // engine.block_size + 1
    numbers.present = 1.0
    numbers.deferred = 1.0 if request.request_class == DEFERRED else 0.0
    numbers.owed = (request.prompt_tokens + request.generated - request.computed) * slope_per_ttft
    numbers.slack = (request.due_s - view.now[0].now_s) / view.promise[0].ttft_s
    numbers.kv = 4.0 * blocks / engine.kv_blocks
    numbers.generated = np.log1p(request.generated) / 5.0
    numbers.predicted = np.log1p(max(request.predicted_output_tokens - request.generated, 0)) / 5.0
