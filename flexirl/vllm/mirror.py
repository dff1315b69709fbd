"""FlexiRL's scheduler state, kept in step with vLLM's: who waits, who runs, how far they are, what is free.

The plan is made in it by the functions that the surrogate and the live engine call. vLLM is always right: whatever it
does otherwise, running out of memory for one, is taken over before the next plan. Output that is on its way counts as
made, since a plan is for the step after it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba as nb
import numpy as np
from numba.experimental import structref

from flexirl.policies.interface.decision import LAST, LOWEST_SCORE, NEWEST, SCORE, default_decision
from flexirl.policies.interface.view import NONE, VISIBLE_PER_QUEUE
from flexirl.runtime.borrow import borrow
from flexirl.runtime.live.request_table import enter, leave
from flexirl.runtime.profile.engine import EngineProfile
from flexirl.runtime.profile.fits import longest_sequence
from flexirl.runtime.profile.step_time import step_time
from flexirl.runtime.scheduler.books import (
    best_effort,
    book_end,
    book_first_token,
    end_running,
    join_tenant,
    overdue,
    settle_first_tokens,
    settle_running,
)
from flexirl.runtime.scheduler.kv_cache import blocks_for, release
from flexirl.runtime.scheduler.plan import apply, plan
from flexirl.runtime.scheduler.queues import first_waiting, owed_tokens, push, remove
from flexirl.runtime.scheduler.state import CANCELLED, EXPIRED, FINISHED, REJECTED, RUNNING, WAITING, State, new_states
from flexirl.runtime.simulator import surrogate
from flexirl.workloads.slo import PATIENCE
from flexirl.workloads.trace import DEFERRED, IMMEDIATE, TRACE_ROW, empty_rows

AWAY = REJECTED  # neither waits here nor runs: loading from elsewhere, between two parts of a session, or overdue
_ONE_AT_A_TIME = 1e-9  # share of the cache: a deferred request joins where nobody else is
COMPUTED, GENERATED, TOLD = range(3)  # rows of what vLLM says of its running requests


@structref.register
class _MirroredType(nb.types.StructRef):
    """The compiled side of `Mirrored`."""


class Mirrored(structref.StructRefProxy):
    """All that the compiled functions work on as one argument, since unpacking takes longer than their work.

    numbers: int32 (S,), requests that run in vLLM, in its order; figures: int32 (3, S) of them, rows COMPUTED (tokens),
    GENERATED (output tokens, those on their way included) and TOLD (output tokens that vLLM has seen). told: int32
    (R,), the last of these by request. out: int32 (4, 2 S), what a plan or a look gives. spare: two `DECISION` records:
    the policy's while another is in force, and the one for an idle engine.
    """

    def __new__(cls, *parts: Any) -> Mirrored:
        """The arrays are shared, not copied."""
        mirrored: Mirrored = structref.StructRefProxy.__new__(cls, *parts)
        return mirrored


structref.define_proxy(Mirrored, _MirroredType, ["state", "numbers", "figures", "told", "out", "spare"])


class Plan(NamedTuple):
    """A step: who is evicted, who joins, in order, and who gets fewer tokens than it has to compute, 0 for a pause.

    step_s: seconds that it is predicted to take.
    """

    evicted: list[int]
    joined: list[int]
    cut: list[tuple[int, int]]
    step_s: float


class Mirror:
    """The state and the requests in its places. profile: the engine's; max_requests, tenants: see `Settings`."""

    def __init__(self, profile: EngineProfile, max_requests: int, tenants: int) -> None:
        seats = int(profile.values["max_running"])
        state = State(*(array[0] for array in new_states(1, profile, max_requests, tenants)))
        self.state = state._replace(nodes=state.nodes[:0])  # it is vLLM that knows what is cached
        surrogate.start(self.state, empty_rows(0), 0, PATIENCE)
        # No bound on a real iteration is certain, so a promise is broken when its time has passed and not before.
        self.state.scheduler["fastest_step_s"] = 0.0
        self.numbers = np.zeros(seats, np.int32)
        self.figures = np.zeros((3, seats), np.int32)
        self.out = np.zeros((4, 2 * seats + 2 * VISIBLE_PER_QUEUE), np.int32)
        spare = np.array([default_decision(), default_decision()])
        spare["deferred_kv_share"][1] = _ONE_AT_A_TIME
        told = np.zeros(max_requests, np.int32)
        self.arrays = Mirrored(self.state, self.numbers, self.figures, told, self.out, spare)
        self.request_at: list[Any] = []  # by place
        self.free: list[int] = []
        self._max_requests = max_requests
        self._row = np.zeros(1, TRACE_ROW)
        self._ended_otherwise = 0

        self._warm_up()

    def _warm_up(self) -> None:
        """Calls everything once, since what is compiled or read at first use takes as long as many steps."""
        self.enter(None, request_class=IMMEDIATE)
        self.plan(default_decision(), True, 0.0)
        self.follow(0, int(self.state.engine["kv_blocks"][0]), 0.0)
        self.wait(0, 0, 0, 0)
        self.heads()
        self.overdue(0.0, 1.0)
        self.victims_last()
        self.end(0, False, 0, 0.0)
        self._ended_otherwise = 0
        self.state.classes[:] = np.zeros((), self.state.classes.dtype)

    @property
    def places_left(self) -> int:
        """How many more requests there is room for."""
        return len(self.free) + self._max_requests - len(self.request_at)

    def enter(self, request: Any, **row: float) -> int:
        """Gives a waiting request a place and queues it; row: of its `TRACE_ROW`. It is cut to what can be held."""
        if self.free:
            r = self.free.pop()
            self.request_at[r] = request
        else:
            r = len(self.request_at)
            self.request_at.append(request)
        self._row[:] = empty_rows(1)
        for name, value in row.items():
            self._row[name] = value
        _enter(self.arrays, r, self._row)
        return r

    def end(self, r: int, finished: bool, generated: int, now_s: float) -> None:
        """The request in place r has ended; its place is free."""
        _end(self.arrays, r, finished, generated, now_s)
        self.request_at[r] = None
        self.free.append(r)
        self._ended_otherwise += not finished

    def wait(self, r: int, computed: int, generated: int, preemptions: int) -> None:
        """The request in place r waits if it was away; tokens and preemptions so far, as vLLM counts them."""
        _wait(self.arrays, r, computed, generated, preemptions)

    def status(self, r: int) -> int:
        """What the request in place r does here."""
        return int(self.state.requests[r]["status"])

    def follow(self, count: int, free_blocks: int, now_s: float) -> list[int]:
        """Takes over what vLLM says of its `count` running requests, by `numbers` and `figures`.

        Gives those that were thought to run and do not: they are away now.
        """
        gone = _follow(self.arrays, count, free_blocks, now_s)
        self._revive()
        away: list[int] = self.out[0, :gone].tolist()
        return away

    def heads(self) -> list[int]:
        """The first of each class that wait."""
        first: list[int] = self.out[1, : _heads(self.arrays)].tolist()
        return first

    def overdue(self, now_s: float, longest_s: float) -> list[int]:
        """Takes those out of the queue that were given up and have waited for so long; they are away now."""
        found: list[int] = self.out[0, : _take_overdue(self.arrays, len(self.request_at), now_s, longest_s)].tolist()
        return found

    def plan(self, decide: np.ndarray | None, least_work: bool, now_s: float) -> Plan:
        """Plans a step that begins at `now_s`; decide: a new decision, if there is one."""
        if decide is not None:
            self.state.decision[0] = decide
        evicted, joined, cut, step_s = _arrange(self.arrays, decide is not None, least_work, now_s)
        self._revive()
        out = self.out
        cuts = zip(out[2, :cut].tolist(), out[3, :cut].tolist(), strict=True)
        return Plan(out[0, :evicted].tolist(), out[1, :joined].tolist(), list(cuts), step_s)

    def victims_last(self) -> list[int]:
        """The order of the running list in which those whom an eviction may hit come last."""
        order: list[int] = self.out[0, : _victims_last(self.arrays)].tolist()
        return order

    def _revive(self) -> None:
        """vLLM ends nobody whose window has closed, so nobody is ended here either: they wait behind the others."""
        ended = int(self.state.classes["ended_otherwise"].sum())
        if ended > self._ended_otherwise:
            for r in np.flatnonzero(self.state.requests["status"][: len(self.request_at)] == EXPIRED).tolist():
                if self.request_at[r] is not None:
                    _revive(self.arrays, r)


