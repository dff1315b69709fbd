"""A late answer is worth less the later it is: booked as it happens, and computed from the requests at the end."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scheduler_reference import decisions, engines, traces
from toys import TICK_S, ToyRun, deferred, immediate, toy_engine, toy_trace

from flexirl.runtime.profile.engine import EngineProfile
from flexirl.runtime.scheduler.accounts import Prices, Snapshot, account, gave_up_in, worth
from flexirl.runtime.scheduler.state import FINISHED, FUTURE, RUNNING, WAITING
from flexirl.workloads.trace import IMMEDIATE, Trace

PATIENCE = 4.0


def value_of(promised: float, had: float) -> float:
    """Full until the promise, nothing from four times as much, a line between."""
    return float(np.interp(had, [promised, 4 * promised], [1.0, 0.0]))


# A prompt of 4 tokens takes 20 ticks alone, each further token 17.
@pytest.mark.parametrize("ttft", [5, 8, 10, 19, 20, 40])
def test_first_token_late(ttft: int) -> None:
    run = ToyRun(toy_engine(), toy_trace(immediate(0, 4, 2, ttft_slo_s=ttft * TICK_S)))
    run.drain()
    expected = value_of(ttft, 20)
    assert 1.0 - run["forgone"][0] == pytest.approx(expected)
    assert worth(run.state.requests, PATIENCE)[0] == pytest.approx(expected)
    immediates = run.state.classes[IMMEDIATE]
    assert (immediates["forgone_prompt"], immediates["forgone_output"]) == pytest.approx(
        (4 * (1 - expected), 2 * (1 - expected))
    )
    assert immediates["given_up"] == 0  # four times as much is still in time


@pytest.mark.parametrize("output", [1, 2])
def test_who_gets_all_after_patience_has_given_up(output: int) -> None:
    """Its first token comes 20 ticks after it arrived, patience ended after 16; that it is the last changes nothing."""
    run = ToyRun(toy_engine(), toy_trace(immediate(0, 4, output, ttft_slo_s=4 * TICK_S)))
    run.drain()
    assert run.state.classes[IMMEDIATE]["given_up"] == 1


@pytest.mark.parametrize("pace", [3, 6, 10, 17, 18])
def test_last_token_late(pace: int) -> None:
    run = ToyRun(toy_engine(), toy_trace(immediate(0, 4, 11, tpot_slo_s=pace * TICK_S)))
    run.drain()
    assert 1.0 - run["forgone"][0] == pytest.approx(value_of(20 + 10 * pace, 20 + 170), abs=1e-6)


def test_who_waits_beyond_patience_has_given_up() -> None:
    """The second waits for the first one's 20 + 24 * 17 ticks; it is served all the same, for nothing."""
    trace = toy_trace(
        immediate(0, 4, 25), immediate(TICK_S, 4, 3, ttft_slo_s=50 * TICK_S), deferred(0, 4, 1, ttft_slo_s=TICK_S)
    )
    run = ToyRun(toy_engine(max_running=1), trace)
    before = Snapshot.of(run.state)
    run.drain()
    group = run.state.classes[IMMEDIATE]
    assert (group["given_up"], group["given_up_prompt"], group["given_up_output"]) == (1, 4, 3)
    assert (group["forgone_prompt"], group["forgone_output"]) == (4, 3)
    figures = account(run.state, before, 0.0, Prices(deferred=0.5, given_up=0.25))
    paid = (4 + 25 * 4) - 0.25 * (4 + 3 * 4) + 0.5 * (4 + 4)
    assert figures["value_per_s"] == pytest.approx(paid / run.now_s)
    assert figures["given_up"] == 0.5


@settings(deadline=None, max_examples=100)
@given(engines(), traces(), st.lists(st.tuples(decisions(), st.integers(1, 12)), min_size=1, max_size=5))
def test_what_is_booked_is_what_the_requests_say(
    engine: EngineProfile, trace: Trace, steps: list[tuple[dict[str, float], int]]
) -> None:
    trace.rows["ttft_slo_s"][::2] = 40 * TICK_S
    run = ToyRun(engine, trace)
    for changes, iterations in steps:
        run.decide(**changes)
        run.advance(run.now_s + 0.5, iterations)
    requests, group = run.state.requests[: len(trace)], run.state.classes[IMMEDIATE]
    mine = requests[(requests["request_class"] == IMMEDIATE) & (requests["status"] != FUTURE)]
    gave_up = gave_up_in(mine, PATIENCE, 0.0, run.now_s)
    assert group["given_up_prompt"] == mine["prompt_tokens"][gave_up].sum()
    lost = 1.0 - worth(mine, PATIENCE)
    # Of those who go on, what their first token cost them; nothing is left of those who gave up or ended otherwise.
    on = np.isin(mine["status"], (WAITING, RUNNING))
    promised_s = mine["ttft_deadline_s"] - mine["arrival_s"]
    with np.errstate(invalid="ignore"):
        ratio = np.where(np.isfinite(promised_s), (mine["first_token_s"] - mine["arrival_s"]) / promised_s, 0.0)
    first = np.where(np.isfinite(mine["first_token_s"]), np.clip((ratio - 1) / 3, 0, 1), 0.0)
    lost = np.where(on, np.nan_to_num(first), np.where(mine["status"] == FINISHED, lost, 1.0))
    lost[gave_up] = 1.0
    assert group["forgone_prompt"] == pytest.approx((lost * mine["prompt_tokens"]).sum(), rel=1e-5, abs=1e-5)
    assert mine["forgone"] == pytest.approx(lost, rel=1e-5, abs=1e-5)
