"""The table of requests of an engine that runs on: places are used again.

The surrogate knows its whole trace at the start, so there a request's number is its row. A live engine takes requests
as they come.
"""

from __future__ import annotations

import numpy as np

from flexirl.compiled import compiled
from flexirl.runtime.scheduler.events import drop_event
from flexirl.runtime.scheduler.intake import fill_in, submit
from flexirl.runtime.scheduler.state import State


@compiled
def enter(state: State, r: int, rows: np.ndarray) -> None:
    """Takes the request in `rows` (`TRACE_ROW`, (1,)) into place r of the table, which is free, and submits it."""
    fill_in(state.requests[r], rows[0], rows[0].arrival_s)
    submit(state, r)


@compiled
def leave(state: State, r: int) -> None:
    """Forgets the promise to request r, which has ended, so that its place can be given to another."""
    scheduler = state.scheduler[0]
    scheduler.promised = drop_event(state.promises, scheduler.promised, r)
