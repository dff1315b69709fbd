"""The fleet as Gymnasium's vector environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from flexirl.envs.fleet import Fleet, Task
from flexirl.policies.interface.action import GRID


def spaces(fleet: Fleet) -> tuple[gym.spaces.Box, gym.Space[Any]]:
    """Observation and action space of one member."""
    observation = gym.spaces.Box(fleet.low, fleet.high, dtype=np.float32)
    if fleet.task.action == "grid":
        return observation, gym.spaces.Discrete(len(GRID))
    return observation, gym.spaces.Box(-1.0, 1.0, fleet.task.action_shape(), dtype=np.float32)


class BatchingVectorEnv(VectorEnv):
    """Gymnasium's vector environment; a member whose episode ends restarts in the same step."""

    def __init__(self, tasks: Task | Sequence[Task], num_envs: int, group_size: int = 1, traces: int = 64) -> None:
        self.fleet = Fleet(tasks, num_envs, group_size, traces)
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = spaces(self.fleet)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Starts all members anew; without a seed, one is drawn from the environment's own generator."""
        super().reset(seed=seed)
        return self.fleet.reset(_seed(self.np_random) if seed is None else seed).copy(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        """One decision interval of every member."""
        observations, rewards, over = self.fleet.step(actions)
        info: dict[str, Any] = {}
        if over.any():
            for m in np.flatnonzero(over).tolist():
                final = {"final_obs": observations[m].copy(), "final_info": {"figures": self.fleet.episode_figures(m)}}
                info = self._add_info(info, final, m)
            self.fleet.restart(over)
        return observations.copy(), rewards.astype(np.float64), np.zeros(self.num_envs, bool), over.copy(), info

    def close_extras(self, **kwargs: Any) -> None:
        """Ends the fleet's threads."""
        self.fleet.close()


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))
