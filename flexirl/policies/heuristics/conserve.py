"""ConServe: in each iteration the most deferred tokens that keep the time between tokens within its target.

Source: Qiao et al., "ConServe: Fine-Grained GPU Harvesting for LLM Online and Offline Co-Serving", arXiv 2410.01228.
Immediate requests are scheduled first; the deferred token count x is the largest with T(immediate + x, context) within
the target for the time between tokens, T being the profiled step time. Without immediate requests the batch is filled.

Adapted: iterations here cannot be cut short at a layer, so a filled batch ends before an arriving request starts; KV
checkpoints, which make preemption all but free, become swapping to host memory where that is cheaper than recomputing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexirl.policies.heuristics.base import ChunkedPrefill, require
from flexirl.policies.interface.decision import CHEAPER, CLASSES
from flexirl.policies.interface.view import View
from flexirl.workloads.trace import IMMEDIATE


@dataclass(frozen=True)
class ConServe(ChunkedPrefill):
    """tbt_share: the target is this share of the promised time per output token.

    Below 1, because an iteration may still be longer than the target: prefill of immediate requests is not held back.
    """

    tbt_share: float

    name = "conserve"
    every_iteration = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tbt_share > 0, "tbt_share", self.tbt_share, "a share of the promise is positive")

    def prepare(self, decision: np.ndarray, view: View) -> None:
        """See `Heuristic.prepare`."""
        super().prepare(decision, view)
        decision["discipline"] = CLASSES
        decision["preemption"] = CHEAPER

    def decide(self, view: View) -> np.ndarray:
        """Full batches exactly while no immediate request is in the system."""
        group = view.group(IMMEDIATE)
        idle = group["waiting"] == 0 and group["running"] == 0
        self._decision["deferred_step_s"] = np.inf if idle else self.tbt_share * view.slo.tpot_s
        return self._decision