@nb.njit(cache=True)
def _enter(mirrored: Any, r: int, row: np.ndarray) -> None:
    state = mirrored.state
    longest = longest_sequence(state.engine[0])
    row[0].prompt_tokens = max(min(row[0].prompt_tokens, longest - 1), 1)
    row[0].max_tokens = max(min(row[0].max_tokens, longest - row[0].prompt_tokens), 1)
    row[0].output_tokens = row[0].max_tokens
    mirrored.told[r] = 0
    enter(state, r, row)


@nb.njit(cache=True)
def _end(mirrored: Any, r: int, finished: bool, generated: int, now_s: float) -> None:
    state = mirrored.state
    request = state.requests[r]
    status = FINISHED if finished else CANCELLED
    if request.status == WAITING:
        remove(state, r)
        request.status = AWAY
    _book_output(state, mirrored.told, r, generated, now_s)
    request.generated = generated
    if finished and request.request_class == IMMEDIATE:
        # Only now is it known how many tokens the mean time per token is over.
        request.deadline_s = np.inf
        if request.first_token_s < np.inf:
            request.deadline_s = request.first_token_s + request.tpot_slo_s * max(generated - 1, 0) * (1.0 + 1e-9)
    request.output_tokens = generated
    if request.status == RUNNING:
        request.status = status
        end_running(state, r, now_s)
    else:
        request.status = status
        book_end(state, r, now_s)
    leave(state, r)


