"""The scheduler: `plan` decides which request runs how many tokens in this iteration, `commit` books what it did.

This is mechanism. What it prefers is the policy's Decision (`state.decision`); what it guarantees whatever the policy
says: blocks are never over-committed, a request is in exactly one state, an iteration stays within its token budget,
every request ends, and preempted work resumes. The surrogate and the live engine call these same functions.
"""

from __future__ import annotations

import numba as nb
import numpy as np

from flexirl.runtime.profile.fits import longest_sequence
from flexirl.runtime.profile.step_time import decodes_cost, step_time_with_decodes
from flexirl.runtime.scheduler.admission import admit_waiting
from flexirl.runtime.scheduler.books import (
    OUTPUT_SERVICE,
    best_effort,
    book_end,
    book_first_token,
    book_prompt,
    compact,
    end_running,
    end_waiting,
    itl_bin,
    join_tenant,
    last_token_due_s,
    next_token_due_s,
    overdue,
    settle_first_tokens,
    settle_running,
    total_blocks,
)
from flexirl.runtime.scheduler.composition import chunk_within_target, enlist
from flexirl.runtime.scheduler.kv_cache import allocate, blocks_for, trim
from flexirl.runtime.scheduler.preemption import ONLY_DEFERRED, grow, preempt, victim_within
from flexirl.runtime.scheduler.queues import NONE, owed_tokens, push, reorder
from flexirl.runtime.scheduler.state import (
    CANCELLED,
    CLASSES,
    DECODES,
    FINISHED,
    LATER_DECODES,
    LATER_PREFILLS,
    PREFILLS,
    REJECTED,
    RUNNING,
    WAITING,
    State,
)
from flexirl.workloads.trace import DEFERRED, IMMEDIATE


@nb.njit(cache=True)
def fill_in(request, row) -> None:
    """Copies what the client asked for from a `TRACE_ROW` record into a `REQUEST` record; `submit` does the rest."""
    request.arrival_s = row.arrival_s
    request.ttft_deadline_s = row.arrival_s + row.ttft_slo_s
    request.tpot_slo_s = row.tpot_slo_s
    request.deadline_s = row.arrival_s + row.window_s
    request.request_class = row.request_class
    request.tenant = row.tenant
    request.prompt_tokens = row.prompt_tokens
    request.output_tokens = row.output_tokens
    request.max_tokens = row.max_tokens
    request.predicted_output_tokens = row.predicted_output_tokens
    request.num_images = row.num_images
    request.image_tokens = row.image_tokens
    request.prefix_tokens = row.prefix_tokens


@nb.njit(cache=True)
def submit(state: State, r: int) -> None:
    """Takes in request r, whose client's side is filled in: queues it, or rejects what could never fit."""
    scheduler, request = state.scheduler[0], state.requests[r]
    group, engine = state.classes[request.request_class], state.engine[0]
    request.generated = 0
    request.computed = 0
    request.scheduled = 0
    request.kv_blocks = 0
    request.host_blocks = 0
    request.cached_blocks = 0
    request.saved = 0
    request.furthest = 0
    request.preemptions = 0
    request.relegated = 0
    request.missed = 0
    request.score = 1.0 if request.request_class == IMMEDIATE else 0.0
    request.first_token_s = np.inf
    request.last_token_s = np.inf
    request.finish_s = np.inf
    group.arrived += 1
    group.arrived_prompt += request.prompt_tokens
    join_tenant(state, request.tenant)
    if request.prompt_tokens + request.max_tokens > longest_sequence(engine):
        request.status = REJECTED
        book_end(state, r, scheduler.now_s)
    else:
        push(state, r)


@nb.njit(cache=True)
def apply(state: State) -> None:
    """Puts a new decision into force: sorts the queues as it says and makes its one-off preemptions."""
    decision = state.decision[0]
    reorder(state, IMMEDIATE, decision.immediate_order, decision.order_weight_s, decision.expected_output)
    reorder(state, DEFERRED, decision.deferred_order, decision.order_weight_s, decision.expected_output)
    for _ in range(decision.preempt_count):
        victim = victim_within(state, ONLY_DEFERRED)
        if victim == NONE:
            break
        preempt(state, victim)
    if decision.preempt_count > 0:
        compact(state)


