"""The scheduler's side of the view: fills what a policy may see from the state, and keeps the rest to itself."""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
from numba.experimental import structref

from flexirl.compiled import compiled
from flexirl.policies.interface.view import (
    NONE,
    SEEN,
    VISIBLE_PER_QUEUE,
    View,
    ViewArrays,
    idle_arrays,
    tally_running,
)
from flexirl.runtime.borrow import borrow
from flexirl.runtime.scheduler.books import next_token_due_s
from flexirl.runtime.scheduler.queues import first_waiting, head
from flexirl.runtime.scheduler.state import RUNNING, WAITING, State
from flexirl.workloads.slo import SLO
from flexirl.workloads.trace import DEFERRED, IMMEDIATE


@compiled
def look(state: State, view: ViewArrays) -> None:
    """Fills a view of the engine as it stands, but for its profile and promise."""
    scheduler, now = state.scheduler[0], view.now[0]
    now.now_s = scheduler.now_s
    now.busy_s = scheduler.busy_s
    now.iterations = scheduler.iterations
    now.free_blocks = scheduler.free_blocks
    now.host_free_blocks = scheduler.host_free_blocks
    now.decode_sequences = state.batch[0].decode_sequences
    for c in range(2):
        _look_at_class(state, c, view.groups[c])
    tally_running(state.requests, state.running, scheduler.running, scheduler.now_s, view.groups)
    if len(view.visible) > 0:
        _look_at_requests(state, view.visible)


@compiled
def _look_at_class(state: State, c: int, seen) -> None:
    group = state.classes[c]
    seen.waiting = group.waiting
    seen.waiting_tokens = group.waiting_tokens
    seen.relegated = group.relegated
    seen.relegated_tokens = group.relegated_tokens
    seen.windowed = group.windowed
    seen.order = group.order
    seen.running = group.running
    seen.kv_blocks = group.kv_blocks
    seen.idle_blocks = group.idle_blocks
    seen.admitted_prompt = group.admitted_prompt
    seen.found_prompt = group.found_prompt
    seen.arrived = group.arrived
    seen.arrived_prompt = group.arrived_prompt
    seen.finished = group.finished
    seen.finished_output = group.finished_output
    seen.finished_output_squares = group.finished_output_squares
    seen.lost = group.lost
    seen.preemptions = group.preemptions
    seen.prompt_done = group.prompt_done
    seen.output_done = group.output_done
    first = head(state, c)
    seen.head = first != NONE
    if first != NONE:
        request = state.requests[first]
        seen.head_key = request.key
        seen.head_arrival_s = request.arrival_s
        seen.head_deadline_s = request.deadline_s if c == DEFERRED else np.inf
        seen.head_relegated = request.relegated
        seen.head_predicted = request.predicted_output_tokens


@compiled
def _look_at_requests(state: State, visible: np.ndarray) -> None:
    """The first immediate and deferred requests waiting, then the newest of the running batch."""
    numbers = np.full(len(visible), NONE, np.int32)
    first_waiting(state, IMMEDIATE, numbers[:VISIBLE_PER_QUEUE])
    first_waiting(state, DEFERRED, numbers[VISIBLE_PER_QUEUE : 2 * VISIBLE_PER_QUEUE])
    running = state.scheduler[0].running
    for i in range(min(running, 2 * VISIBLE_PER_QUEUE)):
        numbers[2 * VISIBLE_PER_QUEUE + i] = state.running[running - 1 - i]
    for i in range(len(visible)):
        visible[i].request = NONE
        if numbers[i] != NONE:
            _show(state, numbers[i], visible[i])


@compiled
def _show(state: State, r: int, seen) -> None:
    """What may be known of request r. An immediate one's deadline is left out: it follows from the output's length."""
    request = state.requests[r]
    seen.request = r
    seen.request_class = request.request_class
    seen.running = request.status == RUNNING
    seen.tenant = request.tenant
    seen.prompt_tokens = request.prompt_tokens
    seen.max_tokens = request.max_tokens
    seen.predicted_output_tokens = request.predicted_output_tokens
    seen.num_images = request.num_images
    seen.image_tokens = request.image_tokens
    seen.generated = request.generated
    seen.computed = request.computed
    seen.kv_blocks = request.kv_blocks
    seen.preemptions = request.preemptions
    seen.relegated = request.relegated
    seen.arrival_s = request.arrival_s
    seen.due_s = request.deadline_s
    if request.request_class == IMMEDIATE:
        seen.due_s = next_token_due_s(request) if request.generated > 0 else request.ttft_deadline_s
    seen.tpot_slo_s = request.tpot_slo_s
    seen.first_token_s = request.first_token_s
    seen.last_token_s = request.last_token_s


@compiled
def _show_all(pair: Any, out: np.ndarray) -> None:
    state, count = borrow(pair.state), 0
    for r in range(len(state.requests)):
        if count == len(out):
            return
        if state.requests[r].status == WAITING or state.requests[r].status == RUNNING:
            _show(state, r, out[count])
            count += 1


@compiled
def _look(pair: Any) -> None:
    look(borrow(pair.state), borrow(pair.arrays))


@structref.register
class _PairType(nb.types.StructRef):
    """The compiled side of `_Pair`."""


class _Pair(structref.StructRefProxy):
    """A state and its view as one argument, since compiled code takes longer to unpack them than to look."""

    def __new__(cls, state: State, arrays: ViewArrays) -> _Pair:
        return _new_pair(state, arrays)


structref.define_proxy(_Pair, _PairType, ["state", "arrays"])


@compiled
def _new_pair(state: State, arrays: ViewArrays) -> _Pair:
    # The proxy's own constructor is compiled anew in every process.
    return _Pair(state, arrays)


class Lookout:
    """An engine's window for policies: `look` brings `view` up to date and gives it."""

    def __init__(self, state: State, slo: SLO) -> None:
        arrays = idle_arrays(state.engine[0], slo)._replace(profile=state.engine)
        self._state = state
        self._pair = _Pair(state, arrays)
        self.view = View(arrays, slo, self._requests)
        self.look()

    def look(self) -> View:
        """The view of the engine as it stands now."""
        _look(self._pair)
        return self.view

    def _requests(self) -> np.ndarray:
        classes = self._state.classes
        requests = np.zeros(int((classes["waiting"] + classes["running"]).sum()), SEEN)
        _show_all(self._pair, requests)
        return requests
