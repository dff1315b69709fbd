"""Search of the knobs that a rule leaves to be found per scenario: HyGen's latency budget, the fixed dials.

All candidates run on the scenario's tuning episodes, the same ones every time: common random numbers, so that two
policies differ by what they do. The episodes on which policies are compared later must not be among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np

from flexirl.policies.heuristics.fixed_dials import FixedDials
from flexirl.policies.heuristics.hygen import HyGen
from flexirl.policies.interface.policy import Policy
from flexirl.workloads.scenario import SLO


class Episodes(Protocol):
    """The tuning episodes of a scenario."""

    def attainment(self, policy: Policy) -> float:
        """Share of immediate promises that a policy keeps, averaged over the episodes."""
        ...

    def revenues(self, settings: np.ndarray) -> np.ndarray:
        """Revenue of constant dial settings in any unit, averaged over the episodes: (n, dials) to (n,)."""
        ...


NO_BUDGET_S = 1e-9  # shorter than any iteration
BUDGET_RANGE = (0.05, 4.0)  # of the promised time per output token: where the latency budget is looked for
BUDGET_PRECISION = 1.03  # the search ends when its bounds are this factor apart
DIALS_RANDOM, DIALS_ROUNDS = 15, 3  # settings drawn at first, then rounds of one dial after the other
DIALS_STEP = 0.5  # of the first round; halved from round to round


def tune(policy: Policy, episodes: Episodes, slo: SLO, seed: int) -> Policy:
    """The policy ready to run: with its open knobs searched, or as it is where none is open."""
    if isinstance(policy, HyGen) and policy.latency_budget_s is None:
        return replace(policy, latency_budget_s=search_budget(policy, episodes, slo))
    if isinstance(policy, FixedDials) and policy.tune:
        dials = search_dials(policy.positions, episodes.revenues, seed)
        return replace(policy, dials=tuple(dials.tolist()), tune=False)
    return policy


def search_budget(policy: HyGen, episodes: Episodes, slo: SLO) -> float:
    """The largest latency budget in seconds whose immediate attainment stays within the policy's tolerance.

    HyGen's profiler: a binary search, here on the logarithm. The measure is attainment relative to that of the policy
    itself when no deferred work fits its budget. Infinity where even an unlimited budget keeps enough of it.
    """

    def attainment(budget_s: float) -> float:
        return episodes.attainment(replace(policy, latency_budget_s=budget_s))

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


Worth = Callable[[np.ndarray], np.ndarray]  # of dial settings: (n, dials) to (n,), in any unit


def search_dials(start: np.ndarray, worth: Worth, seed: int) -> np.ndarray:
    """The dial setting worth most: random settings first, then one dial after the other from the best."""
    rng = np.random.default_rng(seed)
    best, best_worth = start, -np.inf

    def consider(candidates: np.ndarray) -> None:
        nonlocal best, best_worth
        found = worth(candidates)
        if found.max() > best_worth:
            best, best_worth = candidates[found.argmax()], found.max()

    consider(np.vstack([start, rng.uniform(-1.0, 1.0, (DIALS_RANDOM, len(start)))]))
    for round_ in range(DIALS_ROUNDS):
        step = DIALS_STEP * 0.5**round_
        for dial in range(len(start)):
            both_ways = np.stack([best, best])
            both_ways[:, dial] = np.clip(best[dial] + np.array([step, -step]), -1.0, 1.0)
            consider(both_ways)
    return best
