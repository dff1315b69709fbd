"""`flexirl/Batching-v0` and `LiveBatching-v0`: one serving engine whose admission and preemption the agent decides."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from flexirl.envs.fleet import Fleet
from flexirl.envs.vector import spaces
from flexirl.runtime.simulator.simulation import TIMELINE, timeline_row


class BatchingEnv(gym.Env[np.ndarray, Any]):
    """An engine that serves immediate and deferred requests of a scenario: a surrogate one, or, of a `LiveFleet`, live.

    Observation: `TABLE` of `flexirl.policies.interface.observation` (and `REQUEST_TABLE` per visible request with
    `action="scores"`). Action: `DIALS` of `flexirl.policies.interface.action` in [-1, 1]; with `action="grid"` one of
    `GRID`; with `action="scores"` one score per visible request. Reward: of the task, per decision interval. An episode
    never terminates; it is truncated after the scenario's duration. `info` is empty until the end, where it holds the
    episode's `figures`.
    """

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": 5}  # noqa: RUF012

    def __init__(self, fleet: Fleet, render_mode: str | None = None) -> None:
        """fleet: of one member, used by this environment alone."""
        self.fleet = fleet
        self.task = fleet.task
        self.render_mode = render_mode
        self.observation_space, self.action_space = spaces(self.fleet)
        self._timeline: list[tuple[float, ...]] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Starts an episode; its arrivals follow from the seed."""
        super().reset(seed=seed)
        observations = self.fleet.reset(int(self.np_random.integers(2**31)))
        self._timeline = [timeline_row(self.fleet.state(0))]
        return observations[0].copy(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        """One decision interval."""
        observations, rewards, over = self.fleet.step(np.asarray(action)[None])
        if self.render_mode is not None:
            self._timeline.append(timeline_row(self.fleet.state(0)))
        info = {"figures": self.fleet.episode_figures(0)} if over[0] else {}
        if self.render_mode == "human":
            self.render()
        return observations[0].copy(), float(rewards[0]), False, bool(over[0]), info

    def action_masks(self) -> np.ndarray:
        """Which choices of the grid can do anything now, for sb3-contrib's MaskablePPO."""
        return self.fleet.action_masks()[0]

    def render(self) -> np.ndarray | None:
        """The episode so far as a picture of queues, KV cache and batch: uint8 (height, width, 3), or a window."""
        from flexirl.envs.picture import timeline_figure

        figure = timeline_figure(np.array(self._timeline, TIMELINE), self.task.scenario.name)
        if self.render_mode == "human":
            _show(figure)
            return None
        figure.canvas.draw()
        return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]

    def close(self) -> None:
        """Ends what the fleet still runs."""
        self.fleet.close()


def _show(figure: Any) -> None:
    """Shows the picture in a window; does nothing but draw where there is no screen."""
    import matplotlib.pyplot as plt

    window = plt.figure(num="flexirl", figsize=figure.get_size_inches(), clear=True)
    figure.canvas.draw()
    axes = window.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.axis("off")
    axes.imshow(np.asarray(figure.canvas.buffer_rgba()))
    plt.pause(0.001)
