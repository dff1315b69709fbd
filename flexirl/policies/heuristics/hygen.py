"""HyGen: deferred work joins an iteration while its predicted time stays within a latency budget.

Source: Sun, Wang, Lai, "HyGen: Efficient LLM Serving via Elastic Online-Offline Request Co-location", NeurIPS 2025
(arXiv 2501.14808). Immediate requests are scheduled first and preempt deferred ones for memory; then deferred ones, one
by one, as long as the predicted time of the iteration, its token budget and memory allow. The budget is found by a
profiler: a binary search for the largest one that keeps the SLO (`search_budget`).

Adapted: the step-time predictor is the engine's own model, and the deferred queue is in arrival order, because there
is no prefix tree to walk. HyGen's comparison without a budget is `latency_budget_s=inf`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from flexirl.errors import UserError
from flexirl.policies.heuristics.base import ChunkedPrefill, Episodes, require
from flexirl.policies.interface.decision import CLASSES
from flexirl.policies.interface.view import View
from flexirl.workloads.slo import SLO

NO_BUDGET_S = 1e-9  # shorter than any iteration
BUDGET_RANGE = (0.05, 4.0)  # of the promised time per output token: where the latency budget is looked for
BUDGET_PRECISION = 1.03  # the search ends when its bounds are this factor apart


@dataclass(frozen=True)
class HyGen(ChunkedPrefill):
    """latency_budget_s: predicted seconds of an iteration up to which deferred work joins; None is to be searched.

    tolerance: share of the immediate attainment that the search may give up for deferred work.
    """

    latency_budget_s: float | None
    tolerance: float

    name = "hygen"

    def tuned(self, episodes: Episodes, slo: SLO, seed: int) -> HyGen:
        """See `Heuristic.tuned`."""
        if self.latency_budget_s is not None:
            return self
        return replace(self, latency_budget_s=search_budget(self, episodes, slo))

    def __post_init__(self) -> None:
        super().__post_init__()
        budget_s = self.latency_budget_s
        require(budget_s is None or (budget_s > 0 and not math.isnan(budget_s)), "latency_budget_s", budget_s,
                "a budget is a positive number of seconds, or null to search it")  # fmt: skip
        require(0 <= self.tolerance < 1, "tolerance", self.tolerance, "a share is at least 0 and less than 1")

    def prepare(self, decision: np.ndarray, view: View) -> None:
        """See `Heuristic.prepare`; raises UserError where the budget has not been searched yet."""
        if self.latency_budget_s is None:
            raise UserError("hygen runs with latency_budget_s=null only after the search; give it a number of seconds.")
        super().prepare(decision, view)
        decision["discipline"] = CLASSES
        decision["deferred_step_s"] = self.latency_budget_s


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
