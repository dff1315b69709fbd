"""vLLM's two scheduling policies: first come, first served, and strict priority.

Source: vLLM v1, `vllm/v1/core/sched/scheduler.py`, options `--scheduling-policy fcfs` and `priority`. Running requests
go first in the order of the running list, prefill chunks and decodes alike, while the token budget lasts. When blocks
run out one running request is preempted and recomputed later, and nothing is admitted in that iteration. Otherwise
waiting requests are admitted from the head of the queue until seats, tokens or blocks fail. Waiting requests never
preempt running ones.
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
class _Vllm(ChunkedPrefill):
    """What both policies share. The token budget is vLLM's `--max-num-batched-tokens`."""

    def prepare(self, decision: np.ndarray, view: View) -> None:
        """See `Heuristic.prepare`."""
        super().prepare(decision, view)
        decision["decodes_first"] = 0
        decision["preemption"] = RECOMPUTE
        decision["preempt_for_immediate"] = 0


@dataclass(frozen=True)
class VllmFcfs(_Vllm):
    """One queue by arrival, blind to class; the victim is the last of the running list."""

    name = "vllm_fcfs"

    def prepare(self, decision: np.ndarray, view: View) -> None:
        """See `Heuristic.prepare`."""
        super().prepare(decision, view)
        decision["discipline"] = ONE_QUEUE
        decision["victim"] = LAST


@dataclass(frozen=True)
class VllmPriority(_Vllm):
    """The queue is sorted by (priority, arrival), immediate requests first; the victim is the greatest such pair."""

    name = "vllm_priority"

    def prepare(self, decision: np.ndarray, view: View) -> None:
        """See `Heuristic.prepare`."""
        super().prepare(decision, view)
        decision["discipline"] = PRIORITY
        decision["victim"] = NEWEST