@nb.njit(cache=True)
def _book_output(state: State, told: np.ndarray, r: int, outputs: int, now_s: float) -> None:
    request = state.requests[r]
    if outputs <= told[r]:
        return
    state.classes[request.request_class].output_done += outputs - told[r]
    state.tenants[request.tenant].service += 2.0 * (outputs - told[r])
    if told[r] == 0:
        book_first_token(state, r, now_s)
    request.last_token_s = now_s
    told[r] = outputs


@nb.njit(cache=True)
def _wait(mirrored: Any, r: int, computed: int, generated: int, preemptions: int) -> None:
    state = mirrored.state
    request = state.requests[r]
    if request.status != AWAY:
        return
    state.classes[request.request_class].preemptions += max(preemptions - request.preemptions, 0)
    request.preemptions = preemptions
    request.generated = generated
    request.computed = max(min(computed, request.prompt_tokens + generated - 1), 0)
    push(state, r)


@nb.njit(cache=True)
def _revive(mirrored: Any, r: int) -> None:
    state = mirrored.state
    request = state.requests[r]
    state.classes[request.request_class].ended_otherwise -= 1
    join_tenant(state, request.tenant)
    request.deadline_s = np.inf
    request.relegated = 1
    push(state, r)


@nb.njit(cache=True)
def _follow(mirrored: Any, count: int, free_blocks: int, now_s: float) -> int:
    state = borrow(mirrored.state)
    numbers, figures, told, out = mirrored.numbers, mirrored.figures, mirrored.told, mirrored.out
    scheduler, block_size = state.scheduler[0], state.engine[0].block_size
    scheduler.now_s = now_s
    for i in range(count):
        state.requests[numbers[i]].scheduled = 1
    gone = 0
    for i in range(scheduler.running):
        r = state.running[i]
        request = state.requests[r]
        if request.status == RUNNING and request.scheduled == 0:
            release(state, r, False)
            state.classes[request.request_class].running -= 1
            request.status = AWAY
            out[0, gone] = r
            gone += 1
    for i in range(count):
        r = numbers[i]
        request = state.requests[r]
        group = state.classes[request.request_class]
        request.scheduled = 0
        if request.status != RUNNING:
            if request.status == WAITING:
                remove(state, r)
            request.status = RUNNING
            group.running += 1
        state.running[i] = r
        request.generated = figures[GENERATED, i]
        # A session may have grown: never more than all that there is but one.
        request.computed = max(min(figures[COMPUTED, i], request.prompt_tokens + request.generated - 1), 0)
        blocks = blocks_for(request.computed, block_size)
        group.kv_blocks += blocks - request.kv_blocks
        request.kv_blocks = blocks
        fresh = min(request.computed, request.prompt_tokens) - request.furthest
        if fresh > 0:
            request.furthest += fresh
            group.prompt_done += fresh
            state.tenants[request.tenant].service += fresh
        _book_output(state, told, r, figures[TOLD, i], now_s)
        if request.request_class == IMMEDIATE and overdue(scheduler, request):
            settle_running(state, r)
    scheduler.running = count
    scheduler.free_blocks = free_blocks
    scheduler.empty_blocks = free_blocks
    settle_first_tokens(state)
    return gone


