"""Nobody ends the engine for the others: no callback, no policy, nothing that a client sends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from live_toys import Constant, LiveRun, ToyExecutor, alone
from toys import decision_with, toy_engine

from flexirl.errors import UserError
from flexirl.policies.interface.decision import default_decision, unsound
from flexirl.policies.interface.view import View
from flexirl.runtime.live.requests import Completion, Request, Update
from flexirl.workloads.trace import DEFERRED

ENGINE = toy_engine(kv_blocks=24, max_running=8, max_tokens_per_step=16, max_model_len=64)


def request(name: str, **changes: Any) -> Request:
    return Request(name, **{"prompt": [1, 2, 3], "max_tokens": 6, **changes})


def raises(_: object) -> None:
    raise RuntimeError("not the engine's fault")


class Failing(Constant):
    """Says what it is told to, or raises it, every other time."""

    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what, self.asked = what, 0

    def decide(self, view: View) -> np.ndarray:
        """See `Policy`."""
        self.asked += 1
        if self.asked % 2:
            if isinstance(self.what, Exception):
                raise self.what
            return self.what
        return default_decision()


def test_a_raising_listener_and_on_step_harm_nobody() -> None:
    told: list[Update] = []
    run = LiveRun(ToyExecutor(ENGINE), Constant(), on_step=raises)
    run.engine.add_request(request("bad", listener=raises))
    run.engine.add_request(request("good", listener=told.append))
    run.engine.add_request(request("gone", listener=raises))
    run.engine.cancel("gone")
    run.drain()
    assert set(run.completions) == {"bad", "good", "gone"}
    assert run.completions["bad"].token_ids == run.completions["good"].token_ids
    assert [update.token for update in told] == run.completions["good"].token_ids
    assert run.engine.metrics()["callback_failures"] >= 6 + 1 + 1


def test_a_raising_on_end_harms_nobody() -> None:
    ended: list[str] = []

    def on_end(completion: Completion) -> None:
        ended.append(completion.id)
        raise RuntimeError("not the engine's fault")

    run = LiveRun(ToyExecutor(ENGINE), Constant(), on_end=on_end)
    for name in "abc":
        run.engine.add_request(request(name))
    run.drain()
    assert sorted(ended) == ["a", "b", "c"] and run.engine.unfinished == 0


@pytest.mark.parametrize(
    "what",
    [
        RuntimeError("no idea"), None, 7, decision_with(relegate=np.nan), decision_with(token_budget=0),
        decision_with(discipline=9), decision_with(victim=-1), decision_with(deferred_slack=np.nan),
    ],
    ids=str,
)  # fmt: skip
def test_a_policy_that_fails_is_replaced_for_that_decision(what: Any) -> None:
    policy = Failing(what)
    run = LiveRun(ToyExecutor(ENGINE), policy)
    requests = [request("a"), request("b", request_class=DEFERRED)]
    for each in requests:
        run.engine.add_request(each)
    run.drain()
    assert {name: done.token_ids for name, done in run.completions.items()} == {
        each.id: alone(each.prompt, each.max_tokens) for each in requests
    }
    assert run.engine.metrics()["fallback_decisions"] == (policy.asked + 1) // 2 > 0


def test_infinity_is_sound_and_every_field_is_looked_at() -> None:
    assert unsound(default_decision()) is None
    for name in default_decision().dtype.names or ():
        if default_decision().dtype[name] == np.float64:
            assert unsound(decision_with(**{name: np.inf})) == (
                "length_quantile=inf" if name == "length_quantile" else None
            )
            assert unsound(decision_with(**{name: np.nan})) == f"{name}=nan"
    assert [unsound(decision_with(length_quantile=q)) for q in (0.8, -0.1)] == [None, "length_quantile=-0.1"]


@pytest.mark.parametrize(
    "changes",
    [
        {"id": 5}, {"id": "\ud800"}, {"max_tokens": 2.5}, {"max_tokens": float("nan")}, {"max_tokens": 2**40},
        {"tenant": 0.5}, {"predicted_output_tokens": 2**40}, {"predicted_output_tokens": None},
        {"predicted_output_tokens": -1}, {"ttft_s": float("nan")}, {"tpot_s": -1.0}, {"window_s": float("nan")},
        {"window_s": None}, {"arrival_s": "soon"}, {"arrival_s": float("nan")}, {"arrival_s": float("inf")},
    ],
    ids=str,
)  # fmt: skip
def test_what_comes_in_is_checked_where_it_comes_in(changes: dict[str, Any]) -> None:
    run = LiveRun(ToyExecutor(ENGINE), Constant())
    bad = {"prompt": [1], "max_tokens": 2, "id": "bad", **changes}
    with pytest.raises(UserError):
        run.engine.add_request(Request(**bad))
    with pytest.raises(UserError):
        run.engine.cancel(5)  # type: ignore[arg-type]
    run.engine.add_request(request("good", max_tokens=np.int64(4), ttft_s=np.float64(1.0)))
    run.drain()
    assert set(run.completions) == {"good"} and len(run.completions["good"].token_ids) <= 4


class HoldsOnce(Constant):
    """Asked before every iteration; lets no deferred request join the first three times."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def decide(self, view: View) -> np.ndarray:
        """See `Policy`."""
        self.asked += 1
        return decision_with(deferred_kv_share=0.0 if self.asked <= 3 else 1.0)


def test_a_policy_that_once_lets_nothing_run_is_asked_again() -> None:
    policy = HoldsOnce()
    run = LiveRun(ToyExecutor(ENGINE), policy)
    run.engine.add_request(request("a", request_class=DEFERRED))
    run.engine.drain(patience_s=5.0)
    assert set(run.completions) == {"a"} and run.engine.now_s < 2.0
