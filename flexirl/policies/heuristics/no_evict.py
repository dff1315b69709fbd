"""TensorRT-LLM's default capacity scheduler: a request once started is never evicted.

Source: TensorRT-LLM, `CapacitySchedulerPolicy::kGUARANTEED_NO_EVICT`. A request is admitted if the blocks of its prompt
and of all the output it may still make fit beside those set aside for every running request.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexirl.policies.heuristics.base import ChunkedPrefill
from flexirl.policies.interface.decision import ONE_QUEUE, PRIORITY
from flexirl.policies.interface.view import View


@dataclass(frozen=True)
class NoEvict(ChunkedPrefill):
    """immediate_first: immediate requests are admitted ahead of deferred ones, which is what TensorRT-LLM's request
    priorities do with two classes; they never take memory from those that run. False: one queue by arrival.
    """

    immediate_first: bool

    name = "no_evict"

    def prepare(self, decision: np.ndarray, view: View) -> None:
        """See `Heuristic.prepare`."""
        super().prepare(decision, view)
        decision["discipline"] = PRIORITY if self.immediate_first else ONE_QUEUE
        decision["preempt_for_immediate"] = 0
        decision["reserve_ratio"] = 1.0
        decision["reserve_new_ratio"] = 1.0
