"""One setting of the dials, held all the time: what a learned policy has to beat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from flexirl.policies.heuristics.base import Episodes, Heuristic, require
from flexirl.policies.interface.action import DIALS, decision_from_dials
from flexirl.policies.interface.view import View
from flexirl.workloads.slo import SLO

DIALS_RANDOM, DIALS_ROUNDS = 15, 3  # settings drawn at first, then rounds of one dial after the other
DIALS_STEP = 0.5  # of the first round; halved from round to round


@dataclass(frozen=True)
class FixedDials(Heuristic):
    """dials: positions from -1 to 1 in the order of `DIALS`; missing ones are 0. tune: search the best per scenario."""

    dials: tuple[float, ...]
    tune: bool

    name = "fixed_dials"

    def tuned(self, episodes: Episodes, slo: SLO, seed: int) -> FixedDials:
        """See `Heuristic.tuned`."""
        if not self.tune:
            return self
        dials = search_dials(self.positions, episodes.worths, seed)
        return replace(self, dials=tuple(dials.tolist()), tune=False)

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
        decision[()] = decision_from_dials(self.positions, view.slo.tpot_s)


SETTINGS_SEARCHED = 1 + DIALS_RANDOM + DIALS_ROUNDS * 2 * len(DIALS)  # by `search_dials`

Worth = Callable[[np.ndarray], np.ndarray]  # of dial settings: (n, dials) to (n,), in any unit


def search_dials(start: np.ndarray, worth: Worth, seed: int) -> np.ndarray:
    """The dial setting worth most: random settings first, then one dial after the other from the best."""
    rng = np.random.default_rng(seed)
    best, best_worth = start, -np.inf

    def consider(candidates: np.ndarray) -> None:
        nonlocal best, best_worth
        found = worth(candidates)
        if found.max() > best_worth:
            best, best_worth = candidates[found.argmax()], found.max()

    consider(np.vstack([start, rng.uniform(-1.0, 1.0, (DIALS_RANDOM, len(start)))]))
    for round_ in range(DIALS_ROUNDS):
        step = DIALS_STEP * 0.5**round_
        for dial in range(len(start)):
            both_ways = np.stack([best, best])
            both_ways[:, dial] = np.clip(best[dial] + np.array([step, -step]), -1.0, 1.0)
            consider(both_ways)
    return best
