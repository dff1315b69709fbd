"""The surrogate engine: the scheduler with a step-time model in place of a device, driven by a trace.

`advance` runs one engine up to a point in simulated time. Stretches in which every running request decodes and nobody
can join are taken many iterations at a time, with the same arithmetic and so the same result, bit for bit.
"""

from __future__ import annotations

import numpy as np

from flexirl.compiled import compiled
from flexirl.policies.interface.decision import CLASSES, FAIR, NOBODYS
from flexirl.policies.interface.view import NONE
from flexirl.runtime.borrow import borrow
from flexirl.runtime.profile.step_time import step_time
from flexirl.runtime.scheduler.admission import next_to_admit, shut_out, start_by_s
from flexirl.runtime.scheduler.books import (
    OUTPUT_SERVICE,
    best_effort,
    itl_bin,
    next_token_due_s,
    seats_taken,
    settle_first_tokens,
)
from flexirl.runtime.scheduler.commit import commit, settle
from flexirl.runtime.scheduler.events import pop_event
from flexirl.runtime.scheduler.host_tier import has_tier
from flexirl.runtime.scheduler.intake import fill_in, submit
from flexirl.runtime.scheduler.kv_cache import allocate, blocks_for
from flexirl.runtime.scheduler.lengths import forget_lengths
from flexirl.runtime.scheduler.plan import apply, plan
from flexirl.runtime.scheduler.prefix_cache import empty_cache
from flexirl.runtime.scheduler.queues import head
from flexirl.runtime.scheduler.state import FUTURE, State
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

_NO_LIMIT = 1 << 62
_NOISE_LIMIT = 3.0  # noise is cut at this many standard deviations, so that the fastest step is known


