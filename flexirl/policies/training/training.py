"""Training: watches an agent learn, validates it on arrivals it does not train on, keeps the best."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from sb3_contrib import MaskablePPO
from stable_baselines3 import DQN
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from flexirl.envs.fleet import Fleet
from flexirl.envs.rollout import play
from flexirl.policies.interface.action import DIALS
from flexirl.policies.training.probing import Probing
from flexirl.progress import progress_bar

FIGURES = (
    "value_per_s", "revenue_per_s", "worth_share", "immediate_attainment", "deferred_tokens_per_s", "preemptions_per_s",
)  # fmt: skip


def validate(agent: BaseAlgorithm, fleet: Fleet, seed: int) -> dict[str, float]:
    """Mean figures of the agent's deterministic policy over one episode of every member."""
    masked = isinstance(agent, MaskablePPO)
    memory: Any = None
    began = np.ones(fleet.members, bool)

    def act(observations: np.ndarray) -> np.ndarray:
        nonlocal memory
        masks: dict[str, Any] = {"action_masks": fleet.action_masks()} if masked else {}
        action, memory = agent.predict(observations, state=memory, episode_start=began, deterministic=True, **masks)
        began[:] = False
        return action

    played = play(fleet, seed, act)
    return {**{name: played.mean(name) for name in FIGURES}, "reward": float(played.rewards.mean())}


class Training(BaseCallback):
    """Progress bar, TensorBoard figures, validation at regular steps, best and last checkpoint.

    `history` has one row per validation: steps and the figures of `validate`.
    """

    def __init__(
        self, fleet: Fleet, folder: Path, total_steps: int, every_steps: int, seed: int, progress: bool
    ) -> None:
        """fleet: validates one episode of each of its members every `every_steps` steps, with this seed."""
        super().__init__()
        self.folder, self.total_steps, self.every_steps = folder, total_steps, every_steps
        self.history: list[dict[str, float]] = []
        self._fleet = fleet
        self._seed = seed
        self._shows_progress = progress
        self._episodes: deque[dict[str, float]] = deque(maxlen=200)
        self._rewards: deque[float] = deque(maxlen=200)
        self._next = 0
        self._actions: np.ndarray | None = None

    @property
    def best(self) -> dict[str, float]:
        """The validation with the most of what the reward is about, as a share so that every task counts alike."""
        return max(self.history, key=lambda row: row["worth_share"])

    def _on_training_start(self) -> None:
        self._progress = progress_bar(
            self.total_steps, " steps", self._shows_progress, initial=self.num_timesteps, smoothing=0.05
        )
        self._next = self.num_timesteps  # the starting point is validated too

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "figures" in info:
                self._episodes.append(info["figures"])
                self._rewards.append(info["episode"]["r"])
        self._actions = self.locals["actions"]
        if self.num_timesteps >= self._next:
            self._validate()
            self._next += self.every_steps
        return True

    def _on_rollout_end(self) -> None:
        self._progress.update(self.num_timesteps - self._progress.n)
        if self._episodes:
            self.logger.record("episode/reward", float(np.mean(self._rewards)))
            for name in FIGURES:
                self.logger.record(f"episode/{name}", float(np.mean([figures[name] for figures in self._episodes])))
        taken = self._actions if isinstance(self.model, DQN | Probing) else self.model.rollout_buffer.actions  # type: ignore[attr-defined]
        writer = self._tensorboard()
        if writer is not None and taken is not None and len(taken) > 0:
            numbers = np.asarray(taken, np.float32).reshape(-1, int(np.prod(self.model.action_space.shape or 1)))
            names = [dial.name for dial in DIALS] if numbers.shape[1] == len(DIALS) else None
            for i in range(numbers.shape[1]):
                writer.add_histogram(f"action/{names[i] if names else i}", numbers[:, i], self.num_timesteps)

    def _on_training_end(self) -> None:
        self._validate()
        self.logger.dump(self.num_timesteps)  # nothing else would, after the last rollout
        self._progress.update(self.num_timesteps - self._progress.n)
        self._progress.close()
        writer = self._tensorboard()
        if writer is not None:
            writer.add_hparams(
                {"agent": type(self.model).__name__, "gamma": self.model.__dict__["gamma"], "seed": self._seed},
                {"validation/best_worth_share": self.best["worth_share"]},
            )

    def _validate(self) -> None:
        figures = validate(self.model, self._fleet, self._seed)
        self.history.append({"steps": float(self.num_timesteps), **figures})
        if self.best is self.history[-1]:
            self.model.save(self.folder / "best.zip")
        self.model.save(self.folder / "policy.zip")
        (self.folder / "history.json").write_text(json.dumps(self.history, indent=1) + "\n")
        for name, value in figures.items():
            self.logger.record(f"validation/{name}", value)
        self._progress.set_postfix_str(
            f"validation value {figures['value_per_s']:,.0f}/s, attainment {figures['immediate_attainment']:.3f},"
            f" best {self.best['value_per_s']:,.0f}/s"
        )

    def _tensorboard(self) -> Any:
        for output in self.logger.output_formats:
            if hasattr(output, "writer"):
                return output.writer
        return None
