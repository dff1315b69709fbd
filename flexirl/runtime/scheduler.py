"""The scheduler: `plan` decides which request runs how many tokens in this iteration, `commit` books what it did.

This is mechanism. What it prefers is the policy's Decision (`state.decision`); what it guarantees whatever the policy
says: blocks are never over-committed, a request is in exactly one state, an iteration stays within its token budget,
every request ends, and preempted work resumes. The surrogate and the live engine call these same functions.
"""

from __future__ import annotations

import numba as nb
import numpy as np

from flexirl.runtime.kv_cache import allocate, blocks_for, forget, reclaim, release, trim
from flexirl.runtime.queues import NONE, head, merged_head, owed_tokens, push, remove, reorder
from flexirl.runtime.state import (
    CANCELLED,
    CHEAPER,
    CLASSES,
    DECODES,
    EXPIRED,
    FINISHED,
    FUTURE,
    ITL_BINS,
    LAST,
    LATER_DECODES,
    LATER_PREFILLS,
    LEAST_OUTPUT,
    LOWEST_SCORE,
    ONE_QUEUE,
    PREFILLS,
    RECOMPUTE,
    REJECTED,
    RUNNING,
    WAITING,
    State,
)
from flexirl.runtime.step_time import prefill_slope, step_time_with_chunk, step_time_with_decodes
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

# Immediate prefill always advances by this much, whatever its step target: chunks this small are all but free.
MIN_CHUNK = 64
# Weights of the service that fairness counts (VTC: an output token costs twice an input token).
INPUT_SERVICE, OUTPUT_SERVICE = 1.0, 2.0
# Whom an eviction may hit: any running request, work that may wait (`best_effort`), or deferred requests alone.
ANYONE, ONLY_BEST_EFFORT, ONLY_DEFERRED = range(3)


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
    longest = request.prompt_tokens + request.max_tokens
    _join_tenant(state, request.tenant)
    if longest > engine.max_model_len or blocks_for(longest, engine.block_size) > _total_blocks(state):
        request.status = REJECTED
        _book_end(state, r, scheduler.now_s)
    else:
        push(state, r)


@nb.njit(cache=True)
def apply(state: State) -> None:
    """Puts a new decision into force: sorts the queues as it says and makes its one-off preemptions."""
    decision = state.decision[0]
    reorder(state, IMMEDIATE, decision.immediate_order, decision.order_weight_s, decision.expected_output)
    reorder(state, DEFERRED, decision.deferred_order, decision.order_weight_s, decision.expected_output)
    for _ in range(decision.preempt_count):
        victim = _victim(state, ONLY_DEFERRED)
        if victim == NONE:
            break
        _preempt(state, victim)
    if decision.preempt_count > 0:
        _compact(state)


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
        _admit_waiting(state, True, False)
        _run(state, LATER_DECODES)
        _run(state, LATER_PREFILLS)
        _admit_waiting(state, False, True)
    else:
        _admit_waiting(state, True, True)
    if state.classes[IMMEDIATE].preempted + state.classes[DEFERRED].preempted > 0:
        _compact(state)


@nb.njit(cache=True)
def commit(state: State, elapsed_s: float) -> None:
    """Books the planned iteration, which took `elapsed_s` seconds: progress, tokens, broken promises, who ended."""
    scheduler = state.scheduler[0]
    began_s = scheduler.now_s
    now_s = began_s + elapsed_s
    scheduler.now_s = now_s
    scheduler.iterations += 1
    scheduler.busy_s += elapsed_s
    scheduler.kv_block_s += elapsed_s * (_total_blocks(state) - scheduler.free_blocks)
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
                _book_prompt(state, r)
            if owed_tokens(request) == 0:
                request.generated += 1
                is_immediate = request.request_class == IMMEDIATE
                immediate_tokens += is_immediate
                tokens_made += 1
                if not one_tenant:
                    state.tenants[request.tenant].service += OUTPUT_SERVICE
                if request.generated == 1:
                    first_tokens += is_immediate
                    _first_token(state, r, now_s)
                elif is_immediate & (request.last_token_s != began_s):  # it paused
                    paused += 1
                    state.itl_histogram[itl_bin(now_s - request.last_token_s)] += 1
                request.last_token_s = now_s
                if request.generated == request.output_tokens:
                    request.status = FINISHED
                    _end_running(state, r, now_s)
                    continue
        if _overdue(scheduler, request) and _settle_running(state, r):
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
        request.deadline_s = min(request.deadline_s, _last_token_due_s(request, request.first_token_s))


