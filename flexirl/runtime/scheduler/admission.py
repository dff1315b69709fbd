"""Who joins the running batch: from the heads of the queues, as seats, memory and step targets allow."""

from __future__ import annotations

import numpy as np

from flexirl.compiled import compiled
from flexirl.policies.interface.decision import ONE_QUEUE
from flexirl.policies.interface.view import NONE
from flexirl.runtime.profile.step_time import prefill_slope
from flexirl.runtime.scheduler.books import best_effort, end_waiting, seats_taken
from flexirl.runtime.scheduler.composition import chunk_within_target, enlist, image_tokens_of_chunk
from flexirl.runtime.scheduler.kv_cache import allocate, blocks_for, bring_back
from flexirl.runtime.scheduler.preemption import ONLY_BEST_EFFORT, preempt, victim_within
from flexirl.runtime.scheduler.prefix_cache import find, find_in_tier, mark, take, take_row, unmark
from flexirl.runtime.scheduler.queues import head, merged_head, push, remove
from flexirl.runtime.scheduler.state import EXPIRED, RUNNING, State
from flexirl.workloads.trace import DEFERRED, IMMEDIATE


@compiled
def admit_waiting(state: State, immediate: bool, deferred: bool) -> None:
    """Admits from the head of the queue until the head must wait. What was evicted in this iteration stays out."""
    scheduler = state.scheduler[0]
    while scheduler.budget > 0:
        if (deferred and state.classes[DEFERRED].preempted > 0) or state.classes[IMMEDIATE].preempted > 0:
            return
        r = next_to_admit(state, immediate, deferred)
        if r == NONE:
            return
        request = state.requests[r]
        if request.request_class == DEFERRED and scheduler.now_s > request.deadline_s:
            end_waiting(state, r, EXPIRED)
        elif request.relegated == 0 and _hopeless(state, r):
            remove(state, r)
            request.relegated = 1
            push(state, r)
        elif not _admit(state, r):
            return


@compiled
def next_to_admit(state: State, immediate: bool, deferred: bool) -> int:
    """The request to admit next, or NONE. Relegated immediate requests may wait, but come ahead of deferred ones."""
    if state.decision[0].discipline == ONE_QUEUE:
        return merged_head(state)
    first = head(state, IMMEDIATE)
    urgent = first != NONE and not state.requests[first].relegated
    if urgent and immediate:
        return first
    if not deferred:
        return NONE
    second = head(state, DEFERRED)
    if urgent:
        return second
    return first if second == NONE or (first != NONE and state.decision[0].relegated_last == 0) else second


@compiled
def start_by_s(decision, request) -> float:
    """When a deferred request must have started, or it goes behind the others of its class.

    The margin that a decision asks for, but at most half of the window: the shortest windows are not given up at once.
    """
    margin_s = min(decision.deferred_margin_s, 0.5 * (request.deadline_s - request.arrival_s))
    return request.deadline_s - margin_s


@compiled
def _hopeless(state: State, r: int) -> bool:
    """True if a request is to be given up: see `relegate` and `deferred_margin_s` in `DECISION`."""
    engine, request, decision = state.engine[0], state.requests[r], state.decision[0]
    if request.request_class == DEFERRED:
        return state.scheduler[0].now_s > start_by_s(decision, request)
    if decision.relegate <= 0 or request.generated > 0:
        return False
    start = _reusable_tokens(state, r)
    owed = request.prompt_tokens - start
    tokens = float(owed)
    slope = prefill_slope(engine)
    alone_s = slope * tokens + engine.per_chunk_context_s * tokens * (start + 0.5 * tokens)
    alone_s += engine.per_image_token_s * image_tokens_of_chunk(request, start, owed)
    return state.scheduler[0].now_s + decision.relegate * alone_s > request.ttft_deadline_s


