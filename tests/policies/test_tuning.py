"""The searches find optima that are known beforehand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from flexirl.policies.heuristics.tuning import tune
from flexirl.policies.registry import make_policy
from flexirl.runtime.policy import Policy
from flexirl.workloads.scenario import SLO

SLO_50_MS = SLO(1.0, 0.05)


def attainment_falls_beyond(budget_s: float) -> Any:
    def evaluate(policy: Any) -> dict[str, float]:
        return {"immediate_attainment": 0.8 if policy.latency_budget_s <= budget_s else 0.7}

    return evaluate


@pytest.mark.parametrize("largest_s", [0.004, 0.0312, 0.1])
def test_the_largest_budget_that_keeps_the_slo_is_found(largest_s: float) -> None:
    policy: Any = tune(make_policy("hygen"), attainment_falls_beyond(largest_s), SLO_50_MS, 0)
    assert largest_s / 1.03 <= policy.latency_budget_s <= largest_s


def test_a_budget_that_costs_nothing_is_unlimited() -> None:
    policy: Any = tune(make_policy("hygen"), attainment_falls_beyond(math.inf), SLO_50_MS, 0)
    assert policy.latency_budget_s == math.inf


def test_what_the_tolerance_allows_is_kept() -> None:
    policy: Any = tune(make_policy("hygen", {"tolerance": 0.2}), attainment_falls_beyond(0.03), SLO_50_MS, 0)
    assert policy.latency_budget_s == math.inf


def test_dials_climb_to_the_top() -> None:
    top = np.zeros(len(make_policy("fixed_dials").positions))  # type: ignore[attr-defined]
    top[:2] = 0.5, -0.25

    def evaluate(policy: Any) -> dict[str, float]:
        return {"revenue_per_s": -float(np.sum((policy.positions - top) ** 2))}

    start: Any = make_policy("fixed_dials")
    tuned: Any = tune(start, evaluate, SLO_50_MS, 3)
    again: Any = tune(start, evaluate, SLO_50_MS, 3)
    assert tuned == again and not tuned.tune
    assert evaluate(tuned)["revenue_per_s"] > 0.2 * evaluate(start)["revenue_per_s"]


@pytest.mark.parametrize(
    "name, knobs", [("vllm_fcfs", {}), ("hygen", {"latency_budget_s": 0.02}), ("fixed_dials", {"tune": False})]
)
def test_policies_without_open_knobs_are_left_alone(name: str, knobs: dict[str, Any]) -> None:
    def never(policy: Policy) -> dict[str, float]:
        raise AssertionError(f"{policy.name} was evaluated")

    policy = make_policy(name, knobs)
    assert tune(policy, never, SLO_50_MS, 0) is policy
