"""SGLang: memory is reserved for a share of the output still allowed, a share that decays until it proves too small.

Source: SGLang, `managers/scheduler.py`, `schedule_policy.py` (`PrefillAdder`) and `ScheduleBatch.retract_decode`:
- a request is admitted if its prompt and the whole output it may make (4,096 tokens at most) fit beside `ratio` times
  the output that every running request may still make;
- the ratio starts at 0.7 x conservativeness, falls linearly over 600 decode iterations to 0.14 of that, and returns to
  its start when the engine is idle;
- on shortage, requests with the fewest output tokens are retracted, longest prompt first, and the ratio becomes
  (tokens made + 20 per request) / (tokens allowed) of those that stay.

Adapted: SGLang runs prefill and decode in turn unless `--enable-mixed-chunk` is on; here it is on, with the token
budget as chunk size. It retracts until 20 tokens per request are free; here one iteration's need at a time, so a
shortage may take a few iterations. Deferred requests are retracted before immediate ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from flexirl.policies.heuristics.base import ChunkedPrefill, require
from flexirl.policies.interface.decision import LEAST_OUTPUT, ONE_QUEUE, PRIORITY, RECOMPUTE
from flexirl.policies.interface.view import View


@dataclass(frozen=True)
class SGLang(ChunkedPrefill):
    """conservativeness: scales the ratio (`--schedule-conservativeness`); init_ratio, min_ratio_factor, decay_steps
    (iterations), retract_steps and clip_output (tokens): the constants above.

    priority_scheduling: SGLang's option of that name with immediate requests as the higher priority: they are admitted
    first and preempt deferred ones when that makes enough room. False: one queue by arrival.
    """

    conservativeness: float
    init_ratio: float
    min_ratio_factor: float
    decay_steps: int
    retract_steps: int
    clip_output: int
    priority_scheduling: bool

    name = "sglang"
    every_iteration = True

    # Preemptions since the start, when last looked at.
    _seen: np.ndarray = field(default_factory=lambda: np.zeros((), np.int64), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.conservativeness >= 0, "conservativeness", self.conservativeness, "it is 0 or more")
        require(0 <= self.init_ratio <= 1, "init_ratio", self.init_ratio, "a share is from 0 to 1")
        require(0 <= self.min_ratio_factor <= 1, "min_ratio_factor", self.min_ratio_factor, "a share is from 0 to 1")
        require(self.decay_steps >= 1, "decay_steps", self.decay_steps, "the decay takes at least 1 iteration")
        require(self.retract_steps >= 0, "retract_steps", self.retract_steps, "it is 0 or more")
        require(self.clip_output >= 1, "clip_output", self.clip_output, "it is at least 1 token")

    @property
    def start_ratio(self) -> float:
        """The ratio at the start and after idleness."""
        return min(self.init_ratio * self.conservativeness, 1.0)

    @property
    def least_ratio(self) -> float:
        """The ratio that the decay ends at."""
        return self.start_ratio * self.min_ratio_factor

    def prepare(self, decision: np.ndarray, view: View) -> None:
        """See `Heuristic.prepare`."""
        super().prepare(decision, view)
        self._seen[()] = 0
        decision["discipline"] = PRIORITY if self.priority_scheduling else ONE_QUEUE
        decision["preempt_for_immediate"] = int(self.priority_scheduling)
        decision["victim"] = LEAST_OUTPUT
        decision["preemption"] = RECOMPUTE
        decision["reserve_ratio"] = self.start_ratio
        decision["reserve_new_ratio"] = 1.0
        decision["reserve_clip"] = self.clip_output

    def decide(self, view: View) -> np.ndarray:
        """Moves the ratio on by one iteration."""
        decision = self._decision
        preemptions = int(view.arrays.groups["preemptions"].sum())
        running = int(view.arrays.groups["running"].sum())
        if preemptions > self._seen:
            self._seen[()] = preemptions
            decision["reserve_ratio"] = self._ratio_after_retraction(view, running)
        elif running == 0:
            decision["reserve_ratio"] = self.start_ratio
        elif view.arrays.now["decode_sequences"][0] > 0:
            step = (self.start_ratio - self.least_ratio) / self.decay_steps
            decision["reserve_ratio"] = max(float(decision["reserve_ratio"]) - step, self.least_ratio)
        return decision

    def _ratio_after_retraction(self, view: View, running: int) -> float:
        requests = view.requests()
        left = requests[requests["running"] == 1]
        made = int(left["generated"].sum()) + self.retract_steps * running
        return min(made / (int(left["max_tokens"].sum()) + 1), 1.0)
