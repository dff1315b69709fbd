"""The view: it tells what is so, it tells no output length, nobody can write to it, and any engine can fill one."""

from __future__ import annotations

import numpy as np
import pytest
from toys import ToyRun, decision_with, deferred, immediate, toy_engine, toy_trace

from flexirl.policies.interface.view import (
    GROUP,
    SEEN,
    View,
    ViewArrays,
    idle_arrays,
    tally_running,
)
from flexirl.policies.registry import PRETRAINED, make_policy
from flexirl.policies.rules import rule_names
from flexirl.runtime.profile.engine import load_profile
from flexirl.runtime.scheduler.looking import Lookout
from flexirl.runtime.scheduler.state import FINISHED, RUNNING, WAITING
from flexirl.workloads.slo import SLO
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

PROMISE = SLO(1.0, 0.05)


def contended() -> ToyRun:
    """Six requests on an engine with seats for four."""
    requests = [
        immediate(0.0, 4, 6),
        deferred(0.0, 4, 9, window_s=50.0),
        deferred(0.0, 5, 3),
        immediate(0.0, 3, 2),
        deferred(0.0, 4, 4),
    ]
    return ToyRun(toy_engine(kv_blocks=16, max_running=3), toy_trace(*requests, deferred(0.0, 6, 5, window_s=9.0)))


def test_groups_agree_with_the_request_table() -> None:
    run = contended()
    lookout = Lookout(run.state, PROMISE)
    for _ in range(20):
        view, requests = lookout.look(), run.state.requests
        for c in (IMMEDIATE, DEFERRED):
            group, mine = view.group(c), requests[requests["request_class"] == c]
            waiting, running = mine[mine["status"] == WAITING], mine[mine["status"] == RUNNING]
            finished = mine[mine["status"] == FINISHED]["generated"]
            assert group["waiting"] == len(waiting) and group["running"] == len(running)
            assert group["windowed"] == np.isfinite(waiting["deadline_s"]).sum()
            assert group["finished_output"] == finished.sum()
            assert group["finished_output_squares"] == (finished**2).sum()
            assert bool(group["head"]) == (len(waiting) > 0)
            if len(waiting):
                assert group["head_key"] == waiting["key"].min()
        run.advance(iterations=1)


def test_requests_are_those_that_wait_or_run() -> None:
    run = contended()
    run.advance(iterations=3)
    seen = Lookout(run.state, PROMISE).view.requests()
    requests = run.state.requests
    live = np.flatnonzero(np.isin(requests["status"], (WAITING, RUNNING)))
    assert seen.dtype == SEEN and seen["request"].tolist() == live.tolist()
    for name in ("generated", "computed", "kv_blocks", "max_tokens", "request_class"):
        assert seen[name].tolist() == requests[name][live].tolist()
    assert seen["running"].tolist() == (requests["status"][live] == RUNNING).tolist()


def test_nothing_in_a_view_follows_from_the_output_to_come() -> None:
    """Two traces that differ in what their requests will say look the same until it is said."""
    views = []
    for outputs in ((20, 20, 20), (11, 17, 28)):
        rows = [immediate(0.0, 4, outputs[0]), deferred(0.0, 4, outputs[1]), immediate(0.0, 4, outputs[2])]
        trace = toy_trace(*({**row, "max_tokens": 28, "ttft_slo_s": 9.0, "tpot_slo_s": 9.0} for row in rows))
        run = ToyRun(toy_engine(kv_blocks=64, max_model_len=64), trace)
        lookout = Lookout(run.state, PROMISE)
        run.advance(iterations=8)
        view = lookout.look()
        views.append([array.tobytes() for array in view.arrays] + [view.requests().tobytes()])
    assert views[0] == views[1]
    assert "output_tokens" not in (SEEN.names or ()) + (GROUP.names or ())


def test_a_view_cannot_be_written_to() -> None:
    run = contended()
    view = Lookout(run.state, PROMISE).view
    assert not hasattr(view, "state")
    for array in view.arrays:
        with pytest.raises(ValueError, match="read-only"):
            array[...] = array
    view.requests()["generated"] = 99  # a copy
    assert run.state.requests["generated"].max() < 99


class OtherEngine:
    """An engine of another kind: a list of its requests is all it has, and all it fills a view from."""

    def __init__(self, running: np.ndarray) -> None:
        self.running = running
        self.arrays: ViewArrays = idle_arrays(load_profile("h100-llama-3.1-8b").values, PROMISE)
        self.view = View(self.arrays, PROMISE, self.running.copy)

    def look(self, now_s: float) -> View:
        """Tells what it can."""
        self.arrays.now["now_s"] = now_s
        for c in (IMMEDIATE, DEFERRED):
            mine = self.running[self.running["request_class"] == c]
            self.arrays.groups["running"][c] = len(mine)
            self.arrays.groups["kv_blocks"][c] = mine["kv_blocks"].sum()
        numbers = np.arange(len(self.running), dtype=np.int32)
        tally_running(self.running, numbers, len(self.running), now_s, self.arrays.groups)
        return self.view


@pytest.mark.parametrize("name", [*rule_names(), PRETRAINED])
def test_every_policy_decides_for_an_engine_of_another_kind(name: str) -> None:
    running = np.zeros(3, SEEN)
    running["request"], running["running"] = range(3), 1
    running["request_class"] = [IMMEDIATE, DEFERRED, DEFERRED]
    running["prompt_tokens"], running["computed"], running["max_tokens"] = 100, [109, 104, 60], 50
    running["generated"] = [10, 5, 0]
    running["tpot_slo_s"], running["first_token_s"], running["due_s"] = 0.05, 1.0, np.inf
    engine = OtherEngine(running)
    policy = make_policy(name, {"latency_budget_s": 0.03} if name == "hygen" else None)
    policy.reset(engine.view)
    for now_s in (1.2, 1.4, 2.0):
        decision = policy.decide(engine.look(now_s))
        assert decision.shape == () and decision.dtype == decision_with().dtype
        assert decision["token_budget"] >= 1 and np.isfinite(decision["relegate"])
    assert getattr(policy, "failures", {}) == {}
    groups = engine.arrays.groups
    assert groups["decodes"].tolist() == [1, 1] and groups["unprefilled"].tolist() == [0, 40]
    assert groups["ahead_min"][IMMEDIATE] == pytest.approx(10 - (2.0 - 1.0) / 0.05)
