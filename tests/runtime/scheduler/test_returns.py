"""What is learned about returns, held against plain counting, and an engine that learns whom to keep."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import ToyRun, immediate, toy_engine, toy_trace

from flexirl.runtime.scheduler.invariants import check_invariants
from flexirl.runtime.scheduler.returns import (
    LEAN,
    age_bin,
    note_given_up,
    note_left,
    note_miss,
    note_return,
    rank,
    worth_keeping,
)
from flexirl.runtime.scheduler.state import AGE_BINS, FINISHED, KINDS, RUNNING, State, new_states
from flexirl.workloads.trace import CONTENT

BEGINS_S = [0.25 * 2 ** (b / 2) for b in range(AGE_BINS + 1)]


def empty_state() -> State:
    state = State(*(array[0] for array in new_states(1, toy_engine(prefix_caching=1), 4, 1)))
    state.scheduler["ranked_s"] = -np.inf
    state.requests["status"] = FINISHED
    return state


def test_ages_are_counted_where_they_belong() -> None:
    assert age_bin(0.0) == 0 and age_bin(1e9) == AGE_BINS - 1
    for b in range(1, AGE_BINS):
        assert age_bin(BEGINS_S[b] * 1.001) == b and age_bin(BEGINS_S[b] * 0.999) == b - 1


def gittins(left: float, after: list[float], all_left: float, all_after: list[float], b: int) -> float:
    """The most returns per second of waiting, over all times to stop waiting, from bin b on."""
    waiting = [left + LEAN]
    for own, others in zip(after, all_after, strict=True):
        waiting.append(max(waiting[-1] - own - LEAN * others / max(all_left, 1), 0.05 * waiting[0]))
    rates = []
    for stop in range(b + 1, AGE_BINS + 1):
        seconds = [(waiting[i] + waiting[i + 1]) / 2 * (BEGINS_S[i + 1] - BEGINS_S[i]) for i in range(b, stop)]
        rates.append((waiting[b] - waiting[stop]) / sum(seconds))
    return max(rates)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 3), st.one_of(st.none(), st.floats(0.0, 2000.0))), max_size=60))
def test_the_index_is_that_of_plain_counting(events: list[tuple[int, float | None]]) -> None:
    """Events: a kind, and after how many seconds what was left was asked for again, if it was."""
    state = empty_state()
    left, after = np.zeros(KINDS), np.zeros((KINDS, AGE_BINS))
    for kind, age_s in events:
        note_left(state, 0, kind)
        left[kind] += 1
        if age_s is not None:
            note_return(state, kind, age_s)
            after[kind, np.searchsorted(BEGINS_S[1:-1], age_s, side="right")] += 1
    rank(state)
    for kind in range(4):
        for b in range(AGE_BINS):
            expected = gittins(left[kind], after[kind].tolist(), left.sum(), after.sum(axis=0).tolist(), b)
            found = worth_keeping(state, kind, -1.001 * BEGINS_S[b])
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_a_preempted_request_has_not_left() -> None:
    state = empty_state()
    state.requests["status"][1] = RUNNING
    note_left(state, 1, 3)
    assert state.returns["left"][3] == 0


def test_what_was_given_up_proves_itself_once() -> None:
    state = empty_state()
    note_given_up(state, np.uint64(77), 5, 1.0)
    state.scheduler["now_s"] = 9.0
    assert not note_miss(state, np.uint64(78))
    assert note_miss(state, np.uint64(77)) and not note_miss(state, np.uint64(77))
    assert state.returns["after"][5].sum() == 1 and state.returns["after"][5][age_bin(8.0)] == 1


@pytest.mark.parametrize(("by_return", "hits"), [(0, 0), (1, 8)])
def test_who_comes_back_is_kept_and_who_does_not_is_not(by_return: int, hits: int) -> None:
    """Conversations under one system prompt come back after 10 s, requests under another never, and room is for one.

    In each of twelve rounds two that never come back stand between a conversation's first turn and its second.
    """
    contents, requests = [], []
    for i in range(12):
        for system, own, at_s in ((1, 3 * i, 0.0), (2, 3 * i + 1, 3.0), (2, 3 * i + 2, 6.0), (1, 3 * i, 10.0)):
            requests.append(immediate(20.0 * i + at_s, 14, 1, content_first=len(contents), content_count=2))
            contents += [(system, 4), (1_000 + own, 12)]
    engine = toy_engine(prefix_caching=1)
    trace = replace(toy_trace(*requests), contents=np.array(contents, CONTENT))
    run = ToyRun(engine, trace, by_return=by_return)
    run.drain()
    check_invariants(run.state)
    second = [r for r in range(len(requests)) if requests[r]["arrival_s"] % 20 == 10]
    whole = sum(run["finish_s"][r] - run["arrival_s"][r] < 20 / 1024 for r in second)
    assert (whole >= hits) if hits else whole == 0
