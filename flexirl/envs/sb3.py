"""The fleet as the vector environment of stable-baselines3, with which PyTorch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from flexirl.envs.fleet import Fleet
from flexirl.envs.vector import spaces


class BatchingVecEnv(VecEnv):
    """stable-baselines3's vector environment. An ended episode's info holds its figures under `figures`."""

    def __init__(self, fleet: Fleet, seed: int = 0) -> None:
        self.fleet = fleet
        num_envs = fleet.members
        self.render_mode = None  # asked for by the constructor below
        self._next_seed = seed
        self._infos: list[dict[str, Any]] = [{} for _ in range(num_envs)]
        self._returns = np.zeros(num_envs)
        self._lengths = np.zeros(num_envs, np.int64)
        super().__init__(num_envs, *spaces(self.fleet))

    def reset(self) -> np.ndarray:
        """Starts all members anew, their first episodes of staggered lengths; the same for the same seed."""
        self._returns[:] = 0
        self._lengths[:] = 0
        return self.fleet.reset(self._next_seed, stagger=True).copy()

    def seed(self, seed: int | None = None) -> list[int | None]:
        """Sets the seed of the next reset."""
        if seed is not None:
            self._next_seed = seed
        return [seed] * self.num_envs

    def step_async(self, actions: np.ndarray) -> None:
        """Remembers the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """One decision interval of every member."""
        observations, rewards, over = self.fleet.step(self._actions)
        rewards = rewards.copy()
        self._returns += rewards
        self._lengths += 1
        infos = self._infos
        if over.any():
            over = over.copy()
            infos = [{} for _ in range(self.num_envs)]
            for m in np.flatnonzero(over):
                infos[m] = {
                    "terminal_observation": observations[m].copy(),
                    "TimeLimit.truncated": True,
                    "episode": {"r": float(self._returns[m]), "l": int(self._lengths[m]), "t": 0.0},
                    "figures": self.fleet.episode_figures(int(m)),
                }
            self._returns[over] = 0
            self._lengths[over] = 0
            self.fleet.restart(over)
        return observations.copy(), rewards, over, infos

    def action_masks(self) -> np.ndarray:
        """Which choices of the grid can do anything now: bool (members, choices)."""
        return self.fleet.action_masks()

    def close(self) -> None:
        """Ends the fleet's threads."""
        self.fleet.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The same attribute for every member."""
        return [getattr(self, attr_name)] * len(self._chosen(indices))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Members have no attributes of their own."""
        raise AttributeError(f"Members of a fleet share their attributes; {attr_name} cannot be set for some.")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Calls a method of the whole; `action_masks` gives each chosen member its own."""
        result = getattr(self, method_name)(*args, **kwargs)
        return [result[m] for m in self._chosen(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: Any = None) -> list[bool]:
        """No member is wrapped. Episodes are monitored all the same: infos carry `episode`."""
        return [False] * len(self._chosen(indices))

    def _chosen(self, indices: int | Sequence[int] | None) -> list[int]:
        if indices is None:
            return list(range(self.num_envs))
        return [indices] if isinstance(indices, int) else list(indices)
