"""The waiting queues against a sorted list, for any sequence of pushes, removals and changes of order."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import TICK_S, ToyRun, immediate, toy_engine, toy_trace

from flexirl.policies.interface.decision import (
    ARRIVAL,
    DEADLINE,
    FAIR,
    SCORE,
    SHORTEST,
)
from flexirl.policies.interface.view import NONE
from flexirl.runtime.scheduler.intake import submit
from flexirl.runtime.scheduler.invariants import check_invariants
from flexirl.runtime.scheduler.queues import first_waiting, head, merged_head, push, remove, reorder, rescore
from flexirl.runtime.scheduler.state import CANCELLED, WAITING, State, new_states
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

ORDERS = (ARRIVAL, DEADLINE, SHORTEST, FAIR, SCORE)
WEIGHT_S, EXPECTED = 0.5, 6.0


def queued_state(count: int, rng: np.random.Generator) -> State:
    """An engine with `count` requests of both classes and three tenants submitted, with many ties."""
    states = new_states(1, toy_engine(kv_blocks=10_000, max_model_len=40_000), count, 3)
    state = State(*(array[0] for array in states))
    state.lanes[:] = NONE
    requests = state.requests
    requests["arrival_s"] = np.sort(rng.integers(0, count, count)) / 2
    requests["ttft_deadline_s"] = np.where(rng.random(count) < 0.2, math.inf, requests["arrival_s"] + 3)
    requests["deadline_s"] = np.where(rng.random(count) < 0.2, math.inf, requests["arrival_s"] + 9)
    requests["request_class"] = rng.integers(0, 2, count)
    requests["tenant"] = rng.integers(0, 3, count)
    requests["prompt_tokens"] = rng.integers(1, 20, count)
    requests["output_tokens"] = requests["max_tokens"] = 4
    for r in range(count):
        submit(state, r)
    state.tenants["service"] = rng.permutation(3)
    return state


def sorted_queue(state: State, request_class: int) -> list[int]:
    """What the queue of a class should be, by sorting; FAIR: the tenants in turn, as long as none is served."""
    order = state.classes["order"][request_class]

    def place(r: int) -> tuple[bool, float, float, int]:
        request = state.requests[r]
        due_s = request["deadline_s"] if request_class == DEFERRED else request["ttft_deadline_s"]
        due_s = min(due_s, 1e9)  # what is due at no time: at one common time
        further = EXPECTED if request_class == DEFERRED else 0.0
        key = {
            ARRIVAL: request["arrival_s"],
            FAIR: request["arrival_s"],
            DEADLINE: due_s + WEIGHT_S * (request["prompt_tokens"] + further),
            SHORTEST: request["prompt_tokens"],
            SCORE: -request["score"],
        }[int(order)]
        service = state.tenants["service"][request["tenant"]] if order == FAIR else 0.0
        return bool(request["relegated"]), float(service), float(key), r

    mine = (state.requests["status"] == WAITING) & (state.requests["request_class"] == request_class)
    return sorted(np.flatnonzero(mine).tolist(), key=place)


def take_out(state: State, r: int) -> None:
    """Removes a request for good."""
    remove(state, r)
    state.requests["status"][r] = CANCELLED
    state.classes["ended_otherwise"][state.requests["request_class"][r]] += 1


operations = st.lists(
    st.tuples(st.sampled_from(("remove", "return", "reorder", "relegate", "rescore")), st.integers(0, 10**6)),
    max_size=60,
)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 40), st.integers(0, 10**6), operations)
def test_queue_is_a_sorted_list(count: int, seed: int, operations: list[tuple[str, int]]) -> None:
    rng = np.random.default_rng(seed)
    state = queued_state(count, rng)
    # The toy engine has few blocks to hold, and the checker wants to see them all.
    state.scheduler["free_blocks"] = state.scheduler["empty_blocks"] = state.engine["kv_blocks"]
    for operation, draw in operations:
        r = draw % count
        waiting = state.requests["status"][r] == WAITING
        if operation == "remove" and waiting:
            take_out(state, r)
        elif operation == "return" and not waiting:
            push(state, r)
            state.classes["ended_otherwise"][state.requests["request_class"][r]] -= 1
        elif operation == "reorder":
            reorder(state, draw % 2, ORDERS[draw // 2 % len(ORDERS)], WEIGHT_S, EXPECTED, 0.0)
        elif operation == "relegate" and waiting and state.requests["request_class"][r] == IMMEDIATE:
            remove(state, r)
            state.requests["relegated"][r] = 1
            push(state, r)
        elif operation == "rescore":
            rescore(state, r, float(draw % 4))
        check_invariants(state)
        for request_class in (IMMEDIATE, DEFERRED):
            expected = sorted_queue(state, request_class)
            assert head(state, request_class) == (expected[0] if expected else NONE)
            if state.classes["order"][request_class] != FAIR:
                found = np.zeros(5, np.int32)
                number = first_waiting(state, request_class, found)
                assert found[:number].tolist() == expected[:5]


@pytest.mark.parametrize("order", ORDERS)
def test_popping_yields_the_order(order: int) -> None:
    state = queued_state(300, np.random.default_rng(1))
    for request_class in (IMMEDIATE, DEFERRED):
        reorder(state, request_class, order, WEIGHT_S, EXPECTED, 0.0)
        expected = sorted_queue(state, request_class)
        popped = []
        while (r := head(state, request_class)) != NONE:
            popped.append(r)
            take_out(state, r)
        assert popped == expected


def test_one_queue_of_both_classes() -> None:
    state = queued_state(200, np.random.default_rng(2))
    for request_class in (IMMEDIATE, DEFERRED):
        reorder(state, request_class, SHORTEST, WEIGHT_S, EXPECTED, 0.0)
    lengths = []
    while (r := merged_head(state)) != NONE:
        lengths.append((int(state.requests["prompt_tokens"][r]), r))
        take_out(state, r)
    assert len(lengths) == 200 and lengths == sorted(lengths)


def right_spine(state: State, root: int) -> int:
    """Requests on the right spine of a heap: what melding it walks over."""
    length = 0
    while root != NONE:
        length += 1
        root = int(state.requests["right"][root])
    return length


def test_work_per_operation_grows_with_the_logarithm() -> None:
    """100,000 waiting requests: serving the head and queueing it again, 2,000 times, melds over short spines."""
    count, rounds = 100_000, 2_000
    state = queued_state(count, np.random.default_rng(3))
    reorder(state, IMMEDIATE, SHORTEST, 0.0, 0.0, 0.0)
    walked = 0
    for _ in range(rounds):
        r = head(state, IMMEDIATE)
        left, right = (int(state.requests[name][r]) for name in ("left", "right"))
        walked += right_spine(state, left) + right_spine(state, right)
        remove(state, r)
        state.requests["prompt_tokens"][r] = 19
        walked += right_spine(state, int(state.lanes[IMMEDIATE, 0]))
        push(state, r)
    # Amortised bound of Sleator and Tarjan: 3 log2(n) for each meld, and here two melds a round.
    assert walked / rounds <= 2 * 3 * math.log2(count)


def test_relegated_requests_stand_behind_those_without_a_promise() -> None:
    state = queued_state(50, np.random.default_rng(4))
    reorder(state, IMMEDIATE, DEADLINE, TICK_S, 0.0, 0.0)
    mine = np.flatnonzero(state.requests["request_class"] == IMMEDIATE)
    promised = mine[np.isfinite(state.requests["ttft_deadline_s"][mine])]
    for r in promised:
        remove(state, int(r))
        state.requests["relegated"][r] = 1
        push(state, int(r))
    unpromised = set(mine.tolist()) - set(promised.tolist())
    assert unpromised
    served = []
    while (r := head(state, IMMEDIATE)) != NONE:
        served.append(int(r))
        take_out(state, int(r))
    assert set(served[: len(unpromised)]) == unpromised


def test_queue_length_does_not_change_an_iteration() -> None:
    """The same batch is planned with 10 and with 10,000 requests behind it, in as many iterations."""

    def run(waiting: int) -> ToyRun:
        behind = [immediate(0.0, 4, 8) for _ in range(waiting)]
        short = ToyRun(toy_engine(), toy_trace(*behind))
        short.advance(iterations=16)  # the first eight, four at a time
        return short

    few, many = run(10), run(10_000)
    assert few.now_s == many.now_s
    assert many["generated"][:10] == few["generated"]
