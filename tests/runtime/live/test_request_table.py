"""Promises made in any order are booked when they fall due."""

from __future__ import annotations

import numpy as np
from toys import toy_engine

from flexirl.runtime.live.request_table import enter, leave
from flexirl.runtime.scheduler.commit import settle
from flexirl.runtime.scheduler.intake import cancel
from flexirl.runtime.scheduler.state import State, new_states
from flexirl.runtime.simulator import surrogate
from flexirl.workloads.trace import DEFERRED, IMMEDIATE, empty_rows

PLACES = 12


def test_losses_are_booked_when_they_happen() -> None:
    """Requests with any promise come, leave and give their places to others; none of them ever runs."""
    engine = toy_engine(max_model_len=32, kv_blocks=64)
    state = State(*(array[0] for array in new_states(1, engine, PLACES, 1)))
    surrogate.start(state, empty_rows(0), 0, 4.0)
    rng = np.random.default_rng(2)
    due_s: dict[int, float] = {}  # of the requests that are there
    broken = 0
    for step in range(3000):
        now_s = step * 0.01
        state.scheduler["now_s"] = now_s
        settle(state)
        for r, due in list(due_s.items()):
            if due < now_s:
                broken += 1
                due_s[r] = np.inf
        assert state.classes["lost"][IMMEDIATE] == broken
        r = int(rng.integers(PLACES))
        if r in due_s:
            if rng.random() < 0.3:
                cancel(state, r)
                leave(state, r)
                broken += due_s.pop(r) < np.inf or not state.requests["missed"][r]
        else:
            row = empty_rows(1)
            row["arrival_s"] = now_s
            row["ttft_slo_s"] = rng.choice([0.05, 0.5, 3.0])
            enter(state, r, row)
            due_s[r] = float(now_s + row["ttft_slo_s"][0])
        assert set(state.promises["request"][: state.scheduler["promised"][0]].tolist()) <= set(due_s)
    assert broken > 300


def test_only_immediate_requests_with_a_promise_are_listed() -> None:
    state = State(*(array[0] for array in new_states(1, toy_engine(), 3, 1)))
    surrogate.start(state, empty_rows(0), 0, 4.0)
    rows = empty_rows(3)
    rows["ttft_slo_s"] = [np.inf, 1.0, 1.0]
    rows["request_class"] = [IMMEDIATE, DEFERRED, IMMEDIATE]
    for r in range(3):
        enter(state, r, rows[r : r + 1])
    assert state.promises["request"][: state.scheduler["promised"][0]].tolist() == [2]
