"""The protocol between an engine and whoever decides: a policy turns a View into a Decision."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from flexirl.policies.interface.view import View

DECISION_INTERVAL_S = 0.2  # seconds between decisions, where neither the user nor the policy says


class Policy(Protocol):
    """Decides for an engine. Deterministic: the same views give the same decisions."""

    name: str
    every_iteration: bool  # True: asked before each iteration; False: once per decision interval

    def reset(self, view: View) -> None:
        """Called once at the start of a run, before the first decision."""
        ...

    def decide(self, view: View) -> np.ndarray:
        """The decision from now on: a 0-d array of `DECISION`."""
        ...


def interval_of(policy: Policy, asked_s: float | None) -> float:
    """Seconds between the decisions of a policy: what is asked for, else what it was trained with, else the default."""
    return asked_s if asked_s is not None else getattr(policy, "interval_s", None) or DECISION_INTERVAL_S
