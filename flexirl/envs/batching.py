"""`flexirl/Batching-v0` and `LiveBatching-v0`: one serving engine whose admission and preemption the agent decides."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from flexirl.envs.fleet import Fleet
from flexirl.envs.vector import spaces
from flexirl.runtime.simulator.simulation import TIMELINE, timeline_row
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

# What `info` counts, and the running totals that it is the difference of. Promises kept are booked when a request ends,
# those lost when they can no longer be kept; tokens are prompt and output tokens made.
COUNTED = {
    "arrived": "arrived", "finished": "finished", "kept": "kept", "lost": "lost", "prompt_tokens": "prompt_done",
    "output_tokens": "output_done", "preemptions": "preemptions",
}  # fmt: skip


class BatchingEnv(gym.Env[np.ndarray, Any]):
    """An engine that serves immediate and deferred requests of a scenario: a surrogate one, or, of a `LiveFleet`, live.

    Observation: `TABLE` of `flexirl.policies.interface.observation` (and `REQUEST_TABLE` per visible request with
    `action="scores"`). Action: `DIALS` of `flexirl.policies.interface.action` in [-1, 1]; with `action="grid"` one of
    `GRID`; with `action="scores"` one score per visible request. Reward: of the task, per decision interval. An episode
    never terminates; it is truncated after the scenario's duration. `info` holds, for rewards of one's own, what came
    about in the interval: by class the `COUNTED` of requests and tokens, and `elapsed_s`; at the end of an episode also
    its `figures`.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012

    def __init__(self, fleet: Fleet, render_mode: str | None = None) -> None:
        """fleet: of one member, used by this environment alone."""
        self.fleet = fleet
        self.task = fleet.task
        self.render_mode = render_mode
        self.observation_space, self.action_space = spaces(self.fleet)
        self._timeline: list[tuple[float, ...]] = []
        self._before: tuple[float, np.ndarray] | None = None  # totals at the end of the last interval

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Starts an episode; its arrivals follow from the seed."""
        super().reset(seed=seed)
        observations = self.fleet.reset(int(self.np_random.integers(2**31)))
        self._timeline = [timeline_row(self.fleet.state(0))]
        self._before = 0.0, np.zeros_like(self._totals()[1])
        return observations[0].copy(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        """One decision interval; raises ValueError for an action that holds NaN or has another shape."""
        if self._before is None:
            raise gym.error.ResetNeeded("step comes before reset; reset starts an episode.")
        observations, rewards, over = self.fleet.step(np.asarray(action)[None])
        if self.render_mode is not None:
            self._timeline.append(timeline_row(self.fleet.state(0)))
        info = self._came_about()
        if over[0]:
            info["figures"] = self.fleet.episode_figures(0)
        return observations[0].copy(), float(rewards[0]), False, bool(over[0]), info

    def _totals(self) -> tuple[float, np.ndarray]:
        """The scheduler's clock (s), and `CLASS` totals of both classes since the start."""
        state = self.fleet.state(0)
        return float(state.scheduler["now_s"][0]), state.classes.copy()

    def _came_about(self) -> dict[str, Any]:
        """What has since the last call."""
        assert self._before is not None
        (before_s, before), (now_s, now) = self._before, self._totals()
        self._before = now_s, now
        classes = ((IMMEDIATE, "immediate"), (DEFERRED, "deferred"))
        counts = {
            name: {count: int(now[which][field] - before[which][field]) for count, field in COUNTED.items()}
            for which, name in classes
        }
        return {"elapsed_s": now_s - before_s, **counts}

    def action_masks(self) -> np.ndarray:
        """Which choices of the grid can do anything now, for sb3-contrib's MaskablePPO."""
        return self.fleet.action_masks()[0]

    def render(self) -> np.ndarray:
        """The episode so far as a picture of queues, KV cache and batch: uint8 (height, width, 3)."""
        from flexirl.envs.picture import timeline_figure

        figure = timeline_figure(np.array(self._timeline, TIMELINE), self.task.scenario.name)
        figure.canvas.draw()
        return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]

    def close(self) -> None:
        """Ends what the fleet still runs."""
        self.fleet.close()
