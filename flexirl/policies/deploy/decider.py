"""One decision of a network, compiled: what the engine looks like, what the network says, what that means.

All it works on is one argument. A decision comes every 0.2 s, when the processor's caches hold other things; taken in
parts, each with its arrays to unpack, it takes three times as long then.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
from numba.experimental import structref

from flexirl.policies.deploy.network import Network, run_network
from flexirl.policies.interface.action import GRID, PREEMPTS, set_dials, set_scores
from flexirl.policies.interface.observation import MEMORY, PROMISE, bounds, observe
from flexirl.runtime.profile.step_time import BATCH
from flexirl.runtime.scheduler.state import State
from flexirl.workloads.scenario import SLO
from flexirl.workloads.trace import DEFERRED

DIALS, CHOICE, SCORES = range(3)  # what a network's numbers are
KINDS = {"dials": DIALS, "grid": CHOICE, "scores": SCORES}
SETTINGS = np.dtype(
    [
        ("kind", "i4"),
        ("masked", "i4"),  # 1: a choice that could do nothing is not to be taken
        ("immediate_order", "i4"),
        ("deferred_order", "i4"),
    ],
    align=True,
)
_GRID = np.array(GRID, np.float32)


@structref.register
class _DeciderType(nb.types.StructRef):
    """The compiled side of `Decider`."""


class Decider(structref.StructRefProxy):
    """A network, the engine it decides for, and what it remembers of it. Made by `new_decider`."""

    def __new__(cls, *parts: Any) -> Decider:
        """The arrays are shared, not copied."""
        decider: Decider = structref.StructRefProxy.__new__(cls, *parts)
        return decider


structref.define_proxy(
    Decider,
    _DeciderType,
    ["state", "network", "settings", "memory", "promise", "batch", "low", "high", "observed", "raw"],
)


def new_decider(state: State, network: Network, slo: SLO, settings: np.ndarray, observed: np.ndarray) -> Decider:
    """A decider that has not seen the engine yet.

    settings: `SETTINGS` (1,); observed: float32, as many numbers as the network takes, overwritten by each decision.
    """
    low, high = bounds(settings["kind"][0] == SCORES)
    return Decider(
        state, network, settings, np.zeros(1, MEMORY), np.array([(slo.ttft_s, slo.tpot_s)], PROMISE),
        np.zeros(1, BATCH), low, high, observed, np.zeros(network.sizes[-1], np.float32),
    )  # fmt: skip


@nb.njit(cache=True)
def decide(decider: Any) -> bool:
    """Writes a decision into the engine's state; False, and none is written, for numbers that are not finite."""
    state, settings, raw, tpot_s = decider.state, decider.settings[0], decider.raw, decider.promise[0].tpot_s
    observe(state, decider.memory[0], decider.promise[0], decider.batch[0], decider.low, decider.high, decider.observed)
    run_network(decider.network, decider.observed, raw)
    for i in range(len(raw)):
        if not np.isfinite(raw[i]):
            return False
    if settings.kind == SCORES:
        set_scores(state, raw, tpot_s)
    elif settings.kind == DIALS:
        set_dials(state, raw, tpot_s, settings.immediate_order, settings.deferred_order)
    else:
        if settings.masked and state.classes[DEFERRED].running == 0:
            raw[PREEMPTS] = -np.inf
        set_dials(state, _GRID[np.argmax(raw)], tpot_s, settings.immediate_order, settings.deferred_order)
    return True
