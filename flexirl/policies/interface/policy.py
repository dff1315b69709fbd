"""The protocol between an engine and whoever decides: a policy turns a View into a Decision."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from flexirl.policies.interface.view import View


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
