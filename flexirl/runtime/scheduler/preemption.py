"""Memory for running requests, and whom to evict for it: by recompute or by swap, at whose cost."""

from __future__ import annotations

from flexirl.compiled import compiled
from flexirl.policies.interface.decision import (
    CHEAPER,
    LAST,
    LEAST_COMPUTED,
    LEAST_OUTPUT,
    LOWEST_SCORE,
    ONE_QUEUE,
    RECOMPUTE,
)
from flexirl.policies.interface.view import NONE
from flexirl.runtime.profile.step_time import prefill_slope
from flexirl.runtime.scheduler.books import best_effort
from flexirl.runtime.scheduler.composition import count_in_batch
from flexirl.runtime.scheduler.kv_cache import allocate, blocks_for, release
from flexirl.runtime.scheduler.queues import push
from flexirl.runtime.scheduler.state import RUNNING, State
from flexirl.workloads.trace import DEFERRED

# Whom an eviction may hit: any running request, work that may wait (`best_effort`), or deferred requests alone.
ANYONE, ONLY_BEST_EFFORT, ONLY_DEFERRED = range(3)


@compiled
def grow(state: State, r: int, tokens: int) -> bool:
    """Makes running request r hold blocks for `tokens` tokens, evicting others if need be; False: it must wait."""
    scheduler, request = state.scheduler[0], state.requests[r]
    need = blocks_for(tokens, state.engine[0].block_size) - request.kv_blocks
    if need <= 0:
        return True
    one_queue = state.decision[0].discipline == ONE_QUEUE
    while need > scheduler.free_blocks:
        victim = victim_within(state, ANYONE if one_queue or not best_effort(request) else ONLY_BEST_EFFORT)
        preempt(state, victim)
        if victim == r:
            return False
    allocate(state, r, need)
    return True


@compiled
def victim_within(state: State, reach: int) -> int:
    """The running request to evict first among those within `reach`, or NONE.

    What the same plan admitted is out of reach: if it was swapped in, its keys and values have not come back yet.
    Work that may wait goes before any other, except that `LAST` in one queue is blind to class.
    """
    decision = state.decision[0]
    blind = decision.discipline == ONE_QUEUE and decision.victim == LAST
    best = NONE
    for i in range(state.scheduler[0].running - state.scheduler[0].joined):
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


@compiled
def _evict_sooner(decision, a, b, blind: bool) -> bool:
    """True if `a`, later in the running batch, is evicted rather than `b`."""
    if not blind and best_effort(a) != best_effort(b):
        return best_effort(a)
    if decision.victim == LAST:
        return True
    if decision.victim == LEAST_OUTPUT:
        return a.generated < b.generated or (a.generated == b.generated and a.prompt_tokens > b.prompt_tokens)
    if decision.victim == LEAST_COMPUTED:
        return a.computed < b.computed or (a.computed == b.computed and a.arrival_s > b.arrival_s)
    if decision.victim == LOWEST_SCORE:
        return a.score < b.score or (a.score == b.score and a.arrival_s > b.arrival_s)
    return a.arrival_s >= b.arrival_s


@compiled
def preempt(state: State, r: int) -> None:
    """Takes running request r out of the batch, by recompute or by swap, and queues it again."""
    scheduler, request = state.scheduler[0], state.requests[r]
    group = state.classes[request.request_class]
    if request.scheduled > 0:
        count_in_batch(scheduler, state.batch[0], request, request.scheduled, -1)
        request.scheduled = 0
    if _swaps_out(state, r):
        request.host_blocks = request.kv_blocks
        scheduler.host_free_blocks -= request.host_blocks
        unsaved = max(request.computed - request.saved, 0)
        scheduler.swapped_tokens += unsaved
        state.batch[0].swap_tokens += unsaved
        release(state, r, False)
    else:
        scheduler.recomputed_tokens += request.computed
        release(state, r, True)
        request.computed = 0
    request.preemptions += 1
    group.preemptions += 1
    group.preempted += 1
    group.running -= 1
    push(state, r)


@compiled
def _swaps_out(state: State, r: int) -> bool:
    scheduler, engine, request = state.scheduler[0], state.engine[0], state.requests[r]
    mode = state.decision[0].preemption
    if mode == RECOMPUTE or request.computed == 0 or request.kv_blocks > scheduler.host_free_blocks:
        return False
    return mode != CHEAPER or swap_cost(engine, request) < recompute_cost(engine, request)


@compiled
def swap_cost(engine, request) -> float:
    """Seconds to move the request's keys and values to host memory, as far as they are not there yet, and back."""
    return (request.computed + max(request.computed - request.saved, 0)) * engine.per_swap_token_s


@compiled
def recompute_cost(engine, request) -> float:
    """Seconds to prefill again what the request had computed, in iterations that are busy anyway."""
    tokens = float(request.computed)
    slope = prefill_slope(engine)
    images = min(tokens, float(request.image_tokens))
    return slope * tokens + 0.5 * engine.per_chunk_context_s * tokens * tokens + engine.per_image_token_s * images
