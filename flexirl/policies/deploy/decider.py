"""One decision of a network, compiled: what the engine looks like, what the network says, what that means.

All it works on is one argument. A decision comes every 0.2 s, when the processor's caches hold other things; taken in
parts, each with its arrays to unpack, it takes three times as long then.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
from numba.experimental import structref

from flexirl.compiled import compiled
from flexirl.policies.deploy.network import Network, run_network
from flexirl.policies.interface.action import GRID, PREEMPTS, set_dials, set_scores
from flexirl.policies.interface.observation import new_observers, observe
from flexirl.policies.interface.view import View
from flexirl.runtime.borrow import borrow
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
        return _new_decider(*parts)


structref.define_proxy(
    Decider,
    _DeciderType,
    ["arrays", "network", "settings", "observer", "decision", "observed", "raw"],
)


@compiled
def _new_decider(arrays, network, settings, observer, decision, observed, raw):
    # The proxy's own constructor is compiled anew in every process.
    return Decider(arrays, network, settings, observer, decision, observed, raw)


def new_decider(
    view: View, network: Network, settings: np.ndarray, decision: np.ndarray, observed: np.ndarray
) -> Decider:
    """A decider that has not seen the engine yet.

    settings: `SETTINGS` (1,); decision: `DECISION` (1,), and observed: float32, as many numbers as the network takes;
    each decision overwrites both.
    """
    many = new_observers(1, settings["kind"][0] == SCORES)
    observer = many._replace(
        memory=many.memory[0], numbers=many.numbers[0], requests=many.requests[0], flat_numbers=many.flat_numbers[0],
        flat_requests=many.flat_requests[0],
    )  # fmt: skip
    raw = np.zeros(network.sizes[-1], np.float32)
    return Decider(view.arrays, network, settings, observer, decision, observed, raw)


@compiled
def decide(decider: Any) -> bool:
    """Overwrites the decision; False, and it stays as it is, for numbers that are not finite."""
    view, settings, raw, decision = decider.arrays, decider.settings[0], decider.raw, decider.decision[0]
    tpot_s = view.promise[0].tpot_s
    observe(borrow(view), borrow(decider.observer), decider.observed)
    run_network(decider.network, decider.observed, raw)
    for i in range(len(raw)):
        if not np.isfinite(raw[i]):
            return False
    if settings.kind == SCORES:
        set_scores(decision, raw, view.visible, tpot_s)
    elif settings.kind == DIALS:
        set_dials(decision, raw, tpot_s, settings.immediate_order, settings.deferred_order)
    else:
        if settings.masked and view.groups[DEFERRED].running == 0:
            raw[PREEMPTS] = -np.inf
        set_dials(decision, _GRID[np.argmax(raw)], tpot_s, settings.immediate_order, settings.deferred_order)
    return True
