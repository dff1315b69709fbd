"""The two anchors: each class served as if the other were not there, to hold other policies against."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexirl.policies.heuristics.base import Heuristic
from flexirl.policies.interface.decision import ARRIVAL, DEADLINE, ONE_QUEUE, SCORE
from flexirl.policies.interface.view import View


@dataclass(frozen=True)
class ImmediateOnly(Heuristic):
    """Deferred requests are never admitted: the best latency that immediate requests can get."""

    name = "immediate_only"

    def prepare(self, decision: np.ndarray, view: View) -> None:
        """See `Heuristic.prepare`."""
        decision["immediate_order"] = ARRIVAL
        decision["deferred_kv_share"] = 0.0


@dataclass(frozen=True)
class DeferredOnly(Heuristic):
    """Deferred requests in full batches, for the most deferred work the engine can do.

    Meant for a trace without immediate requests. Where there are some, they come behind every deferred one: in one
    queue, a deferred request's key is 0 (no scores are set), an immediate one's is the time its first token is due.
    """

    name = "deferred_only"

    def prepare(self, decision: np.ndarray, view: View) -> None:
        """See `Heuristic.prepare`."""
        decision["discipline"] = ONE_QUEUE
        decision["preempt_for_immediate"] = 0
        decision["immediate_order"] = DEADLINE
        decision["deferred_order"] = SCORE
