"""HyGen: deferred work joins an iteration while its predicted time stays within a latency budget.

Source: Sun, Wang, Lai, "HyGen: Efficient LLM Serving via Elastic Online-Offline Request Co-location", NeurIPS 2025
(arXiv 2501.14808). Immediate requests are scheduled first and preempt deferred ones for memory; then deferred ones, one
by one, as long as the predicted time of the iteration, its token budget and memory allow. The budget is found by a
profiler: a binary search for the largest one that keeps the SLO (`tuning.search_budget`).

Adapted: the step-time predictor is the engine's own model, and the deferred queue is in arrival order, because there
is no prefix tree to walk. HyGen's comparison without a budget is `latency_budget_s=inf`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from flexirl.errors import UserError
from flexirl.policies.heuristics.base import ChunkedPrefill, require
from flexirl.policies.interface.policy import View
from flexirl.runtime.scheduler.state import CLASSES


@dataclass(frozen=True)
class HyGen(ChunkedPrefill):
    """latency_budget_s: predicted seconds of an iteration up to which deferred work joins; None is to be searched.

    tolerance: share of the immediate attainment that the search may give up for deferred work.
    """

    latency_budget_s: float | None
    tolerance: float

    name = "hygen"

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