@nb.njit(cache=True)
def abandon(state: State, elapsed_s: float) -> None:
    """Books that the planned iteration was broken off after `elapsed_s` seconds: none of its tokens was computed."""
    scheduler = state.scheduler[0]
    scheduler.now_s += elapsed_s
    scheduler.busy_s += elapsed_s
    scheduler.kv_block_s += elapsed_s * (_total_blocks(state) - scheduler.free_blocks)
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
        if _overdue(scheduler, state.requests[state.running[i]]):
            ended |= _settle_running(state, state.running[i])
    if ended:
        _compact(state)
    settle_first_tokens(state)


@nb.njit(cache=True)
def cancel(state: State, r: int) -> None:
    """Ends request r between two iterations and frees all it holds; nothing happens if it has ended already."""
    request = state.requests[r]
    if request.status == RUNNING:
        request.status = CANCELLED
        _end_running(state, r, state.scheduler[0].now_s)
        _compact(state)
    elif request.status == WAITING:
        _end_waiting(state, r, CANCELLED)


@nb.njit(cache=True)
def itl_bin(gap_s: float) -> int:
    """The bin of `state.itl_bin_edges` that an inter-token latency of `gap_s` seconds falls into."""
    return min(max(int((np.log10(max(gap_s, 1e-12)) + 5.0) * 32.0), 0), ITL_BINS - 1)


@nb.njit(cache=True, inline="always")
def best_effort(request) -> bool:
    """True for work that may wait: deferred requests, and immediate ones that were relegated."""
    return (request.request_class == DEFERRED) | (request.relegated == 1)  # no branch: nothing could predict it


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


@nb.njit(cache=True, inline="always")
def next_token_due_s(request) -> float:
    """When the next token of a decoding immediate request is due at its promised pace."""
    return request.first_token_s + request.generated * request.tpot_slo_s


@nb.njit(cache=True)
def decodes_cost(engine, decodes: int, context: float) -> float:
    """Seconds that `decodes` decodes, attending to `context` tokens together, add to a large iteration."""
    per_decode_s = prefill_slope(engine) + engine.per_sequence_s
    return decodes * per_decode_s + context * (engine.per_context_s + engine.per_mixed_context_s)


# ---------------------------------------------------------------------------------------------- running requests


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
        tokens = _chunk(state, r, request.computed)
    elif best_effort(request) and scheduler.deferred_target_s < np.inf and scheduler.deferred_floor <= 0:
        longer_s = step_time_with_decodes(state.engine[0], state.batch[0], 1, request.computed + 1.0)
        tokens = 1 if longer_s <= scheduler.deferred_target_s else 0
    else:
        tokens = 1
    if tokens > 0 and _grow(state, r, request.computed + tokens):
        _enlist(scheduler, state.batch[0], request, tokens)