@nb.njit(cache=True)
def _heads(mirrored: Any) -> int:
    state, out = mirrored.state, mirrored.out
    numbers = np.full(2 * VISIBLE_PER_QUEUE, NONE, np.int32)
    first_waiting(state, IMMEDIATE, numbers[:VISIBLE_PER_QUEUE])
    first_waiting(state, DEFERRED, numbers[VISIBLE_PER_QUEUE:])
    found = 0
    for r in numbers:
        if r != NONE:
            out[1, found] = r
            found += 1
    return found


@nb.njit(cache=True)
def _take_overdue(mirrored: Any, places: int, now_s: float, longest_s: float) -> int:
    state, out = mirrored.state, mirrored.out
    found = 0
    if state.classes[IMMEDIATE].relegated == 0:
        return 0
    for r in range(places):
        request = state.requests[r]
        waits = request.status == WAITING and request.request_class == IMMEDIATE and request.relegated == 1
        if waits and now_s > request.arrival_s + longest_s and found < out.shape[1]:
            remove(state, r)
            request.relegated = 0
            request.ttft_deadline_s = np.inf  # not given up again
            request.status = AWAY
            out[0, found] = r
            found += 1
    return found


@nb.njit(cache=True)
def _arrange(mirrored: Any, decided: bool, least_work: bool, now_s: float) -> tuple[int, int, int, float]:
    state, out, spare = borrow(mirrored.state), mirrored.out, mirrored.spare
    scheduler, decision = state.scheduler[0], state.decision[0]
    scheduler.now_s = now_s
    before = scheduler.running
    for i in range(before):
        out[0, i] = state.running[i]
    if decided:
        by_score = decision.immediate_order == SCORE or decision.deferred_order == SCORE
        if least_work and not by_score and (decision.victim == LAST or decision.victim == NEWEST):
            decision.victim = LOWEST_SCORE
    if least_work and decision.victim == LOWEST_SCORE and decision.deferred_order != SCORE:
        for i in range(before):
            request = state.requests[state.running[i]]
            request.score = float(request.computed)
    if decided:
        apply(state)
    plan(state)
    evicted = _evicted(state, out, before)
    batch = state.batch[0]
    if batch.prefill_tokens == 0 and batch.decode_sequences == 0 and evicted == 0:
        # Whatever the decision holds back, an engine that would stand idle runs it, one after another.
        spare[0] = state.decision[0]
        spare[1].immediate_order, spare[1].deferred_order = decision.immediate_order, decision.deferred_order
        state.decision[0] = spare[1]
        plan(state)
        state.decision[0] = spare[0]
        evicted = _evicted(state, out, before)
    joined, cut = 0, 0
    for i in range(scheduler.running):
        r = state.running[i]
        request = state.requests[r]
        if i >= before - evicted:
            out[1, joined] = r
            joined += 1
        if request.scheduled < owed_tokens(request):
            out[2, cut] = r
            out[3, cut] = request.scheduled
            cut += 1
        request.scheduled = 0
    return evicted, joined, cut, step_time(state.engine[0], batch)


@nb.njit(cache=True)
def _evicted(state: State, out: np.ndarray, before: int) -> int:
    """Of the first `before` numbers in out[0], keeps those that run no more; how many there are."""
    evicted = 0
    for i in range(before):
        r = out[0, i]
        if state.requests[r].status != RUNNING:
            out[0, evicted] = r
            evicted += 1
    return evicted


@nb.njit(cache=True)
def _victims_last(mirrored: Any) -> int:
    state, out = mirrored.state, mirrored.out
    count = state.scheduler[0].running
    keys = np.empty(count)
    for i in range(count):
        request = state.requests[state.running[i]]
        keys[i] = -float(request.computed) + (1e12 if best_effort(request) else 0.0)
    order = np.argsort(keys, kind="mergesort")
    for i in range(count):
        out[0, i] = state.running[order[i]]
    return count
