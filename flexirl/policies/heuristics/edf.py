"""Earliest deadline first, on stall-free batches.

Source: Liu and Layland, J. ACM 20 (1973), as "Sarathi-EDF" in the comparisons of Goel et al., "QoServe: Breaking the
Silos of LLM Inference Serving", ASPLOS 2026: decodes first, prefill chunks by deadline within a fixed token budget.
An immediate request is due when its first token is, a deferred one when its window closes.

Adapted: a waiting request with the earliest deadline takes memory from deferred ones that run; in practice that is an
immediate request. Without windows (an endless backlog) all immediate work comes first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexirl.policies.heuristics.base import ChunkedPrefill, deferred_head_first
from flexirl.policies.interface.decision import CLASSES, DEADLINE, ONE_QUEUE
from flexirl.policies.interface.view import View


@dataclass(frozen=True)
class Edf(ChunkedPrefill):
    """Deadlines alone decide the order, the token budget the length of an iteration."""

    name = "edf"
    every_iteration = True

    def prepare(self, decision: np.ndarray, view: View) -> None:
        """See `Heuristic.prepare`."""
        super().prepare(decision, view)
        decision["immediate_order"] = DEADLINE
        decision["deferred_order"] = DEADLINE

    def decide(self, view: View) -> np.ndarray:
        """Serves the class first whose next request is due first; with equal keys, immediate requests."""
        self._decision["discipline"] = ONE_QUEUE if deferred_head_first(view) else CLASSES
        return self._decision
