"""Whole episodes: every member of a fleet is played to the end of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from flexirl.envs.fleet import Fleet


class Played(NamedTuple):
    """What came of one episode of each member."""

    figures: list[dict[str, float]]  # as of `Fleet.episode_figures`
    rewards: np.ndarray  # summed over the episode: float64 (members,)

    def mean(self, figure: str) -> float:
        """A figure averaged over the members."""
        return float(np.mean([figures[figure] for figures in self.figures]))


def play(fleet: Fleet, seed: int, act: Callable[[np.ndarray], np.ndarray]) -> Played:
    """Plays one episode of each member, with arrivals that follow from the seed.

    act: from observations, float32 (members, size), to actions as of `Fleet.step`; asked before every step.
    """
    observations, over = fleet.reset(seed), np.zeros(fleet.members, bool)
    rewards = np.zeros(fleet.members)
    while not over.all():
        observations, earned, over = fleet.step(act(observations))
        rewards += earned
    return Played([fleet.episode_figures(m) for m in range(fleet.members)], rewards)