@compiled
def _admit(state: State, r: int) -> bool:
    """Moves waiting request r into the batch if seats, memory and step target allow; its first chunk runs now."""
    scheduler, decision, engine = state.scheduler[0], state.decision[0], state.engine[0]
    request = state.requests[r]
    waits = best_effort(request)
    if waits and shut_out(state, r):
        return False
    start = _reusable_tokens(state, r)
    chunk = chunk_within_target(state, r, start)
    if chunk <= 0:
        return False
    if not waits and not _has_room(state, r):
        if not decision.preempt_for_immediate or not _make_room(state, r):
            return False
    remove(state, r)
    take_row(state, r)
    if request.host_blocks > 0:
        scheduler.host_free_blocks += request.host_blocks
        scheduler.swapped_tokens += request.computed
        state.batch[0].swap_tokens += request.computed
        request.host_blocks = 0
    else:
        found, _ = find(state, r)
        take(state, r, min(found, start // engine.block_size))  # evicting others may have made it more
        bring_back(state, r, start // engine.block_size)
        if request.preemptions > 0:
            scheduler.recomputed_tokens -= start
        else:
            group = state.classes[request.request_class]
            group.admitted_prompt += request.prompt_tokens
            group.found_prompt += start
    request.computed = start
    request.status = RUNNING
    state.classes[request.request_class].running += 1
    state.running[scheduler.running] = r
    scheduler.running += 1
    scheduler.joined += 1
    allocate(state, r, blocks_for(start + chunk, engine.block_size) - request.kv_blocks)
    enlist(scheduler, state.batch[0], request, chunk)
    return True


@compiled
def shut_out(state: State, r: int) -> bool:
    """True if waiting request r, which may wait, lacks leave, a seat or memory to join, whatever the step target."""
    scheduler, decision, engine = state.scheduler[0], state.decision[0], state.engine[0]
    used = engine.kv_blocks - scheduler.free_blocks
    if state.requests[r].request_class == DEFERRED:
        if decision.deferred_kv_share < 1 and used >= decision.deferred_kv_share * engine.kv_blocks:
            return True
        if decision.preempt_count > 0 or (decision.immediate_cache_share > 0 and _spoils(state, r)):
            return True
    return not _has_room(state, r)


@compiled
def _spoils(state: State, r: int) -> bool:
    """True if deferred request r needs blocks that the prefix cache is to keep for immediate work."""
    kept = int(state.decision[0].immediate_cache_share * state.engine[0].kv_blocks)
    kept = min(kept, state.classes[IMMEDIATE].idle_blocks)
    return kept > 0 and _needed_blocks(state, r, True) > state.scheduler[0].free_blocks - kept


@compiled
def _has_room(state: State, r: int) -> bool:
    """True if there are a seat and memory for waiting request r."""
    if seats_taken(state) >= state.engine[0].max_running:
        return False
    return _needed_blocks(state, r, True) <= state.scheduler[0].free_blocks


@compiled
def _make_room(state: State, r: int) -> bool:
    """Evicts work that may wait until waiting request r has memory and a seat, but only if that can succeed."""
    scheduler = state.scheduler[0]
    within_reach, evictable = scheduler.free_blocks, 0
    for i in range(scheduler.running - scheduler.joined):
        request = state.requests[state.running[i]]
        if request.status == RUNNING and best_effort(request):
            within_reach += mark(state, state.running[i])
            evictable += 1
    needed = _needed_blocks(state, r, False)
    for i in range(scheduler.running - scheduler.joined):
        unmark(state, state.running[i])
    if evictable == 0 or within_reach < needed:
        return False
    while not _has_room(state, r):
        preempt(state, victim_within(state, ONLY_BEST_EFFORT))
    return True


@compiled
def _reusable_tokens(state: State, r: int) -> int:
    """Tokens of a waiting request that need no computing: swapped out, cached, in the host tier, or a shared prefix."""
    request, engine = state.requests[r], state.engine[0]
    if request.host_blocks > 0:
        return request.computed
    if not engine.prefix_caching:
        return 0
    block_size = engine.block_size
    found, _ = find(state, r)
    found += find_in_tier(state, r, found)
    if request.content_count == 0:
        # The last token is always computed: it yields the next one.
        most = (request.prompt_tokens + request.generated - 1) // block_size
        found = max(found, min(request.prefix_tokens // block_size, most))
    return found * block_size


@compiled
def _needed_blocks(state: State, r: int, beside_best_effort: bool) -> int:
    """Free blocks that waiting request r needs: its whole sequence so far, and what is set aside for the future.

    Of its sequence, blocks in the prefix cache that running requests use, too, need no room of their own.
    beside_best_effort: whether the running work that may wait and could be evicted keeps what is set aside for it.
    """
    decision, engine, request = state.decision[0], state.engine[0], state.requests[r]
    used = 0
    if request.host_blocks == 0:
        _, used = find(state, r)
    if decision.reserve_ratio <= 0 and decision.reserve_new_ratio <= 0:
        return blocks_for(request.prompt_tokens + request.generated, engine.block_size) - used
    need = _lifetime_blocks(decision, engine, request, decision.reserve_new_ratio) - used
    scheduler = state.scheduler[0]
    for i in range(scheduler.running):
        other = state.requests[state.running[i]]
        stays = beside_best_effort or i >= scheduler.running - scheduler.joined or not best_effort(other)
        if other.status == RUNNING and stays:
            need += max(_lifetime_blocks(decision, engine, other, decision.reserve_ratio) - other.kv_blocks, 0)
    return need


@compiled
def _lifetime_blocks(decision, engine, request, ratio: float) -> int:
    """Blocks of a request once it has made this share of the output it still may make."""
    more = ratio * min(float(request.max_tokens - request.generated), decision.reserve_clip)
    return blocks_for(request.prompt_tokens + request.generated + int(np.ceil(more)), engine.block_size)