@nb.njit(cache=True)
def _chunk(state: State, r: int, start: int) -> int:
    """Tokens of request r to prefill from position `start`: within budget and the step target of its kind of work."""
    scheduler, batch = state.scheduler[0], state.batch[0]
    engine, request = state.engine[0], state.requests[r]
    limit = min(request.prompt_tokens + request.generated - start, scheduler.budget)
    waits = best_effort(request)
    target_s = scheduler.deferred_target_s if waits else scheduler.immediate_target_s
    if target_s == np.inf or limit <= 0 or _step_with(engine, batch, request, start, limit) <= target_s:
        return limit
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        if _step_with(engine, batch, request, start, middle) <= target_s:
            low = middle
        else:
            high = middle
    if waits:
        return max(low, min(limit, max(scheduler.deferred_floor, 0)))
    if batch.prefill_tokens == 0:
        return max(low, min(limit, MIN_CHUNK))
    return low


@nb.njit(cache=True, inline="always")
def _step_with(engine, batch, request, start: int, tokens: int) -> float:
    """Predicted seconds of the iteration if `tokens` of a request, from position `start` on, joined it."""
    samples = start + tokens == request.prompt_tokens + request.generated
    if samples and tokens == 1 and request.generated > 0:
        return step_time_with_decodes(engine, batch, 1, start + 1.0)
    step_s = step_time_with_chunk(engine, batch, start, tokens, image_tokens_of_chunk(request, start, tokens))
    return step_s + engine.per_sequence_s if samples else step_s


@nb.njit(cache=True)
def image_tokens_of_chunk(request, start: int, tokens: int) -> float:
    """Image tokens to encode for a chunk: images stand at the front of the prompt, each is encoded when reached."""
    images, length = np.int64(request.num_images), request.image_tokens
    if images == 0 or start >= length:
        return 0.0
    # In whole numbers: images reached by a position, counted in floating point, can come out as one too many.
    end = min(start + tokens, length)
    reached = (end * images + length - 1) // length - (start * images + length - 1) // length
    return reached * (length / images)


@nb.njit(cache=True, inline="always")
def _enlist(scheduler, batch, request, tokens: int) -> None:
    """Adds `tokens` of a running request to the iteration."""
    _count_in_batch(scheduler, batch, request, tokens, 1)
    request.scheduled = tokens


@nb.njit(cache=True, inline="always")
def _count_in_batch(scheduler, batch, request, tokens: int, sign: int) -> None:
    scheduler.budget -= sign * tokens
    if best_effort(request):
        scheduler.deferred_floor -= sign * tokens
    owed = owed_tokens(request)
    if owed == 1 and request.generated > 0:
        batch.decode_sequences += sign
        batch.decode_context += sign * (request.computed + 1.0)
    else:
        batch.prefill_tokens += sign * tokens
        batch.chunk_context += sign * (float(tokens) * request.computed + 0.5 * float(tokens) * tokens)
        batch.image_tokens += sign * image_tokens_of_chunk(request, request.computed, tokens)
    if tokens == owed:
        batch.sampled_sequences += sign


# ---------------------------------------------------------------------------------------------- memory


@nb.njit(cache=True)
def _grow(state: State, r: int, tokens: int) -> bool:
    """Makes running request r hold blocks for `tokens` tokens, evicting others if need be; False: it must wait."""
    scheduler, request = state.scheduler[0], state.requests[r]
    need = blocks_for(tokens, state.engine[0].block_size) - request.kv_blocks
    if need <= 0:
        return True
    one_queue = state.decision[0].discipline == ONE_QUEUE
    while need > scheduler.free_blocks:
        victim = _victim(state, ANYONE if one_queue or not best_effort(request) else ONLY_BEST_EFFORT)
        _preempt(state, victim)
        if victim == r:
            return False
    allocate(state, r, need)
    return True


@nb.njit(cache=True)
def _victim(state: State, reach: int) -> int:
    """The running request to evict first among those within `reach`, or NONE.

    Work that may wait goes before any other, except that `LAST` in one queue is blind to class.
    """
    decision = state.decision[0]
    blind = decision.discipline == ONE_QUEUE and decision.victim == LAST
    best = NONE
    for i in range(state.scheduler[0].running):
        r = state.running[i]
        request = state.requests[r]
        if request.status != RUNNING:
            continue
        if reach == ONLY_BEST_EFFORT and not best_effort(request):
            continue
        if reach == ONLY_DEFERRED and request.request_class != DEFERRED:
            continue
        if best == NONE or _evict_sooner(decision, request, state.requests[best], blind):
            best = r
    return best


