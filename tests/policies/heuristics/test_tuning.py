"""The searches find optima that are known beforehand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from flexirl.policies.heuristics.base import tune
from flexirl.policies.interface.action import NUM_DIALS
from flexirl.policies.interface.policy import Policy
from flexirl.policies.registry import make_policy
from flexirl.workloads.slo import SLO

SLO_50_MS = SLO(1.0, 0.05)


class AttainmentFallsBeyond:
    """Episodes on which a latency budget costs attainment once it is above `budget_s`."""

    def __init__(self, budget_s: float) -> None:
        self.budget_s = budget_s

    def attainment(self, policy: Any) -> float:
        return 0.8 if policy.latency_budget_s <= self.budget_s else 0.7

    def worths(self, settings: np.ndarray) -> np.ndarray:
        raise AssertionError("no dials are searched")


class Hill:
    """Episodes whose worth is highest at one setting of the dials."""

    def __init__(self, *top: float) -> None:
        self.top = np.zeros(NUM_DIALS)
        self.top[: len(top)] = top

    def attainment(self, policy: Policy) -> float:
        raise AssertionError(f"{policy.name} was evaluated")

    def worths(self, settings: np.ndarray) -> np.ndarray:
        return -((settings - self.top) ** 2).sum(axis=1)


@pytest.mark.parametrize("largest_s", [0.004, 0.0312, 0.1])
def test_the_largest_budget_that_keeps_the_slo_is_found(largest_s: float) -> None:
    policy: Any = tune(make_policy("hygen"), AttainmentFallsBeyond(largest_s), SLO_50_MS, 0)
    assert largest_s / 1.03 <= policy.latency_budget_s <= largest_s


def test_a_budget_that_costs_nothing_is_unlimited() -> None:
    policy: Any = tune(make_policy("hygen"), AttainmentFallsBeyond(math.inf), SLO_50_MS, 0)
    assert policy.latency_budget_s == math.inf


def test_what_the_tolerance_allows_is_kept() -> None:
    policy: Any = tune(make_policy("hygen", {"tolerance": 0.2}), AttainmentFallsBeyond(0.03), SLO_50_MS, 0)
    assert policy.latency_budget_s == math.inf


def test_dials_climb_to_the_top() -> None:
    hill = Hill(0.5, -0.25)
    start: Any = make_policy("fixed_dials")
    tuned: Any = tune(start, hill, SLO_50_MS, 3)
    assert tuned == tune(start, hill, SLO_50_MS, 3) and not tuned.tune
    assert hill.worths(tuned.positions[None]) > 0.2 * hill.worths(start.positions[None])


@pytest.mark.parametrize(
    "name, knobs", [("vllm_fcfs", {}), ("hygen", {"latency_budget_s": 0.02}), ("fixed_dials", {"tune": False})]
)
def test_policies_without_open_knobs_are_left_alone(name: str, knobs: dict[str, Any]) -> None:
    policy = make_policy(name, knobs)
    assert tune(policy, Hill(), SLO_50_MS, 0) is policy
