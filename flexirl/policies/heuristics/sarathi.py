"""Sarathi-Serve: stall-free batches under a fixed token budget.

Source: Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", OSDI 2024, section 4.
All decodes run in every iteration; what is left of the token budget goes to prefill chunks, first come, first served.
A small budget bounds the iteration and with it the time between tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexirl.policies.heuristics.base import ChunkedPrefill
from flexirl.policies.interface.decision import (
    LAST,
    NEWEST,
    ONE_QUEUE,
    PRIORITY,
    RECOMPUTE,
)
from flexirl.policies.interface.view import View


@dataclass(frozen=True)
class Sarathi(ChunkedPrefill):
    """The token budget is the rule; the paper finds it by profiling ("slo").

    immediate_first: adapted to two classes as in HyGen's comparison ("Sarathi++"): immediate requests are served first
    and may preempt deferred ones. False is the published rule, which knows one class.
    """

    immediate_first: bool

    name = "sarathi"

    def prepare(self, decision: np.ndarray, view: View) -> None:
        """See `Heuristic.prepare`."""
        super().prepare(decision, view)
        decision["preemption"] = RECOMPUTE
        decision["discipline"] = PRIORITY if self.immediate_first else ONE_QUEUE
        decision["victim"] = NEWEST if self.immediate_first else LAST
        decision["preempt_for_immediate"] = int(self.immediate_first)
