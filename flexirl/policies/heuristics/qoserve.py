"""QoServe (first published as Niyama): chunks sized by the slack of decodes, deadlines weighed against work left.

Source: Goel et al., "QoServe: Breaking the Silos of LLM Inference Serving", ASPLOS 2026, section 3; "Niyama", arXiv
2503.22562.
- Dynamic chunking: all decodes run; prefill fills the iteration until the decode with the least slack would be late.
- Hybrid prioritisation: the prefill queue is sorted by arrival + SLO + alpha x remaining work, where the SLO is that of
  the first token for immediate requests and of the last one for deferred ones, whose remaining work includes decodes
  (the mean of finished requests plus two standard deviations). alpha is 8 ms per token, at low load 1 ms.
- Eager relegation: an immediate request that would miss its first token goes behind all others.
- Selective preemption: a prefill may have to pause for a more urgent one, a decode never.

Adapted:
- The promise here is a mean time per token counted from the first token, so token n is due at first token + (n - 1) x
  TPOT rather than at arrival + TTFT + (n - 1) x TPOT; requests that already missed their first token have no slack to
  keep. The paper's predictor errs on the side of small chunks by about 10%; here a share of the slack is left unused.
- Deferred requests without a window (an endless backlog) are taken to be due at one common time, which makes their
  order that of the shortest remaining work, behind every immediate request.
- Low load, which the paper leaves open, means that the prefill that waited stayed below a share of the TTFT promise.
- Where output lengths are predicted, the prediction takes the place of the mean and two standard deviations; so does,
  with `length_quantile`, a quantile of what the scheduler has learned about outputs of the same kind.
- `deferred_alpha_s` lets lengths count by another alpha among deferred requests; the paper has one for both.
- A waiting immediate request that lacks memory evicts deferred ones, decodes included; the paper leaves this open.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from flexirl.policies.heuristics.base import Heuristic, deferred_head_first, require
from flexirl.policies.interface.decision import CLASSES, DEADLINE, ONE_QUEUE, SHORTEST
from flexirl.policies.interface.view import View
from flexirl.runtime.profile.step_time import prefill_slope
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

MEMORY = np.dtype([("revised_s", "f8"), ("most_waiting_tokens", "i8")])


@dataclass(frozen=True)
class QoServe(Heuristic):
    """alpha_s, low_load_alpha_s: seconds per remaining token in the order; max_chunk_tokens: tokens per iteration,
    where throughput stops growing; slack_used: share of the least slack that an iteration may take.

    low_load: share of the TTFT promise that waiting prefill may take at low load; revise_s: seconds between two
    choices of alpha and of the expected output, each of which sorts the queues anew; length_quantile: of what is
    learned about lengths, the quantile that takes the place of the expected output, 0 for none; deferred_alpha_s: in
    place of alpha for deferred requests, None for the same.
    """

    alpha_s: float
    low_load_alpha_s: float
    max_chunk_tokens: int
    slack_used: float
    low_load: float
    revise_s: float
    length_quantile: float
    deferred_alpha_s: float | None

    name = "qoserve"
    every_iteration = True

    _memory: np.ndarray = field(default_factory=lambda: np.zeros((), MEMORY), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require(self.alpha_s >= 0, "alpha_s", self.alpha_s, "it is 0 or more seconds per token")
        require(self.low_load_alpha_s >= 0, "low_load_alpha_s", self.low_load_alpha_s, "it is 0 or more")
        require(self.max_chunk_tokens >= 1, "max_chunk_tokens", self.max_chunk_tokens, "it is at least 1 token")
        require(0 < self.slack_used <= 1, "slack_used", self.slack_used, "a share is above 0 and at most 1")
        require(self.low_load >= 0, "low_load", self.low_load, "it is 0 or more")
        require(0 <= self.length_quantile < 1, "length_quantile", self.length_quantile, "it is from 0 to below 1")
        alpha_s = self.deferred_alpha_s
        require(alpha_s is None or alpha_s >= 0, "deferred_alpha_s", alpha_s, "it is 0 or more seconds per token")
        require(self.revise_s > 0, "revise_s", self.revise_s, "it is a positive number of seconds")

    def prepare(self, decision: np.ndarray, view: View) -> None:
        """See `Heuristic.prepare`."""
        self._memory[()] = (-np.inf, 0)
        decision["token_budget"] = self.max_chunk_tokens
        decision["immediate_order"] = DEADLINE
        decision["relegate"] = decision["relegated_last"] = 1
        decision["length_quantile"] = self.length_quantile
        # Each iteration is sized by the slack at its start; deferred decodes run all the same.
        decision["immediate_slack"] = self.slack_used
        decision["deferred_slack"] = self.slack_used
        decision["deferred_decodes"] = 1.0

    def decide(self, view: View) -> np.ndarray:
        """Lets the more urgent class go first."""
        memory, decision = self._memory, self._decision
        now_s = view.now_s
        memory["most_waiting_tokens"] = max(memory["most_waiting_tokens"], view.group(IMMEDIATE)["waiting_tokens"])
        if now_s >= memory["revised_s"] + self.revise_s:
            self._revise(view, now_s)
        decision["discipline"] = ONE_QUEUE if deferred_head_first(view) else CLASSES
        return decision

    def _revise(self, view: View, now_s: float) -> None:
        """Chooses alpha by the load since the last time, and the output expected of deferred requests."""
        engine, memory, decision = view.engine, self._memory, self._decision
        waited_s = int(memory["most_waiting_tokens"]) * prefill_slope(engine)
        low = waited_s <= self.low_load * view.slo.ttft_s
        memory[()] = (now_s, 0)
        deferred = view.group(DEFERRED)
        alpha_s = self.low_load_alpha_s if low else self.alpha_s
        decision["order_weight_s"] = alpha_s
        decision["deferred_weight_s"] = alpha_s if self.deferred_alpha_s is None else self.deferred_alpha_s
        decision["expected_output"] = _mean_and_two_deviations(deferred)
        decision["deferred_order"] = DEADLINE if deferred["windowed"] > 0 else SHORTEST


def _mean_and_two_deviations(group: np.ndarray) -> float:
    """Of the output of the finished requests of a `GROUP`; 0 where none has finished."""
    n, total, squares = (int(group[name]) for name in ("finished", "finished_output", "finished_output_squares"))
    return total / n + 2.0 * math.sqrt(n * squares - total * total) / n if n else 0.0
