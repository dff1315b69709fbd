"""The table of requests of an engine that runs on: places are used again, promises are made at any time.

The surrogate knows its whole trace at the start, so there a request's number is its row and `promises` is sorted once.
A live engine takes requests as they come; its promises are kept in order of due time as they are made.
"""

from __future__ import annotations

import numpy as np

from flexirl.compiled import compiled
from flexirl.runtime.scheduler.intake import fill_in, submit
from flexirl.runtime.scheduler.state import State
from flexirl.workloads.trace import IMMEDIATE


@compiled
def enter(state: State, r: int, rows: np.ndarray) -> None:
    """Takes the request in `rows` (`TRACE_ROW`, (1,)) into place r of the table, which is free, and submits it."""
    request = state.requests[r]
    fill_in(request, rows[0])
    if request.request_class == IMMEDIATE and request.ttft_deadline_s < np.inf:
        _promise(state, r)
    submit(state, r)


@compiled
def leave(state: State, r: int) -> None:
    """Forgets the promise to request r, which has ended, so that its place can be given to another."""
    scheduler = state.scheduler[0]
    for i in range(scheduler.promises_next, scheduler.promises_length):
        if state.promises[i] == r:
            for j in range(i, scheduler.promises_length - 1):
                state.promises[j] = state.promises[j + 1]
            scheduler.promises_length -= 1
            return


@compiled
def _promise(state: State, r: int) -> None:
    """Inserts request r by the time its first token is due: from the end, since most are due after all others."""
    scheduler, promises = state.scheduler[0], state.promises
    if scheduler.promises_length == len(promises):
        open_ = scheduler.promises_length - scheduler.promises_next
        for i in range(open_):
            promises[i] = promises[scheduler.promises_next + i]
        scheduler.promises_next = 0
        scheduler.promises_length = open_
    at = scheduler.promises_length
    due_s = state.requests[r].ttft_deadline_s
    while at > scheduler.promises_next and state.requests[promises[at - 1]].ttft_deadline_s > due_s:
        promises[at] = promises[at - 1]
        at -= 1
    promises[at] = r
    scheduler.promises_length += 1