@nb.njit(cache=True)
def _evict_sooner(decision, a, b, blind: bool) -> bool:
    """True if `a`, later in the running batch, is evicted rather than `b`."""
    if not blind and best_effort(a) != best_effort(b):
        return best_effort(a)
    if decision.victim == LAST:
        return True
    if decision.victim == LEAST_OUTPUT:
        return a.generated < b.generated or (a.generated == b.generated and a.prompt_tokens > b.prompt_tokens)
    if decision.victim == LOWEST_SCORE:
        return a.score < b.score or (a.score == b.score and a.arrival_s > b.arrival_s)
    return a.arrival_s >= b.arrival_s


@nb.njit(cache=True)
def _preempt(state: State, r: int) -> None:
    """Takes running request r out of the batch, by recompute or by swap, and queues it again."""
    scheduler, request = state.scheduler[0], state.requests[r]
    group = state.classes[request.request_class]
    if request.scheduled > 0:
        _count_in_batch(scheduler, state.batch[0], request, request.scheduled, -1)
        request.scheduled = 0
    if _swaps_out(state, r):
        request.host_blocks = request.kv_blocks
        scheduler.host_free_blocks -= request.host_blocks
        unsaved = max(request.computed - request.saved, 0)
        scheduler.swapped_tokens += unsaved
        state.batch[0].swap_tokens += unsaved
        release(state, r, 0)
    else:
        scheduler.recomputed_tokens += request.computed
        release(state, r, request.computed)
        request.computed = 0
    request.preemptions += 1
    group.preemptions += 1
    group.preempted += 1
    group.running -= 1
    push(state, r)


@nb.njit(cache=True)
def _swaps_out(state: State, r: int) -> bool:
    scheduler, engine, request = state.scheduler[0], state.engine[0], state.requests[r]
    mode = state.decision[0].preemption
    if mode == RECOMPUTE or request.computed == 0 or request.kv_blocks > scheduler.host_free_blocks:
        return False
    return mode != CHEAPER or swap_cost(engine, request) < recompute_cost(engine, request)


@nb.njit(cache=True)
def swap_cost(engine, request) -> float:
    """Seconds to move the request's keys and values to host memory, as far as they are not there yet, and back."""
    return (request.computed + max(request.computed - request.saved, 0)) * engine.per_swap_token_s


@nb.njit(cache=True)
def recompute_cost(engine, request) -> float:
    """Seconds to prefill again what the request had computed, in iterations that are busy anyway."""
    tokens = float(request.computed)
    slope = prefill_slope(engine)
    images = min(tokens, float(request.image_tokens))
    return slope * tokens + 0.5 * engine.per_chunk_context_s * tokens * tokens + engine.per_image_token_s * images


@nb.njit(cache=True)
def _make_room(state: State, r: int) -> bool:
    """Evicts work that may wait until waiting request r has memory and a seat, but only if that can succeed."""
    scheduler = state.scheduler[0]
    within_reach, evictable = scheduler.free_blocks, 0
    for i in range(scheduler.running):
        request = state.requests[state.running[i]]
        if request.status == RUNNING and best_effort(request):
            within_reach += request.kv_blocks
            evictable += 1
    if evictable == 0 or within_reach < _needed_blocks(state, r, False):
        return False
    while not _has_room(state, r):
        _preempt(state, _victim(state, ONLY_BEST_EFFORT))
    return True


# ---------------------------------------------------------------------------------------------- waiting requests


