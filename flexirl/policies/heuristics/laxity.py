"""Least laxity: deferred work becomes more urgent as its window runs out.

Source: the urgency ramp of deadline-aware batch serving: laxity = deadline - now - remaining work / rate; urgency
u = clamp(1 - laxity / ramp, 0, 1) with a ramp of 6 h in a window of 24 h; priority rises with u; above u = 0.9 the work
gets a floor of tokens in every iteration. Least laxity first is Mok's rule (thesis, MIT, 1983).

Adapted: the ramp is a share of each window, so that scaled windows keep it. Laxity counts all work that is due no later
than a request, since it is served first, at the rate deferred work has had lately. Priority is the step target of
deferred work, between a calm and an urgent share of the promised time per token. Work whose projected completion lies
past its window is not refused, since the scheduler has no such order; it ends when its window closes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from flexirl.policies.heuristics.base import ChunkedPrefill, require
from flexirl.policies.interface.decision import CLASSES, DEADLINE
from flexirl.policies.interface.view import View
from flexirl.workloads.trace import DEFERRED

MEMORY = np.dtype([("revised_s", "f8"), ("tokens", "i8"), ("rate", "f8")])
RATE_WEIGHT = 0.5  # of the newest observation in the moving average of the rate


@dataclass(frozen=True)
class Laxity(ChunkedPrefill):
    """ramp_share: the ramp as a share of the window; calm_share, urgent_share: step target of deferred work at u = 0
    and at u = 1, as shares of the promised time per output token.

    floor_tokens: tokens per iteration above floor_urgency; revise_s: seconds between two looks at laxity.
    """

    ramp_share: float
    calm_share: float
    urgent_share: float
    floor_urgency: float
    floor_tokens: int
    revise_s: float

    name = "laxity"

    _memory: np.ndarray = field(default_factory=lambda: np.zeros((), MEMORY), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.ramp_share <= 1, "ramp_share", self.ramp_share, "a share is above 0 and at most 1")
        require(self.calm_share > 0, "calm_share", self.calm_share, "a share of the promise is positive")
        require(self.urgent_share >= self.calm_share, "urgent_share", self.urgent_share, "it is at least calm_share")
        require(0 <= self.floor_urgency <= 1, "floor_urgency", self.floor_urgency, "an urgency is from 0 to 1")
        require(self.floor_tokens >= 0, "floor_tokens", self.floor_tokens, "it is 0 or more")
        require(self.revise_s > 0, "revise_s", self.revise_s, "it is a positive number of seconds")

    def prepare(self, decision: np.ndarray, view: View) -> None:
        """See `Heuristic.prepare`."""
        super().prepare(decision, view)
        self._memory[()] = (-np.inf, 0, 0.0)
        decision["discipline"] = CLASSES
        decision["deferred_order"] = DEADLINE

    def decide(self, view: View) -> np.ndarray:
        """Sets the step target and the floor by the greatest urgency."""
        now_s = view.now_s
        if now_s >= self._memory["revised_s"] + self.revise_s:
            u = self._urgency(view, now_s)
            share = self.calm_share + u * (self.urgent_share - self.calm_share)
            self._decision["deferred_step_s"] = share * view.slo.tpot_s
            self._decision["deferred_token_floor"] = self.floor_tokens if u > self.floor_urgency else 0
        return self._decision

    def _urgency(self, view: View, now_s: float) -> float:
        first_look = not np.isfinite(self._memory["revised_s"])
        rate = self._rate(view, now_s)
        group, requests = view.group(DEFERRED), view.requests()
        live = requests[(requests["request_class"] == DEFERRED) & np.isfinite(requests["due_s"])]
        if len(live) == 0 or first_look:
            return 0.0
        if rate == 0.0:
            return 1.0  # starved since the start
        # Before any has finished, what the client allows is all that is known.
        expected = group["finished_output"] / group["finished"] if group["finished"] > 0 else live["max_tokens"]
        owed = live["prompt_tokens"] + live["generated"] - live["computed"]
        left = owed + np.maximum(expected - live["generated"], 0.0)
        order = np.argsort(live["due_s"], kind="stable")
        due_s, window_s = live["due_s"][order], (live["due_s"] - live["arrival_s"])[order]
        laxity_s = due_s - now_s - np.cumsum(left[order]) / rate
        return float(np.clip(1.0 - laxity_s / (self.ramp_share * window_s), 0.0, 1.0).max())

    def _rate(self, view: View, now_s: float) -> float:
        """Deferred tokens per second lately; 0 until some have been made."""
        memory, group = self._memory, view.group(DEFERRED)
        tokens = int(group["prompt_done"] + group["output_done"])
        rate = float(memory["rate"])
        if np.isfinite(memory["revised_s"]):
            seen = (tokens - int(memory["tokens"])) / (now_s - float(memory["revised_s"]))
            rate = seen if rate == 0.0 else RATE_WEIGHT * seen + (1.0 - RATE_WEIGHT) * rate
        memory[()] = (now_s, tokens, rate)
        return rate
