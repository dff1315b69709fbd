"""Whole episodes of a fleet: each member comes to what it comes to in an environment of its own."""

from __future__ import annotations

import numpy as np
import pytest
from episodes import small_task
from test_vector_envs import SAME

from flexirl.envs.batching import BatchingEnv
from flexirl.envs.fleet import Fleet
from flexirl.envs.rollout import play
from flexirl.policies.interface.action import NUM_DIALS


def act(observations: np.ndarray) -> np.ndarray:
    """Dials that follow from what each member observes."""
    return np.tile(np.clip(observations[:, :1], -1, 1), NUM_DIALS)


def test_members_come_to_what_single_environments_come_to() -> None:
    """The second one's episode is shorter: it waits for the first, and nothing more happens to it."""
    tasks = [small_task(**SAME), small_task(**SAME, duration_s=4.0)]
    played = play(Fleet(tasks, 2, traces=2), 3, act)
    for m, (task, steps) in enumerate(zip(tasks, (40, 20), strict=True)):
        env = BatchingEnv(Fleet(task, 1))
        observation, info = env.reset(seed=0)
        rewards = []
        for _ in range(steps):
            observation, reward, _, truncated, info = env.step(act(observation[None])[0])
            rewards.append(reward)
        assert truncated and played.figures[m] == info["figures"]
        assert played.rewards[m] == pytest.approx(sum(rewards), abs=1e-4)
    assert played.mean("revenue_per_s") == sum(figures["revenue_per_s"] for figures in played.figures) / 2


def test_episodes_follow_from_the_seed() -> None:
    fleet = Fleet(small_task(), 2)
    first, other, again = (play(fleet, seed, act) for seed in (1, 2, 1))
    assert first.figures == again.figures != other.figures