@nb.njit(cache=True)
def plan(state: State) -> None:
    """Chooses the next iteration: sets `scheduled` of the running requests and the features in `state.batch`.

    An empty batch (no prefill tokens and no decode sequences) means that nothing may run now.
    """
    scheduler, decision, batch = state.scheduler[0], state.decision[0], state.batch[0]
    batch.prefill_tokens = 0
    batch.decode_sequences = 0
    batch.sampled_sequences = 0
    batch.decode_context = 0.0
    batch.chunk_context = 0.0
    batch.image_tokens = 0.0
    # Tokens that `apply` swapped out since the last iteration are part of this one.
    scheduler.budget = min(decision.token_budget, state.engine[0].max_tokens_per_step)
    state.classes[IMMEDIATE].preempted = 0
    state.classes[DEFERRED].preempted = 0
    _take_stock(state)
    _run(state, DECODES)
    _run(state, PREFILLS)
    if decision.discipline == CLASSES:
        admit_waiting(state, True, False)
        _run(state, LATER_DECODES)
        _run(state, LATER_PREFILLS)
        admit_waiting(state, False, True)
    else:
        admit_waiting(state, True, True)
    scheduler.joined = 0
    if state.classes[IMMEDIATE].preempted + state.classes[DEFERRED].preempted > 0:
        compact(state)


@nb.njit(cache=True)
def commit(state: State, elapsed_s: float) -> None:
    """Books the planned iteration, which took `elapsed_s` seconds: progress, tokens, broken promises, who ended."""
    scheduler = state.scheduler[0]
    began_s = scheduler.now_s
    now_s = began_s + elapsed_s
    scheduler.now_s = now_s
    scheduler.iterations += 1
    scheduler.busy_s += elapsed_s
    scheduler.kv_block_s += elapsed_s * (total_blocks(state) - scheduler.free_blocks)
    state.batch[0].swap_tokens = 0.0
    one_tenant = len(state.tenants) == 1
    tokens_made, immediate_tokens, first_tokens, paused = 0, 0, 0, 0  # all but the first of immediate requests
    kept = 0
    for i in range(scheduler.running):
        r = state.running[i]
        request = state.requests[np.uintp(r)]
        tokens = request.scheduled
        if tokens > 0:
            request.scheduled = 0
            request.computed += tokens
            if request.computed <= request.prompt_tokens:
                book_prompt(state, r)
            if owed_tokens(request) == 0:
                request.generated += 1
                is_immediate = request.request_class == IMMEDIATE
                immediate_tokens += is_immediate
                tokens_made += 1
                if not one_tenant:
                    state.tenants[request.tenant].service += OUTPUT_SERVICE
                if request.generated == 1:
                    first_tokens += is_immediate
                    book_first_token(state, r, now_s)
                elif is_immediate & (request.last_token_s != began_s):  # it paused
                    paused += 1
                    state.itl_histogram[itl_bin(now_s - request.last_token_s)] += 1
                request.last_token_s = now_s
                if request.generated == request.output_tokens:
                    request.status = FINISHED
                    end_running(state, r, now_s)
                    continue
        if overdue(scheduler, request) and settle_running(state, r):
            continue
        state.running[np.uintp(kept)] = r
        kept += 1
    scheduler.running = kept
    if immediate_tokens > 0:
        state.itl_histogram[itl_bin(elapsed_s)] += immediate_tokens - first_tokens - paused
    state.classes[IMMEDIATE].output_done += immediate_tokens
    state.classes[DEFERRED].output_done += tokens_made - immediate_tokens
    if one_tenant:
        state.tenants[0].service += OUTPUT_SERVICE * tokens_made
    settle_first_tokens(state)


