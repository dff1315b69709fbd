"""Search of the knobs that a rule leaves to be found per scenario: HyGen's latency budget, the fixed dials.

`evaluate` runs a policy on the scenario's tuning seeds, the same ones every time, and returns the leaderboard's figures
averaged over them: common random numbers, so that two policies differ by what they do. The seeds on which policies are
compared later must not be among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from flexirl.policies.heuristics.fixed_dials import FixedDials
from flexirl.policies.heuristics.hygen import HyGen
from flexirl.runtime.policy import Policy
from flexirl.workloads.scenario import SLO

Evaluate = Callable[[Policy], Mapping[str, float | int | None]]

NO_BUDGET_S = 1e-9  # shorter than any iteration
BUDGET_RANGE = (0.05, 4.0)  # of the promised time per output token: where the latency budget is looked for
BUDGET_PRECISION = 1.03  # the search ends when its bounds are this factor apart
DIALS_RANDOM, DIALS_ROUNDS = 16, 3  # settings drawn at first, then rounds of one dial after the other
DIALS_STEP = 0.5  # of the first round; halved from round to round


def tune(policy: Policy, evaluate: Evaluate, slo: SLO, seed: int) -> Policy:
    """The policy ready to run: with its open knobs searched, or as it is where none is open."""
    if isinstance(policy, HyGen) and policy.latency_budget_s is None:
        return replace(policy, latency_budget_s=search_budget(policy, evaluate, slo))
    if isinstance(policy, FixedDials) and policy.tune:
        return tune_dials(policy, evaluate, seed)
    return policy


def search_budget(policy: HyGen, evaluate: Evaluate, slo: SLO) -> float:
    """The largest latency budget in seconds whose immediate attainment stays within the policy's tolerance.

    HyGen's profiler: a binary search, here on the logarithm. The measure is attainment relative to that of the policy
    itself when no deferred work fits its budget. Infinity where even an unlimited budget keeps enough of it.
    """

    def attainment(budget_s: float) -> float:
        return _figure(evaluate(replace(policy, latency_budget_s=budget_s)), "immediate_attainment")

    needed = (1.0 - policy.tolerance) * attainment(NO_BUDGET_S)

    def keeps(budget_s: float) -> bool:
        return attainment(budget_s) >= needed

    if keeps(math.inf):
        return math.inf
    low_s, high_s = (share * slo.tpot_s for share in BUDGET_RANGE)
    while high_s > low_s * BUDGET_PRECISION:
        middle_s = math.sqrt(low_s * high_s)
        if keeps(middle_s):
            low_s = middle_s
        else:
            high_s = middle_s
    return low_s


def tune_dials(policy: FixedDials, evaluate: Evaluate, seed: int) -> FixedDials:
    """The dial setting with the most revenue: random settings first, then one dial after the other from the best."""
    rng = np.random.default_rng(seed)
    best = policy.positions
    best_revenue = _revenue(policy, evaluate, best)

    def consider(candidate: np.ndarray) -> bool:
        nonlocal best, best_revenue
        revenue = _revenue(policy, evaluate, candidate)
        if revenue <= best_revenue:
            return False
        best, best_revenue = candidate, revenue
        return True

    for _ in range(DIALS_RANDOM):
        consider(rng.uniform(-1.0, 1.0, len(best)))
    for round_ in range(DIALS_ROUNDS):
        step = DIALS_STEP * 0.5**round_
        for dial in range(len(best)):
            for direction in (step, -step):
                candidate = best.copy()
                candidate[dial] = np.clip(candidate[dial] + direction, -1.0, 1.0)
                if candidate[dial] != best[dial] and consider(candidate):
                    break
    return replace(policy, dials=tuple(best.tolist()), tune=False)


def _revenue(policy: FixedDials, evaluate: Evaluate, positions: np.ndarray) -> float:
    return _figure(evaluate(replace(policy, dials=tuple(positions.tolist()), tune=False)), "revenue_per_s")


def _figure(figures: Mapping[str, float | int | None], name: str) -> float:
    value = figures[name]
    return 0.0 if value is None else float(value)
