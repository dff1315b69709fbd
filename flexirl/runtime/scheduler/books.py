"""The scheduler's books: running totals, promises kept and broken, who ended and how."""

from __future__ import annotations

import numba as nb
import numpy as np

from flexirl.compiled import compiled
from flexirl.policies.interface.view import NONE
from flexirl.runtime.scheduler.events import add_event, pop_event
from flexirl.runtime.scheduler.kv_cache import release
from flexirl.runtime.scheduler.lengths import learn_length
from flexirl.runtime.scheduler.queues import remove
from flexirl.runtime.scheduler.state import (
    EXPIRED,
    FINISHED,
    ITL_BINS,
    RUNNING,
    State,
)
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

# Weights of the service that fairness counts (VTC: an output token costs twice an input token).
INPUT_SERVICE, OUTPUT_SERVICE = 1.0, 2.0


@nb.njit(cache=True, inline="always")
def best_effort(request) -> bool:
    """True for work that may wait: deferred requests, and immediate ones that were relegated."""
    return (request.request_class == DEFERRED) | (request.relegated == 1)  # no branch: nothing could predict it


@nb.njit(cache=True, inline="always")
def next_token_due_s(request) -> float:
    """When the next token of a decoding immediate request is due at its promised pace."""
    return request.first_token_s + request.generated * request.tpot_slo_s


@nb.njit(cache=True, inline="always")
def seats_taken(state: State) -> int:
    """Requests in the running batch."""
    return state.classes[IMMEDIATE].running + state.classes[DEFERRED].running


@compiled
def itl_bin(gap_s: float) -> int:
    """The bin of `state.itl_bin_edges` that an inter-token latency of `gap_s` seconds falls into."""
    return min(max(int((np.log10(max(gap_s, 1e-12)) + 5.0) * 32.0), 0), ITL_BINS - 1)


@nb.njit(cache=True, inline="always")
def total_blocks(state: State) -> int:
    return state.engine[0].kv_blocks


@compiled
def compact(state: State) -> None:
    """Drops from the running list what no longer runs, keeping its order."""
    scheduler = state.scheduler[0]
    kept = 0
    for i in range(scheduler.running):
        r = state.running[i]
        if state.requests[r].status == RUNNING:
            state.running[kept] = r
            kept += 1
    scheduler.running = kept


@compiled
def join_tenant(state: State, tenant: int) -> None:
    """Counts a request in; a tenant that returns is lifted to the least service among the active (VTC)."""
    if state.tenants[tenant].active == 0:
        least = np.inf
        for other in range(len(state.tenants)):
            if state.tenants[other].active > 0:
                least = min(least, state.tenants[other].service)
        if least < np.inf:
            state.tenants[tenant].service = max(state.tenants[tenant].service, least)
    state.tenants[tenant].active += 1


@compiled
def book_prompt(state: State, r: int) -> None:
    """Credits prompt tokens computed for the first time."""
    request = state.requests[r]
    fresh = request.computed - request.furthest
    if fresh > 0:
        request.furthest = request.computed
        state.classes[request.request_class].prompt_done += fresh
        state.tenants[request.tenant].service += INPUT_SERVICE * fresh


@compiled
def book_first_token(state: State, r: int, now_s: float) -> None:
    request = state.requests[r]
    request.first_token_s = now_s
    if request.request_class == IMMEDIATE:
        if now_s > request.ttft_deadline_s:
            _book_loss(state, r)
            _forgo(state, r, _lateness(state, request, now_s, request.ttft_deadline_s))
        request.deadline_s = min(request.deadline_s, last_token_due_s(request, now_s))


@nb.njit(cache=True, inline="always")
def last_token_due_s(request, first_token_s: float) -> float:
    """When an immediate request's last token is due: the mean time of the tokens after the first is promised."""
    return first_token_s + request.tpot_slo_s * max(request.output_tokens - 1, 0) * (1.0 + 1e-9)


@compiled
def _book_loss(state: State, r: int) -> None:
    """Books once that the promise to request r is broken."""
    request = state.requests[r]
    if request.missed == 0:
        request.missed = 1
        group = state.classes[request.request_class]
        group.lost += 1
        group.lost_prompt += request.prompt_tokens
        group.lost_output += request.output_tokens


@nb.njit(cache=True, inline="always")
def patience_ends_s(state: State, request) -> float:
    """When the client of an immediate request gives up if there is no first token."""
    return request.arrival_s + state.scheduler[0].patience * (request.ttft_deadline_s - request.arrival_s)


