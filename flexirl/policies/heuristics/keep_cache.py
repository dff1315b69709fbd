"""QoServe that keeps memory for those who come back: deferred work may not displace what conversations left behind.

Source: the memory manager of Echo (arXiv 2504.03651), which evicts by class, deferred blocks first, and keeps a share
of the cache from deferred work. Echo sets that share from the immediate demand it foresees; here it is constant, a
knob. With `by_return`, ours, what conversations left gives way by how soon it is likely asked for again. Where there is
a host tier, only what they left goes there. A request that will be late is still served before deferred work. All else
is `qoserve`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexirl.policies.heuristics.base import require
from flexirl.policies.heuristics.qoserve import QoServe
from flexirl.policies.interface.decision import IMMEDIATES
from flexirl.policies.interface.view import View


@dataclass(frozen=True)
class KeepCache(QoServe):
    """kept_share: of all blocks, those that immediate work left in the cache and no deferred request is admitted into;
    deferred_share: of all blocks, what idle deferred work may keep before it gives way first; by_return: what
    conversations left gives way by how soon it is likely asked for again, not by how long it has been idle."""

    by_return: bool
    kept_share: float
    deferred_share: float

    name = "keep_cache"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.kept_share <= 1, "kept_share", self.kept_share, "a share is from 0 to 1")
        require(0 <= self.deferred_share <= 1, "deferred_share", self.deferred_share, "a share is from 0 to 1")

    def prepare(self, decision: np.ndarray, view: View) -> None:
        """See `Heuristic.prepare`."""
        super().prepare(decision, view)
        decision["relegated_last"] = 0
        decision["to_host"] = IMMEDIATES
        decision["by_return"] = self.by_return
        decision["immediate_cache_share"] = self.kept_share
        decision["deferred_cache_share"] = self.deferred_share
