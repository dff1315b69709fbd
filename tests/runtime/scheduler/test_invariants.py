"""The scheduler's guarantees hold after every step whatever is decided, and the checker notices when one does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scheduler_reference import decisions, engines, traces
from toys import ToyRun, deferred, immediate, toy_engine, toy_trace

from flexirl.policies.interface.decision import ONE_QUEUE, RECOMPUTE, SWAP
from flexirl.policies.interface.view import NONE
from flexirl.runtime.profile.engine import EngineProfile
from flexirl.runtime.scheduler.intake import cancel
from flexirl.runtime.scheduler.invariants import cache_nodes, check_invariants
from flexirl.runtime.scheduler.state import (
    CANCELLED,
    FUTURE,
    RUNNING,
    WAITING,
    State,
)
from flexirl.workloads.trace import CONTENT, DEFERRED, Trace

# Puts any decision in force for some iterations, then cancels any of the requests.
steps = st.lists(
    st.tuples(decisions(), st.integers(1, 6), st.one_of(st.none(), st.integers(0, 9))), min_size=1, max_size=8
)


@settings(deadline=None, max_examples=150)
@given(engines(), traces(), steps, st.booleans())
def test_invariants_hold_after_every_step(
    engine: EngineProfile, trace: Trace, steps: list[tuple[dict[str, float], int, int | None]], noisy: bool
) -> None:
    run = ToyRun(engine.replace(noise=0.2 if noisy else 0.0), trace, seed=3)
    check_invariants(run.state)
    for changes, iterations, cancelled in steps:
        for _ in range(iterations):
            before = run.now_s, run["status"]
            run.decide(**changes)
            run.advance(run.now_s + 0.1, 1)
            check_invariants(run.state)
            batch = run.state.batch[0]
            budget = min(int(changes["token_budget"]), int(engine.values["max_tokens_per_step"]))
            assert batch["prefill_tokens"] + batch["decode_sequences"] <= budget
            assert run.now_s > before[0]
            for was, status in zip(before[1], run["status"], strict=True):
                assert status == was or was in (FUTURE, WAITING, RUNNING), "an ended request came back"
        if cancelled is not None and cancelled < len(trace):
            was = run["status"][cancelled]
            cancel(run.state, cancelled)
            check_invariants(run.state)
            assert run["status"][cancelled] == (CANCELLED if was in (WAITING, RUNNING) else was)


def busy_state() -> State:
    """Requests running, waiting for the first time and waiting after preemption, swapped out and not."""
    engine = toy_engine(kv_blocks=16, host_kv_blocks=4, prefix_caching=1)
    several = [*(deferred(0, 8, 16) for _ in range(4)), *(immediate(0, 4, 16) for _ in range(5))]
    trace = toy_trace(*several)
    trace.rows["content_count"] = trace.rows["request_class"] == DEFERRED  # they share an instruction
    run = ToyRun(engine, replace(trace, contents=np.array([(5, 4)], CONTENT)), discipline=ONE_QUEUE)
    run.advance(iterations=2)
    for preemption in (RECOMPUTE, SWAP):
        run.decide(discipline=ONE_QUEUE, preempt_count=1, preemption=preemption)
        run.advance(iterations=1)
    assert run.state.scheduler["running"][0] >= 2 and run.state.classes["waiting"].min() >= 2
    assert run.state.classes["idle_blocks"].sum() > 0 and run.state.requests["host_blocks"].any()
    return run.state


def running(state: State) -> int:
    """The first running request."""
    return int(state.running[0])


def shared_node(state: State) -> int:
    """A node that a running request uses."""
    return int(state.requests["node"][state.running[:2]].max())


def heap_with_child(state: State) -> tuple[int, int]:
    """A waiting request and one below it in its heap."""
    for r in np.flatnonzero(state.requests["status"] == WAITING):
        for child in (state.requests["left"][r], state.requests["right"][r]):
            if child != NONE:
                return int(r), int(child)
    raise AssertionError("no heap is deep enough")


def add(array: np.ndarray, field: str, at: int, amount: int) -> None:
    """Changes one figure."""
    array[field][at] += amount


def leak(state: State) -> None:
    """Loses an empty block."""
    for name in ("free_blocks", "empty_blocks"):
        add(state.scheduler, name, 0, -1)


CORRUPTIONS: dict[str, tuple[Callable[[State], object], str]] = {
    "free blocks": (lambda s: add(s.scheduler, "free_blocks", 0, -1), "miscounted free blocks"),
    "leaked block": (lambda s: leak(s), "leaked blocks"),
    "leaked host block": (lambda s: add(s.scheduler, "host_free_blocks", 0, -1), "leaked host blocks"),
    "block given twice": (lambda s: add(s.requests, "kv_blocks", running(s), 1), "miscounted blocks"),
    "idle blocks": (lambda s: add(s.classes, "idle_blocks", DEFERRED, 1), "miscounted idle blocks"),
    "users": (lambda s: add(s.nodes, "users", cache_nodes(s)[0], 1), "miscounted users"),
    "children": (lambda s: add(s.nodes, "children", cache_nodes(s)[0], 1), "miscounted children"),
    "forgotten node": (lambda s: s.buckets.__setitem__(slice(None), NONE), "nobody can find"),
    "foreign content": (lambda s: s.nodes["origin"].__setitem__(shared_node(s), 7), "says something else"),
    "out of order": (lambda s: s.nodes["age"].__setitem__(cache_nodes(s), range(len(cache_nodes(s)))), "order"),
    "waiting count": (lambda s: add(s.classes, "waiting", DEFERRED, 1), "miscounted waiting requests"),
    "waiting tokens": (lambda s: add(s.classes, "waiting_tokens", DEFERRED, 1), "miscounted waiting tokens"),
    "running count": (lambda s: add(s.classes, "running", DEFERRED, 1), "miscounted running requests"),
    "arrivals": (lambda s: add(s.classes, "arrived", DEFERRED, 1), "a request was lost"),
    "status": (lambda s: add(s.requests, "status", running(s), 1), "running list and status disagree"),
    "listed twice": (lambda s: s.running.__setitem__(1, s.running[0]), "twice"),
    "seats": (lambda s: s.engine["max_running"].__setitem__(0, 1), "more running requests than seats"),
    "heap order": (lambda s: s.requests["key"].__setitem__(heap_with_child(s)[1], -1e9), "queue out of order"),
    "parent link": (lambda s: s.requests["parent"].__setitem__(heap_with_child(s)[1], 0), "broken parent link"),
    "lost from its queue": (lambda s: s.lanes.__setitem__((DEFERRED, 0), NONE), "queues and status disagree"),
    "wrong queue": (lambda s: s.lanes.__setitem__(slice(None), s.lanes[::-1].copy()), "the other class's queue"),
    "computed too much": (lambda s: add(s.requests, "computed", running(s), 9), "blocks do not match tokens"),
    "overrun": (lambda s: s.requests["output_tokens"].__setitem__(running(s), 0), "after its last token"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_checker_notices(name: str) -> None:
    state = busy_state()
    check_invariants(state)
    corrupt, message = CORRUPTIONS[name]
    corrupt(state)
    with pytest.raises(AssertionError, match=message):
        check_invariants(state)