@compiled
def _lateness(state: State, request, now_s: float, due_s: float) -> float:
    """Share of its value that a request loses by having now what was due at `due_s`: see `SLO`."""
    late = (now_s - due_s) / (due_s - request.arrival_s)
    return min(late / (state.scheduler[0].patience - 1.0), 1.0)


@compiled
def _forgo(state: State, r: int, share: float) -> None:
    """Books that request r has lost this share of its value, as far as it is not booked yet."""
    request = state.requests[r]
    more = np.float32(share) - request.forgone
    if more > 0:
        request.forgone = np.float32(share)
        group = state.classes[request.request_class]
        group.forgone_prompt += more * request.prompt_tokens
        group.forgone_output += more * request.output_tokens


@nb.njit(cache=True, inline="always")
def overdue(scheduler, request) -> bool:
    """True if a running request can no longer keep its promise and that is not yet booked."""
    left = request.output_tokens - request.generated
    return (request.missed == 0) & (scheduler.now_s + left * scheduler.fastest_step_s > request.deadline_s)


@compiled
def settle_running(state: State, r: int) -> bool:
    """Books the promise that running request r broke; True if its window closed and it ended for that."""
    scheduler, request = state.scheduler[0], state.requests[r]
    if request.request_class == IMMEDIATE:
        _book_loss(state, r)
        return False
    if scheduler.now_s <= request.deadline_s:
        return False
    request.status = EXPIRED
    end_running(state, r, scheduler.now_s)
    return True


@compiled
def settle_first_tokens(state: State) -> None:
    """Books the loss of every request whose first token fell due unmade, and who has lost patience over it."""
    scheduler = state.scheduler[0]
    while scheduler.promised > 0 and state.promises[0].time_s < scheduler.now_s:
        due_s, r = state.promises[0].time_s, state.promises[0].request
        request = state.requests[r]
        scheduler.promised = pop_event(state.promises, scheduler.promised)
        if request.first_token_s <= due_s or request.finish_s < due_s:
            continue
        if due_s <= request.ttft_deadline_s:
            _book_loss(state, r)
            scheduler.promised = add_event(state.promises, scheduler.promised, patience_ends_s(state, request), r)
        else:
            _forgo(state, r, 1.0)
            group = state.classes[IMMEDIATE]
            group.given_up += 1
            group.given_up_prompt += request.prompt_tokens
            group.given_up_output += request.output_tokens


@compiled
def end_running(state: State, r: int, now_s: float) -> None:
    state.classes[state.requests[r].request_class].running -= 1
    release(state, r, True)
    book_end(state, r, now_s)


@compiled
def end_waiting(state: State, r: int, status: int) -> None:
    remove(state, r)
    state.scheduler[0].host_free_blocks += state.requests[r].host_blocks
    state.requests[r].host_blocks = 0
    state.requests[r].status = status
    book_end(state, r, state.scheduler[0].now_s)


@compiled
def _let_follow(state: State, r: int) -> None:
    """Whoever waits for the answer of request r, which has ended, goes on when it has thought about it."""
    scheduler = state.scheduler[0]
    follower = state.follower[r]
    while follower != NONE:
        arrival_s = state.requests[r].finish_s + state.requests[follower].arrival_s
        scheduler.coming = add_event(state.followers, scheduler.coming, arrival_s, follower)
        follower = state.sibling[follower]
    state.follower[r] = NONE


@compiled
def book_end(state: State, r: int, now_s: float) -> None:
    """Books how request r, no longer in the system, ended: promise kept, or broken and its tokens void."""
    request = state.requests[r]
    group = state.classes[request.request_class]
    request.finish_s = now_s
    _let_follow(state, r)
    state.tenants[request.tenant].active -= 1
    if request.status == FINISHED:
        group.finished += 1
        group.finished_output += request.generated
        group.finished_output_squares += request.generated * np.int64(request.generated)
        learn_length(state, r)
        if now_s > request.deadline_s:
            _book_loss(state, r)
            if request.request_class == IMMEDIATE:
                _forgo(state, r, _lateness(state, request, now_s, request.deadline_s))
        if request.request_class == IMMEDIATE and request.missed == 1:
            group.late_prompt += (1.0 - request.forgone) * request.prompt_tokens
            group.late_output += (1.0 - request.forgone) * request.generated
    else:
        group.ended_otherwise += 1
        _book_loss(state, r)
        _forgo(state, r, 1.0)
    if request.missed == 1:
        group.void_prompt += request.furthest
        group.void_output += request.generated
    else:
        group.kept += 1
        group.kept_prompt += request.prompt_tokens
        group.kept_output += request.output_tokens