@nb.njit(cache=True)
def stop_after(state: State, r: int) -> None:
    """Makes the token that request r samples in the planned iteration its last one.

    A live engine does not know an output's length before it ends: until then `output_tokens` is `max_tokens`, and what
    was counted on it is put right here, between `plan` and `commit`.
    """
    request = state.requests[r]
    group = state.classes[request.request_class]
    if request.missed == 1:
        group.lost_output += request.generated + 1 - request.output_tokens
    request.output_tokens = request.generated + 1
    if request.request_class == IMMEDIATE and request.generated > 0:
        request.deadline_s = min(request.deadline_s, last_token_due_s(request, request.first_token_s))


@nb.njit(cache=True)
def abandon(state: State, elapsed_s: float) -> None:
    """Books that the planned iteration was broken off after `elapsed_s` seconds: none of its tokens was computed."""
    scheduler = state.scheduler[0]
    scheduler.now_s += elapsed_s
    scheduler.busy_s += elapsed_s
    scheduler.kv_block_s += elapsed_s * (total_blocks(state) - scheduler.free_blocks)
    state.batch[0].swap_tokens = 0.0
    for i in range(scheduler.running):
        r = state.running[i]
        if state.requests[r].scheduled > 0:
            state.requests[r].scheduled = 0
            trim(state, r, blocks_for(state.requests[r].computed, state.engine[0].block_size))
    settle(state)


@nb.njit(cache=True)
def settle(state: State) -> None:
    """Books what fell due while the clock moved without an iteration: broken promises, windows that closed."""
    scheduler = state.scheduler[0]
    ended = False
    for i in range(scheduler.running):
        if overdue(scheduler, state.requests[state.running[i]]):
            ended |= settle_running(state, state.running[i])
    if ended:
        compact(state)
    settle_first_tokens(state)


@nb.njit(cache=True)
def cancel(state: State, r: int) -> None:
    """Ends request r between two iterations and frees all it holds; nothing happens if it has ended already."""
    request = state.requests[r]
    if request.status == RUNNING:
        request.status = CANCELLED
        end_running(state, r, state.scheduler[0].now_s)
        compact(state)
    elif request.status == WAITING:
        end_waiting(state, r, CANCELLED)


@nb.njit(cache=True)
def _take_stock(state: State) -> None:
    """Sorts the running requests by kind of work into `state.work`, and sets this iteration's step targets.

    Slack is the time until an immediate request's next token is due at its promised pace: infinite where none decodes,
    0 if one is late. Requests whose promise is already broken have none left to keep.
    """
    scheduler, decision, engine = state.scheduler[0], state.decision[0], state.engine[0]
    work, totals = state.work, state.work_totals
    by_class, decodes_first = decision.discipline == CLASSES, decision.decodes_first == 1
    first, later, first_prefills, later_prefills = 0, 0, 0, 0
    context, waiting_decodes, waiting_context = 0, 0, 0
    due_s = np.inf
    for i in range(scheduler.running):
        r = state.running[i]
        request = state.requests[np.uintp(r)]  # unsigned: Numba then compiles no wrap-around
        waits = best_effort(request)
        goes_later = waits & by_class
        if owed_tokens(request) == 1 and request.generated > 0:
            # Nothing predicts which class is next in the batch: instead of a branch, two entries, one of them void.
            work[DECODES, np.uintp(first)] = r
            work[LATER_DECODES, np.uintp(later)] = r
            first += not goes_later
            later += goes_later
            attended = request.computed + 1
            context += attended
            waiting_decodes += waits
            waiting_context += attended if waits else 0
            next_due_s = next_token_due_s(request)
            due_s = min(due_s, np.inf if waits | (request.missed == 1) else next_due_s)
        elif decodes_first:
            work[LATER_PREFILLS if goes_later else PREFILLS, later_prefills if goes_later else first_prefills] = r
            first_prefills += not goes_later
            later_prefills += goes_later
        else:
            work[LATER_DECODES if goes_later else DECODES, later if goes_later else first] = r
            first += not goes_later
            later += goes_later
    totals[DECODES].count = first
    totals[LATER_DECODES].count = later
    totals[PREFILLS].count = first_prefills
    totals[LATER_PREFILLS].count = later_prefills
    totals[DECODES].best_effort = 0 if by_class else waiting_decodes
    totals[DECODES].context = context - (waiting_context if by_class else 0)
    totals[LATER_DECODES].best_effort = waiting_decodes
    totals[LATER_DECODES].context = waiting_context
    slack_s = max(due_s - scheduler.now_s, 0.0)
    scheduler.immediate_target_s = decision.immediate_step_s
    scheduler.deferred_target_s = decision.deferred_step_s
    scheduler.deferred_floor = decision.deferred_token_floor
    if decision.immediate_slack > 0:
        aside_s = decision.deferred_decodes * decodes_cost(engine, waiting_decodes, waiting_context)
        scheduler.immediate_target_s = min(scheduler.immediate_target_s, decision.immediate_slack * slack_s - aside_s)
    if decision.deferred_slack > 0:
        scheduler.deferred_target_s = min(scheduler.deferred_target_s, decision.deferred_slack * slack_s)
        floor = int(decision.deferred_decodes * waiting_decodes)
        scheduler.deferred_floor = max(scheduler.deferred_floor, floor)


