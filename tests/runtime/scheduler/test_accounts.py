"""The accounts of small runs, computed by hand, and the closed forms behind them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import TICK_S, ToyRun, deferred, immediate, toy_engine, toy_trace

from flexirl.policies.interface.decision import default_decision
from flexirl.policies.interface.view import View
from flexirl.runtime.scheduler.accounts import Prices, Snapshot, account, histogram_percentile, jain_fairness
from flexirl.runtime.scheduler.books import itl_bin
from flexirl.runtime.scheduler.state import ITL_BINS, REQUEST, itl_bin_edges
from flexirl.runtime.simulator.simulation import simulate, start
from flexirl.workloads.slo import SLO


def figures_of(run: ToyRun, before: Snapshot, since_s: float = 0.0) -> dict[str, float | int | None]:
    return account(run.state, before, since_s, Prices())


def test_every_figure_of_a_small_run() -> None:
    """Three iterations of 24, 21 and 18 ticks serve two requests; a third, too long for the engine, is rejected."""
    trace = toy_trace(
        immediate(0, 8, 3, ttft_slo_s=30 * TICK_S, tpot_slo_s=20 * TICK_S),
        deferred(5 * TICK_S, 4, 2, window_s=1.0),
        immediate(10 * TICK_S, 40, 3, ttft_slo_s=1.0),
    )
    run = ToyRun(toy_engine(), trace)
    before = Snapshot.of(run.state)
    run.advance(63 * TICK_S)
    figures = figures_of(run, before)
    span_s = 63 * TICK_S
    waited = np.array([24, 53]) * TICK_S  # the rejected one has waited for its first token to the end
    expected = {
        "value_per_s": ((8 + 4 * 3) + 0.5 * (4 + 4 * 2)) / span_s,
        "revenue_per_s": ((8 + 4 * 3) + 0.5 * (4 + 4 * 2)) / span_s,
        "immediate_attainment": 0.5,
        "given_up": 0.0,
        "immediate_cached": 0.0,
        "deferred_cached": 0.0,
        "deferred_below_p80": 0.0,  # as long as its limit, and nothing was known
        "evicted_blocks": 0,
        "immediate_goodput_tokens_per_s": 11 / span_s,
        "prompt_tokens_per_s": 12 / span_s,
        "output_tokens_per_s": 5 / span_s,
        "deferred_tokens_per_s": 6 / span_s,
        "deferred_on_time": 1.0,
        "ttft_mean_s": waited.mean(),
        "tpot_mean_s": 19.5 * TICK_S,
        "e2e_p99_s": np.percentile([63 * TICK_S, 53 * TICK_S], 99),
        "preemptions": 0,
        "recomputed_tokens": 0,
        "swapped_tokens": 0,
        "kv_utilisation": (24 * 2 + 21 * (3 + 1) + 18 * (3 + 2)) / (63 * 8),
        "step_time_mean_s": 21 * TICK_S,
        "iterations": 3,
        "simulated_s": span_s,
        "jain_fairness": 1.0,
    }
    for p in (50, 90, 95, 99):
        expected[f"ttft_p{p}_s"] = np.percentile(waited, p)
        expected[f"tpot_p{p}_s"] = 19.5 * TICK_S
    itl_p99_s = figures.pop("itl_p99_s")
    assert itl_p99_s is not None and abs(np.log10(itl_p99_s / (21 * TICK_S))) <= 1 / 32
    assert figures == pytest.approx(expected, rel=1e-12)


def test_a_span_is_a_difference() -> None:
    """What was done before the span is left out; a request that finishes in it pays wherever it arrived."""
    run = ToyRun(toy_engine(), toy_trace(immediate(0, 8, 3), immediate(40 * TICK_S, 4, 1), deferred(0, 4, 8)))
    run.advance(iterations=1)
    assert run.now_s == 28 * TICK_S
    before = Snapshot.of(run.state)
    run.drain()
    figures = figures_of(run, before, 28 * TICK_S)
    assert figures["iterations"] == 7
    assert figures["revenue_per_s"] == pytest.approx((20 + 8 + 0.5 * 36) / (run.now_s - 28 * TICK_S))
    assert figures["ttft_mean_s"] == pytest.approx((28 + 18 + 22 - 40) * TICK_S)  # of the one that arrived in the span
    assert figures["deferred_tokens_per_s"] == pytest.approx(7 / (run.now_s - 28 * TICK_S))


class Idle:
    """A policy that lets everybody wait."""

    name = "idle"
    every_iteration = False

    def reset(self, view: View) -> None:
        """Nothing to forget."""

    def decide(self, view: View) -> np.ndarray:
        """No tokens for anyone."""
        decision = default_decision()
        decision["token_budget"] = 0
        return decision


class Eager(Idle):
    """A policy that serves everybody."""

    name = "eager"

    def decide(self, view: View) -> np.ndarray:
        """The default."""
        return default_decision()


def test_letting_requests_wait_is_not_flattered() -> None:
    promise = {"ttft_slo_s": 0.5, "tpot_slo_s": 0.5}
    several = [immediate(0.1 * k, 8, 4, **promise) for k in range(20)] + [deferred(0.0, 8, 4, window_s=1.0)]
    trace = toy_trace(*several)
    idle, eager = (simulate(policy, toy_engine(), trace, SLO(0.5, 0.5), 2.0).figures for policy in (Idle(), Eager()))
    assert idle["revenue_per_s"] == 0.0 and idle["immediate_goodput_tokens_per_s"] == 0.0
    # Those that arrived before 1.5 s are lost by 2.0 s; the others are not decided yet. None was kept.
    assert idle["immediate_attainment"] == 0.0 and idle["deferred_on_time"] == 0.0
    assert idle["ttft_mean_s"] == pytest.approx(np.mean([2.0 - 0.1 * k for k in range(20)]))
    assert idle["ttft_p99_s"] == pytest.approx(np.percentile([2.0 - 0.1 * k for k in range(20)], 99))
    assert idle["e2e_p99_s"] == idle["ttft_p99_s"]
    assert idle["tpot_mean_s"] is None and idle["itl_p99_s"] is None and idle["step_time_mean_s"] is None
    assert eager["immediate_attainment"] == 1.0 and eager["deferred_on_time"] == 1.0


def test_half_served_requests_count_with_what_they_waited() -> None:
    """A first token and then nothing: the time since is a lower bound of the pace."""
    run = ToyRun(toy_engine(), toy_trace(immediate(0, 8, 9, tpot_slo_s=20 * TICK_S)))
    before = Snapshot.of(run.state)
    run.advance(iterations=1)
    run.decide(token_budget=0)
    run.advance(224 * TICK_S)
    figures = figures_of(run, before)
    assert figures["tpot_mean_s"] == pytest.approx(200 * TICK_S)
    assert figures["immediate_attainment"] == 0.0  # 8 tokens at 20 ticks were due 160 ticks after the first


def test_simulate_leaves_the_warm_up_out() -> None:
    trace = toy_trace(*(immediate(0.1 * k, 8, 4) for k in range(20)))
    run = simulate(Eager(), toy_engine(), trace, SLO(0.5, 0.5), 2.0, warmup_s=1.0)
    assert run.figures["simulated_s"] == pytest.approx(1.0, abs=0.05)
    assert run.figures["immediate_goodput_tokens_per_s"] == pytest.approx(10 * 12, rel=0.1)
    assert (np.diff(run.timeline["now_s"]) > 0).all() and len(run.timeline) == 11


def test_deferred_requests_have_no_first_token_promise() -> None:
    trace = toy_trace(deferred(0, 4, 2, ttft_slo_s=0.1), immediate(0, 4, 2, ttft_slo_s=0.2), immediate(0, 4, 2))
    state = start(toy_engine(), trace, 0)
    assert state.promises["request"][: state.scheduler["promised"][0]].tolist() == [1]


@given(st.lists(st.floats(1e-4, 100.0), min_size=1, max_size=200), st.sampled_from((50, 90, 99)))
def test_histogram_percentile_is_within_a_bin(values: list[float], percent: int) -> None:
    counts = np.bincount([itl_bin(value) for value in values], minlength=ITL_BINS)
    found = histogram_percentile(counts, percent)
    # The smallest value that `percent` of all do not exceed.
    exact = float(np.percentile(values, percent, method="inverted_cdf"))
    assert found is not None and abs(np.log10(found / exact)) <= 1 / 32 + 1e-9


def test_bins_are_where_their_edges_say() -> None:
    edges = itl_bin_edges()
    middles = np.sqrt(edges[1:] * edges[:-1])
    assert [itl_bin(float(middle)) for middle in middles] == list(range(ITL_BINS))
    assert itl_bin(0.0) == 0 and itl_bin(1e9) == ITL_BINS - 1
    assert histogram_percentile(np.zeros(ITL_BINS, int), 99) is None


@pytest.mark.parametrize(
    ("served", "index"),
    [((8, 8, 8, 8), 1.0), ((4, 4, 4, 4), 1.0), ((8, 0, 0, 0), 0.25), ((8, 4), 0.9), ((0, 0), 1.0), ((6, 6, 0), 2 / 3)],
)
def test_jain_index_in_closed_form(served: tuple[int, ...], index: float) -> None:
    requests = np.zeros(len(served), dtype=REQUEST)
    requests["tenant"] = range(len(served))
    requests["prompt_tokens"], requests["output_tokens"] = 8, 0
    requests["furthest"] = served
    # A tenant without requests has no share.
    assert jain_fairness(requests, len(served) + 2) == pytest.approx(index)


def test_jain_index_weighs_output_twice() -> None:
    requests = np.zeros(2, dtype=REQUEST)
    requests["tenant"], requests["prompt_tokens"], requests["output_tokens"] = (0, 1), 10, 5
    requests["furthest"], requests["generated"] = (10, 10), (5, 0)  # 20 of 20 against 10 of 20
    assert jain_fairness(requests, 2) == pytest.approx(0.9)


def test_prices() -> None:
    rows = toy_trace(immediate(0, 10, 3), deferred(0, 10, 3)).rows
    assert Prices().of(rows).tolist() == [22.0, 11.0]
    assert Prices(prompt=2.0, output=1.0, deferred=0.1).of(rows).tolist() == pytest.approx([23.0, 2.3])
