"""One setting of the dials, held all the time: what a learned policy has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexirl.policies.heuristics.base import Heuristic, require
from flexirl.policies.interface.action import DIALS, decision_from_dials
from flexirl.policies.interface.policy import View


@dataclass(frozen=True)
class FixedDials(Heuristic):
    """dials: positions from -1 to 1 in the order of `DIALS`; missing ones are 0. tune: search the best per scenario."""

    dials: tuple[float, ...]
    tune: bool

    name = "fixed_dials"

    def __post_init__(self) -> None:
        require(len(self.dials) <= len(DIALS), "dials", self.dials, f"there are {len(DIALS)} dials")
        require(all(-1 <= dial <= 1 for dial in self.dials), "dials", self.dials, "a dial is from -1 to 1")

    @property
    def positions(self) -> np.ndarray:
        """All dials: float64, (len(DIALS),)."""
        positions = np.zeros(len(DIALS))
        positions[: len(self.dials)] = self.dials
        return positions

    def prepare(self, decision: np.ndarray, view: View) -> None:
        """See `Heuristic.prepare`."""
        decision[()] = decision_from_dials(self.positions, view)