@nb.njit(cache=True)
def _admit_waiting(state: State, immediate: bool, deferred: bool) -> None:
    """Admits from the head of the queue until the head must wait. What was evicted in this iteration stays out."""
    scheduler = state.scheduler[0]
    while scheduler.budget > 0:
        if (deferred and state.classes[DEFERRED].preempted > 0) or state.classes[IMMEDIATE].preempted > 0:
            return
        r = _next(state, immediate, deferred)
        if r == NONE:
            return
        request = state.requests[r]
        if request.request_class == DEFERRED and scheduler.now_s > request.deadline_s:
            _end_waiting(state, r, EXPIRED)
        elif state.decision[0].relegate > 0 and request.relegated == 0 and _hopeless(state, r):
            remove(state, r)
            request.relegated = 1
            push(state, r)
        elif not _admit(state, r):
            return


@nb.njit(cache=True)
def _next(state: State, immediate: bool, deferred: bool) -> int:
    """The request to admit next, or NONE; relegated immediate requests come after deferred ones."""
    if state.decision[0].discipline == ONE_QUEUE:
        return merged_head(state)
    first = head(state, IMMEDIATE)
    urgent = first != NONE and not state.requests[first].relegated
    if urgent and immediate:
        return first
    if not deferred:
        return NONE
    second = head(state, DEFERRED)
    return second if second != NONE or urgent else first


@nb.njit(cache=True)
def _hopeless(state: State, r: int) -> bool:
    """True if an immediate request is to be given up: see `relegate` in `DECISION`."""
    engine, request = state.engine[0], state.requests[r]
    if request.request_class != IMMEDIATE or request.generated > 0:
        return False
    start = _reusable_tokens(state, r)
    owed = request.prompt_tokens - start
    tokens = float(owed)
    slope = prefill_slope(engine)
    alone_s = slope * tokens + engine.per_chunk_context_s * tokens * (start + 0.5 * tokens)
    alone_s += engine.per_image_token_s * image_tokens_of_chunk(request, start, owed)
    return state.scheduler[0].now_s + state.decision[0].relegate * alone_s > request.ttft_deadline_s


@nb.njit(cache=True)
def _admit(state: State, r: int) -> bool:
    """Moves waiting request r into the batch if seats, memory and step target allow; its first chunk runs now."""
    scheduler, decision, engine = state.scheduler[0], state.decision[0], state.engine[0]
    request = state.requests[r]
    waits = best_effort(request)
    if waits and shut_out(state, r):
        return False
    start = _reusable_tokens(state, r)
    chunk = _chunk(state, r, start)
    if chunk <= 0:
        return False
    if not waits and not _has_room(state, r):
        if not decision.preempt_for_immediate or not _make_room(state, r):
            return False
    remove(state, r)
    if request.host_blocks > 0:
        scheduler.host_free_blocks += request.host_blocks
        scheduler.swapped_tokens += request.computed
        state.batch[0].swap_tokens += request.computed
        request.host_blocks = 0
    elif start > 0:
        scheduler.prefix_hit_tokens += start - request.cached_blocks * engine.block_size
        if request.preemptions > 0:
            scheduler.recomputed_tokens -= start
        reclaim(state, r)
    request.computed = start
    request.status = RUNNING
    state.classes[request.request_class].running += 1
    state.running[scheduler.running] = r
    scheduler.running += 1
    allocate(state, r, blocks_for(start + chunk, engine.block_size) - request.kv_blocks)
    _enlist(scheduler, state.batch[0], request, chunk)
    return True


@nb.njit(cache=True)
def shut_out(state: State, r: int) -> bool:
    """True if waiting request r, which may wait, lacks leave, a seat or memory to join, whatever the step target."""
    scheduler, decision, engine = state.scheduler[0], state.decision[0], state.engine[0]
    used = engine.kv_blocks - scheduler.free_blocks
    if decision.deferred_kv_share < 1 and used >= decision.deferred_kv_share * engine.kv_blocks:
        return True
    return decision.preempt_count > 0 or not _has_room(state, r)


