"""A whole run on the live engine: the same accounts as on the surrogate, and an executor that can be used again."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from live_toys import ToyExecutor
from toys import deferred, immediate, toy_engine, toy_trace

from flexirl.errors import UserError
from flexirl.policies.registry import make_policy
from flexirl.runtime.live.run import run_live
from flexirl.runtime.scheduler.accounts import Prices
from flexirl.runtime.scheduler.state import CANCELLED, FINISHED
from flexirl.runtime.simulator.simulation import Run, simulate
from flexirl.workloads.slo import SLO
from flexirl.workloads.trace import Trace

PROMISE = {"ttft_slo_s": 100.0, "tpot_slo_s": 10.0}
TRACE = toy_trace(
    *(immediate(0.001 * i, 6, 5, **PROMISE) for i in range(5)), *(deferred(0.0, 8, 7) for _ in range(4)),
    immediate(5.0, 4, 3, **PROMISE),
)  # fmt: skip


def run(executor: ToyExecutor, trace: Trace, duration_s: float) -> Run:
    policy = make_policy("qoserve")
    return run_live(policy, executor, trace, SLO(100.0, 10.0), duration_s, 0.0, 0.2, 0, Prices())


def test_a_live_run_keeps_the_same_accounts_as_the_surrogate() -> None:
    """Nothing is late on either, so all but the times must agree."""
    executor = ToyExecutor(toy_engine())
    live = run(executor, TRACE, 60.0)
    surrogate = simulate(make_policy("qoserve"), toy_engine(), TRACE, SLO(100.0, 10.0), 60.0)
    for figure in ("immediate_attainment", "jain_fairness"):
        assert live.figures[figure] == surrogate.figures[figure] == 1.0
    # Both ran to the 60th second, or to the end of the iteration that passed it.
    for figure in ("revenue_per_s", "immediate_goodput_tokens_per_s", "deferred_tokens_per_s"):
        assert live.figures[figure] == pytest.approx(surrogate.figures[figure], rel=0.01)
    assert set(live.figures) == set(surrogate.figures)
    assert (live.state.requests["status"] == FINISHED).all() and (np.diff(live.timeline["now_s"]) > 0).all()


def test_what_still_runs_at_the_end_leaves_nothing_behind() -> None:
    executor = ToyExecutor(toy_engine())
    endless = toy_trace(*(deferred(0.0, 8, 24) for _ in range(40)))
    short = run(executor, endless, 1e-3)
    assert not np.isin(short.state.requests["status"], (CANCELLED,)).any(), "the accounts are taken before"
    again = run(executor, TRACE, 60.0)
    assert (again.state.requests["status"] == FINISHED).all()


def test_the_engine_is_imported_without_the_models_library() -> None:
    """It takes seconds to import, and nobody who only mistyped an option has to wait for it."""
    code = "import flexirl.programs.generate, flexirl.runtime.live.engine, sys; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_requests_that_cannot_fit_are_refused_before_the_run() -> None:
    with pytest.raises(UserError, match="1 of 2 requests of toy are longer than the 32 tokens"):
        run(ToyExecutor(toy_engine()), toy_trace(deferred(0.0, 8, 4), deferred(0.0, 30, 4)), 1.0)