@nb.njit(cache=True)
def _run(state: State, kind: int) -> None:
    """Gives the running requests of one kind of work their tokens, as far as budget, step target and memory allow."""
    scheduler, batch, total = state.scheduler[0], state.batch[0], state.work_totals[kind]
    if total.count == 0 or scheduler.budget <= 0:
        return
    if _all_decode(state, kind):
        batch.decode_sequences += total.count
        batch.sampled_sequences += total.count
        batch.decode_context += total.context
        scheduler.budget -= total.count
        scheduler.deferred_floor -= total.best_effort
        for i in range(total.count):
            r = state.work[kind, i]
            request = state.requests[np.uintp(r)]
            request.scheduled = 1
            if request.computed >= request.kv_blocks * state.engine[0].block_size:
                allocate(state, r, 1)
        return
    for i in range(total.count):
        if scheduler.budget <= 0:
            return
        r = state.work[kind, i]
        if state.requests[r].status == RUNNING:  # else evicted by one ahead of it
            _run_one(state, r)


@nb.njit(cache=True)
def _all_decode(state: State, kind: int) -> bool:
    """True if all requests of a kind decode and may do so together: the same as asking one by one, but quick."""
    scheduler, total = state.scheduler[0], state.work_totals[kind]
    if kind == PREFILLS or kind == LATER_PREFILLS or not state.decision[0].decodes_first:
        return False
    evicted = state.classes[IMMEDIATE].preempted + state.classes[DEFERRED].preempted > 0  # some of them, perhaps
    if evicted or total.count > scheduler.budget:
        return False
    if total.count > scheduler.free_blocks and _lacking_blocks(state, kind) > scheduler.free_blocks:
        return False
    if total.best_effort == 0 or scheduler.deferred_target_s == np.inf or scheduler.deferred_floor >= total.count:
        return True
    together_s = step_time_with_decodes(state.engine[0], state.batch[0], total.count, total.context)
    return together_s <= scheduler.deferred_target_s


@nb.njit(cache=True)
def _lacking_blocks(state: State, kind: int) -> int:
    """Requests of a kind, all decoding, whose next token needs a block more."""
    lacking = 0
    for i in range(state.work_totals[kind].count):
        request = state.requests[state.work[kind, i]]
        lacking += request.computed >= request.kv_blocks * state.engine[0].block_size
    return lacking


@nb.njit(cache=True)
def _run_one(state: State, r: int) -> None:
    scheduler, request = state.scheduler[0], state.requests[r]
    if owed_tokens(request) > 1 or request.generated == 0:
        tokens = chunk_within_target(state, r, request.computed)
    elif best_effort(request) and scheduler.deferred_target_s < np.inf and scheduler.deferred_floor <= 0:
        longer_s = step_time_with_decodes(state.engine[0], state.batch[0], 1, request.computed + 1.0)
        tokens = 1 if longer_s <= scheduler.deferred_target_s else 0
    else:
        tokens = 1
    if tokens > 0 and grow(state, r, request.computed + tokens):
        enlist(scheduler, state.batch[0], request, tokens)
