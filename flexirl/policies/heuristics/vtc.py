"""VTC: the tenant that has been served least goes next.

Source: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, and its artifact's `vtc_req_queue.py`. A
counter per tenant grows by 1 per input token and 2 per output token; admission takes the earliest request of the tenant
with the smallest counter; a tenant that returns is lifted to the smallest counter among those present.

Adapted: input tokens count when they are computed rather than at admission, since prompts are prefilled in chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexirl.policies.heuristics.base import ChunkedPrefill
from flexirl.policies.interface.decision import CLASSES, FAIR, ONE_QUEUE
from flexirl.policies.interface.view import View


@dataclass(frozen=True)
class Vtc(ChunkedPrefill):
    """immediate_first: tenants are treated fairly within each class, and immediate requests come first (the published
    rule knows one class). False: one queue, in which a tenant's deferred service counts against its immediate requests.
    """

    immediate_first: bool

    name = "vtc"

    def prepare(self, decision: np.ndarray, view: View) -> None:
        """See `Heuristic.prepare`."""
        super().prepare(decision, view)
        decision["immediate_order"] = FAIR
        decision["deferred_order"] = FAIR
        decision["discipline"] = CLASSES if self.immediate_first else ONE_QUEUE
        decision["preempt_for_immediate"] = int(self.immediate_first)