@nb.njit(cache=True)
def _has_room(state: State, r: int) -> bool:
    """True if there are a seat and memory for waiting request r."""
    if seats_taken(state) >= state.engine[0].max_running:
        return False
    return _needed_blocks(state, r, True) <= state.scheduler[0].free_blocks


@nb.njit(cache=True)
def _reusable_tokens(state: State, r: int) -> int:
    """Tokens of a waiting request that need no computing: swapped out, still cached, or a shared prefix."""
    request, engine = state.requests[r], state.engine[0]
    if request.host_blocks > 0:
        return request.computed
    if not engine.prefix_caching:
        return 0
    block_size = engine.block_size
    cached = max(request.cached_blocks, request.prefix_tokens // block_size)
    # The last token is always computed: it yields the next one.
    return min(cached, (request.prompt_tokens + request.generated - 1) // block_size) * block_size


@nb.njit(cache=True)
def _needed_blocks(state: State, r: int, beside_best_effort: bool) -> int:
    """Free blocks that waiting request r needs: its whole sequence so far, and what is set aside for the future.

    beside_best_effort: whether the running work that may wait keeps what is set aside for it.
    """
    decision, engine, request = state.decision[0], state.engine[0], state.requests[r]
    if decision.reserve_ratio <= 0 and decision.reserve_new_ratio <= 0:
        return blocks_for(request.prompt_tokens + request.generated, engine.block_size)
    need = _lifetime_blocks(decision, engine, request, decision.reserve_new_ratio)
    for i in range(state.scheduler[0].running):
        other = state.requests[state.running[i]]
        if other.status == RUNNING and (beside_best_effort or not best_effort(other)):
            need += max(_lifetime_blocks(decision, engine, other, decision.reserve_ratio) - other.kv_blocks, 0)
    return need


@nb.njit(cache=True)
def _lifetime_blocks(decision, engine, request, ratio: float) -> int:
    """Blocks of a request once it has made this share of the output it still may make."""
    more = ratio * min(float(request.max_tokens - request.generated), decision.reserve_clip)
    return blocks_for(request.prompt_tokens + request.generated + int(np.ceil(more)), engine.block_size)


# ---------------------------------------------------------------------------------------------- accounts


@nb.njit(cache=True, inline="always")
def _total_blocks(state: State) -> int:
    return state.engine[0].kv_blocks


@nb.njit(cache=True, inline="always")
def seats_taken(state: State) -> int:
    """Requests in the running batch."""
    return state.classes[IMMEDIATE].running + state.classes[DEFERRED].running


@nb.njit(cache=True)
def _compact(state: State) -> None:
    """Drops from the running list what no longer runs, keeping its order."""
    scheduler = state.scheduler[0]
    kept = 0
    for i in range(scheduler.running):
        r = state.running[i]
        if state.requests[r].status == RUNNING:
            state.running[kept] = r
            kept += 1
    scheduler.running = kept


@nb.njit(cache=True)
def _join_tenant(state: State, tenant: int) -> None:
    """Counts a request in; a tenant that returns is lifted to the least service among the active (VTC)."""
    if state.tenants[tenant].active == 0:
        least = np.inf
        for other in range(len(state.tenants)):
            if state.tenants[other].active > 0:
                least = min(least, state.tenants[other].service)
        if least < np.inf:
            state.tenants[tenant].service = max(state.tenants[tenant].service, least)
    state.tenants[tenant].active += 1


@nb.njit(cache=True)
def _book_prompt(state: State, r: int) -> None:
    """Credits prompt tokens computed for the first time."""
    request = state.requests[r]
    fresh = request.computed - request.furthest
    if fresh > 0:
        request.furthest = request.computed
        state.classes[request.request_class].prompt_done += fresh
        state.tenants[request.tenant].service += INPUT_SERVICE * fresh


@nb.njit(cache=True)
def _first_token(state: State, r: int, now_s: float) -> None:
    request = state.requests[r]
    request.first_token_s = now_s
    if request.request_class == IMMEDIATE:
        if now_s > request.ttft_deadline_s:
            _book_loss(state, r)
        request.deadline_s = min(request.deadline_s, _last_token_due_s(request, now_s))


@nb.njit(cache=True, inline="always")
def _last_token_due_s(request, first_token_s: float) -> float:
    """When an immediate request's last token is due: the mean time of the tokens after the first is promised."""
    return first_token_s + request.tpot_slo_s * max(request.output_tokens - 1, 0) * (1.0 + 1e-9)


@nb.njit(cache=True)
def _book_loss(state: State, r: int) -> None:
    """Books once that the promise to request r is broken."""
    request = state.requests[r]
    if request.missed == 0:
        request.missed = 1
        group = state.classes[request.request_class]
        group.lost += 1
        group.lost_prompt += request.prompt_tokens
        group.lost_output += request.output_tokens


# The functions called for each running request in each iteration take records: passing the whole State costs more than
# their work, because Numba counts references to every array in it.
@nb.njit(cache=True, inline="always")
def _overdue(scheduler, request) -> bool:
    """True if a running request can no longer keep its promise and that is not yet booked."""
    left = request.output_tokens - request.generated
    return (request.missed == 0) & (scheduler.now_s + left * scheduler.fastest_step_s > request.deadline_s)


@nb.njit(cache=True)
def _settle_running(state: State, r: int) -> bool:
    """Books the promise that running request r broke; True if its window closed and it ended for that."""
    scheduler, request = state.scheduler[0], state.requests[r]
    if request.request_class == IMMEDIATE:
        _book_loss(state, r)
        return False
    if scheduler.now_s <= request.deadline_s:
        return False
    request.status = EXPIRED
    _end_running(state, r, scheduler.now_s)
    return True


@nb.njit(cache=True)
def settle_first_tokens(state: State) -> None:
    """Books the loss of every request whose first token fell due unmade. `promises` is sorted by due time.

    One that arrived during an iteration holds up those due after it until it is submitted, so this is called then, too.
    """
    scheduler = state.scheduler[0]
    while scheduler.promises_next < scheduler.promises_length:
        r = state.promises[scheduler.promises_next]
        if state.requests[r].status == FUTURE or state.requests[r].ttft_deadline_s >= scheduler.now_s:
            return
        if state.requests[r].first_token_s > state.requests[r].ttft_deadline_s:
            _book_loss(state, r)
        scheduler.promises_next += 1


@nb.njit(cache=True)
def _end_running(state: State, r: int, now_s: float) -> None:
    state.classes[state.requests[r].request_class].running -= 1
    release(state, r, 0)
    _book_end(state, r, now_s)


@nb.njit(cache=True)
def _end_waiting(state: State, r: int, status: int) -> None:
    remove(state, r)
    forget(state, r)
    state.scheduler[0].host_free_blocks += state.requests[r].host_blocks
    state.requests[r].host_blocks = 0
    state.requests[r].status = status
    _book_end(state, r, state.scheduler[0].now_s)


@nb.njit(cache=True)
def _book_end(state: State, r: int, now_s: float) -> None:
    """Books how request r, no longer in the system, ended: promise kept, or broken and its tokens void."""
    request = state.requests[r]
    group = state.classes[request.request_class]
    request.finish_s = now_s
    state.tenants[request.tenant].active -= 1
    if request.status == FINISHED:
        group.finished += 1
        if now_s > request.deadline_s:
            _book_loss(state, r)
    else:
        group.ended_otherwise += 1
        _book_loss(state, r)
    if request.missed == 1:
        group.void_prompt += request.furthest
        group.void_output += request.generated
    else:
        group.kept += 1
        group.kept_prompt += request.prompt_tokens
        group.kept_output += request.output_tokens
