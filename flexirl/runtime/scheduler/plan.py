"""The scheduler's choice: `apply` puts a Decision in force, `plan` decides which request runs how many tokens.

This is mechanism. What it prefers is the policy's Decision (`state.decision`); what it guarantees whatever the policy
says: blocks are never over-committed, a request is in exactly one state, an iteration stays within its token budget,
every request ends, and preempted work resumes. The surrogate and the live engine call these same functions.
"""

from __future__ import annotations

import numpy as np

from flexirl.compiled import compiled
from flexirl.policies.interface.decision import CLASSES
from flexirl.policies.interface.view import NONE
from flexirl.runtime.profile.step_time import decodes_cost, step_time_with_decodes
from flexirl.runtime.scheduler.admission import admit_waiting
from flexirl.runtime.scheduler.books import (
    best_effort,
    compact,
    next_token_due_s,
)
from flexirl.runtime.scheduler.composition import chunk_within_target, enlist
from flexirl.runtime.scheduler.kv_cache import allocate
from flexirl.runtime.scheduler.preemption import ONLY_DEFERRED, grow, preempt, victim_within
from flexirl.runtime.scheduler.queues import follow_lengths, owed_tokens, reorder, rescore
from flexirl.runtime.scheduler.state import (
    DECODES,
    LATER_DECODES,
    LATER_PREFILLS,
    PREFILLS,
    RUNNING,
    State,
)
from flexirl.workloads.trace import DEFERRED, IMMEDIATE


@compiled
def apply(state: State) -> None:
    """Puts a new decision into force: scores, sorts the queues, makes its one-off preemptions."""
    decision = state.decision[0]
    for i in range(decision.scored):
        rescore(state, decision.scored_requests[i], decision.scores[i])
    decision.scored = 0  # a score stays with its request, not with the number
    expected, quantile = decision.expected_output, decision.length_quantile
    reorder(state, IMMEDIATE, decision.immediate_order, decision.order_weight_s, expected, quantile)
    reorder(state, DEFERRED, decision.deferred_order, decision.deferred_weight_s, expected, quantile)
    for _ in range(decision.preempt_count):
        victim = victim_within(state, ONLY_DEFERRED)
        if victim == NONE:
            break
        preempt(state, victim)
    if decision.preempt_count > 0:
        compact(state)


@compiled
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
    follow_lengths(state)
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


@compiled
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


@compiled
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


@compiled
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


@compiled
def _lacking_blocks(state: State, kind: int) -> int:
    """Requests of a kind, all decoding, whose next token needs a block more."""
    lacking = 0
    for i in range(state.work_totals[kind].count):
        request = state.requests[state.work[kind, i]]
        lacking += request.computed >= request.kv_blocks * state.engine[0].block_size
    return lacking


@compiled
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