@compiled
def start(state: State, trace: np.ndarray, seed: int, patience: float) -> None:
    """Puts a new state, or one that another trace has left, at the start of a trace.

    trace: `TRACE_ROW` (N,), N at most the state's requests, whose contents stand in the state; seed: of the step-time
    noise; patience: see `SLO`.
    """
    state = borrow(state)
    scheduler, engine = state.scheduler[0], state.engine[0]
    for r in range(scheduler.trace_length):
        state.requests[r].status = FUTURE
    _clear_records(state)
    scheduler.now_s = 0.0
    scheduler.patience = patience
    scheduler.rng = (np.uint64(seed) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    scheduler.trace_next = 0
    scheduler.trace_length = len(trace)
    scheduler.promised = 0
    scheduler.coming = 0
    _link_followers(state, trace)
    scheduler.running = 0
    scheduler.joined = 0
    empty_cache(state)
    forget_lengths(state)
    scheduler.host_free_blocks = engine.host_kv_blocks
    scheduler.budget = 0
    scheduler.iterations = 0
    scheduler.busy_s = 0.0
    scheduler.kv_block_s = 0.0
    scheduler.recomputed_tokens = 0
    scheduler.swapped_tokens = 0
    # Reachable only on an empty batch of one decode: a lower bound for every iteration.
    state.batch[0].decode_sequences = 1
    state.batch[0].sampled_sequences = 1
    scheduler.fastest_step_s = step_time(engine, state.batch[0]) * np.exp(-_NOISE_LIMIT * engine.noise)
    state.batch[0].decode_sequences = 0
    state.batch[0].sampled_sequences = 0
    arrive(state, trace, scheduler.now_s)


@compiled
def _link_followers(state: State, trace: np.ndarray) -> None:
    state.follower[:] = NONE
    for r in range(len(trace) - 1, -1, -1):
        if trace[r].follows > 0:
            first = r - trace[r].follows
            state.requests[r].arrival_s = trace[r].delay_s
            state.sibling[r] = state.follower[first]
            state.follower[first] = r


@compiled
def _clear_records(state: State) -> None:
    for c in range(len(state.classes)):
        group = state.classes[c]
        group.waiting = 0
        group.waiting_tokens = 0
        group.relegated = 0
        group.relegated_tokens = 0
        group.windowed = 0
        group.running = 0
        group.kv_blocks = 0
        group.idle_blocks = 0
        group.preempted = 0
        group.order = 0
        group.order_weight_s = 0.0
        group.order_expected = 0.0
        group.order_quantile = 0.0
        group.order_finished = 0
        group.arrived = 0
        group.arrived_prompt = 0
        group.finished = 0
        group.finished_output = 0
        group.finished_output_squares = 0
        group.ended_otherwise = 0
        group.preemptions = 0
        group.prompt_done = 0
        group.output_done = 0
        group.kept_prompt = 0
        group.kept_output = 0
        group.lost_prompt = 0
        group.lost_output = 0
        group.void_prompt = 0
        group.void_output = 0
        group.kept = 0
        group.lost = 0
        group.forgone_prompt = 0.0
        group.forgone_output = 0.0
        group.late_prompt = 0.0
        group.late_output = 0.0
        group.given_up = 0
        group.given_up_prompt = 0
        group.given_up_output = 0
        group.admitted_prompt = 0
        group.found_prompt = 0
        group.evicted_blocks = 0
    for t in range(len(state.tenants)):
        state.tenants[t].service = 0.0
        state.tenants[t].active = 0
    state.lanes[:, :] = NONE
    state.itl_histogram[:] = 0
    batch = state.batch[0]
    batch.prefill_tokens = 0
    batch.decode_sequences = 0
    batch.sampled_sequences = 0
    batch.decode_context = 0.0
    batch.chunk_context = 0.0
    batch.image_tokens = 0.0
    batch.swap_tokens = 0.0


@compiled
def advance(state: State, trace: np.ndarray, until_s: float, max_iterations: int) -> None:
    """Runs the engine under its current decision until the clock reaches `until_s` or after `max_iterations`.

    The last iteration may end past `until_s`: decisions are taken between iterations. max_iterations=0: no limit.
    """
    state = borrow(state)
    scheduler, batch, engine = state.scheduler[0], state.batch[0], state.engine[0]
    last = scheduler.iterations + (max_iterations if max_iterations > 0 else _NO_LIMIT)
    apply(state)
    while scheduler.now_s < until_s and scheduler.iterations < last:
        arrive(state, trace, scheduler.now_s)
        plan(state)
        if batch.prefill_tokens == 0 and batch.decode_sequences == 0:
            _idle(state, trace, until_s)
            continue
        steady = _is_steady(state)
        commit(state, step_time(engine, batch) * _noise(state))
        if steady:
            _fast_forward(state, trace, until_s, last - scheduler.iterations)
    arrive(state, trace, scheduler.now_s)  # whoever decides next sees all that arrived by now


@compiled
def arrive(state: State, trace: np.ndarray, by_s: float) -> None:
    """Submits the requests that have arrived by `by_s`, at the latest now."""
    scheduler = state.scheduler[0]
    anybody = False
    while True:
        arrival_s = _next_in_trace_s(state, trace)
        follows = scheduler.coming > 0 and state.followers[0].time_s < arrival_s
        if follows:
            arrival_s = state.followers[0].time_s
        if arrival_s > by_s or arrival_s == np.inf:
            break
        if follows:
            r = state.followers[0].request
            scheduler.coming = pop_event(state.followers, scheduler.coming)
        else:
            r = scheduler.trace_next
            scheduler.trace_next += 1
        fill_in(state.requests[r], trace[r], arrival_s)
        submit(state, r)
        anybody = True
    if anybody:
        settle_first_tokens(state)


@compiled
def _next_in_trace_s(state: State, trace: np.ndarray) -> float:
    """When the next request of the trace arrives that waits for nobody."""
    scheduler = state.scheduler[0]
    while scheduler.trace_next < scheduler.trace_length:
        if trace[scheduler.trace_next].follows == 0:
            return trace[scheduler.trace_next].arrival_s
        scheduler.trace_next += 1
    return np.inf


@compiled
def _next_arrival_s(state: State, trace: np.ndarray) -> float:
    arrival_s = _next_in_trace_s(state, trace)
    return min(arrival_s, state.followers[0].time_s) if state.scheduler[0].coming > 0 else arrival_s


@compiled
def _idle(state: State, trace: np.ndarray, until_s: float) -> None:
    """Nothing may run: lets time pass to the next arrival or to `until_s`, and books what falls due meanwhile."""
    scheduler = state.scheduler[0]
    scheduler.now_s = min(_next_arrival_s(state, trace), until_s)
    settle(state)


@compiled
def _noise(state: State) -> float:
    """A log-normal factor with median 1, from the state's own generator (xorshift64*, Vigna 2016; Box-Muller)."""
    noise = state.engine[0].noise
    if noise == 0.0:
        return 1.0
    while True:
        radius = np.sqrt(-2.0 * np.log(_uniform(state)))
        z = radius * np.cos(2.0 * np.pi * _uniform(state))
        if abs(z) <= _NOISE_LIMIT:
            return np.exp(noise * z)


@compiled
def _uniform(state: State) -> float:
    x = state.scheduler[0].rng
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    state.scheduler[0].rng = x
    return (float((x * np.uint64(0x2545F4914F6CDD1D)) >> np.uint64(11)) + 0.5) / 9007199254740992.0


@compiled
def _is_steady(state: State) -> bool:
    """True if the planned iteration repeats until somebody arrives, ends, expires or runs out of blocks.

    All running requests decode, and the heads of the queues wait for something that decoding only makes scarcer.
    What changes with time (fair shares, relegation, slack) is left to `plan` if they may wait for that.
    """
    scheduler, batch, decision, engine = state.scheduler[0], state.batch[0], state.decision[0], state.engine[0]
    if batch.prefill_tokens > 0 or batch.swap_tokens > 0 or batch.decode_sequences != scheduler.running:
        return False
    if scheduler.running == 0 or state.classes[0].preempted + state.classes[1].preempted > 0:
        return False
    if state.classes[IMMEDIATE].waiting + state.classes[DEFERRED].waiting == 0:
        return True
    if state.classes[IMMEDIATE].order == FAIR or state.classes[DEFERRED].order == FAIR:
        return False
    first = head(state, IMMEDIATE)
    urgent = first != NONE and not state.requests[first].relegated
    if decision.relegate > 0 and urgent:
        return False
    if decision.immediate_cache_share > 0 and decision.reserve_ratio > 0 and seats_taken(state) < engine.max_running:
        return False  # blocks set aside for running requests become theirs at the cost of what the cache is to keep
    if decision.immediate_slack <= 0 and decision.deferred_slack <= 0:
        return True
    return decision.discipline == CLASSES and not urgent and shut_out(state, next_to_admit(state, False, True))


@compiled
def _fast_forward(state: State, trace: np.ndarray, until_s: float, limit: int) -> None:
    """Repeats the iteration just committed, all decodes, for as long as nothing else can happen.

    Only totals change from one iteration to the next: contexts grow by one token a request, and a request whose tokens
    fill a block takes another. So an iteration costs the same whatever the batch, and the requests are updated once.
    """
    scheduler, batch, engine, decision = state.scheduler[0], state.batch[0], state.engine[0], state.decision[0]
    running = seats_taken(state)
    if running != batch.decode_sequences:
        return  # somebody ended
    shortest = limit
    due_s = _next_arrival_s(state, trace)
    waiting = head(state, DEFERRED)
    if waiting != NONE:
        next_one = state.requests[waiting]
        due_s = min(due_s, next_one.deadline_s if next_one.relegated else start_by_s(decision, next_one))
    immediate, best_efforts = 0, 0
    next_due_s, least_tpot_s = np.inf, np.inf
    block_size = engine.block_size
    crossings = np.zeros(block_size, np.int64)
    for i in range(running):
        request = state.requests[state.running[i]]
        shortest = min(shortest, request.output_tokens - request.generated - 1)
        crossings[(block_size - request.computed % block_size) % block_size] += 1
        if request.request_class == IMMEDIATE:
            immediate += 1
        else:
            due_s = min(due_s, request.deadline_s)
        if best_effort(request):
            best_efforts += 1
        elif not request.missed:
            next_due_s = min(next_due_s, next_token_due_s(request))
            least_tpot_s = min(least_tpot_s, request.tpot_slo_s)
    limited = best_efforts > 0
    by_slack = decision.deferred_slack > 0 and next_due_s < np.inf
    target_s = decision.deferred_step_s if limited else np.inf
    now_s = scheduler.now_s
    free, total = scheduler.free_blocks, engine.kv_blocks
    # Where blocks that give way are copied, an iteration in which some do takes longer; and who does may hang on time.
    copied = has_tier(state) and decision.to_host != NOBODYS
    kept = free - scheduler.empty_blocks if copied or decision.by_return else 0
    done = 0
    elapsed_s, bin_of_elapsed = -1.0, 0
    # `due_s` is compared as in `arrive` (already here at its time) and `commit` (expired after it): the earlier holds.
    while done < shortest and now_s < until_s and now_s < due_s:
        taken = crossings[done % block_size]
        batch.decode_context += running
        predicted_s = step_time(engine, batch)
        if limited and by_slack:
            # At least the slack that `plan` would find: exact where all promise the same pace.
            target_s = min(decision.deferred_step_s, decision.deferred_slack * (next_due_s - now_s))
            next_due_s += least_tpot_s
        if taken > free - kept or predicted_s > target_s * (1.0 - 1e-9):
            break
        free -= taken
        step_s = predicted_s * _noise(state)
        now_s += step_s
        scheduler.busy_s += step_s
        scheduler.kv_block_s += step_s * (total - free)
        if immediate > 0:
            if step_s != elapsed_s:
                elapsed_s, bin_of_elapsed = step_s, itl_bin(step_s)
            state.itl_histogram[bin_of_elapsed] += immediate
        done += 1
    if done > 0:
        scheduler.now_s = now_s
        scheduler.iterations += done
        _book_decodes(state, done)


@compiled
def _book_decodes(state: State, done: int) -> None:
    """Gives every running request `done` decodes, none of them its last."""
    scheduler = state.scheduler[0]
    for i in range(scheduler.running):
        r = state.running[i]
        request = state.requests[r]
        need = blocks_for(request.computed + done, state.engine[0].block_size) - request.kv_blocks
        if need > 0:
            allocate(state, r, need)
        request.computed += done
        request.generated += done
        request.last_token_s = scheduler.now_s
        group = state.classes[request.request_class]
        group.output_done += done
        state.tenants[request.tenant].service += OUTPUT_SERVICE * done
    settle(state)
