"""Probing: one agent comes to set the dials in each task as that task wants them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from agent_toys import make, setting
from stable_baselines3.common.base_class import BaseAlgorithm

from flexirl.envs.fleet import Fleet, Task
from flexirl.policies.interface.action import NUM_DIALS
from flexirl.policies.interface.observation import SIZE
from flexirl.policies.training import probing

PROBED = probing.PROBED_DIALS

# A task is known by its promise: an iteration is another share of it.
TASK = setting("grouped_ppo", "dials")[1]
TASKS = [TASK, replace(TASK, slo=replace(TASK.slo, tpot_s=4 * TASK.slo.tpot_s))]


def improve(agent: BaseAlgorithm, seed: int) -> None:
    """All rounds."""
    for _ in probing.improve(agent, TASKS, seed, probing.NOTHING, progress=False):
        pass


class Wishes(Fleet):
    """A fleet whose engines earn by how near the dials are to what their task wants."""

    WANTED = np.array([[0.5] * NUM_DIALS, [-0.4] * NUM_DIALS])

    def reset(self, seed: int, stagger: bool = False) -> np.ndarray:
        self.missed, self.steps = np.zeros(self.members), 0
        return super().reset(seed, stagger)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        loose = [task.slo.tpot_s > TASK.slo.tpot_s for task in self.tasks]
        wanted = np.repeat(self.WANTED[np.array(loose, int)], self.group_size, axis=0)
        self.missed += ((action - wanted) ** 2).sum(axis=1)
        self.steps += 1
        return super().step(action)

    def episode_figures(self, member: int) -> dict[str, float]:
        return {"worth_share": 10.0 - self.missed[member] / self.steps}


def test_the_agent_finds_what_each_task_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "Fleet", Wishes)
    for name, value in {"ROUNDS": 12, "EVERY": 1, "UPDATES": 300, "BATCH": 256}.items():
        monkeypatch.setattr(probing, name, value)
    agent = make("grouped_ppo", tmp_path)
    before = [weight.clone() for weight in agent.policy.mlp_extractor.value_net.parameters()]
    improve(agent, 1)
    fleet = Fleet(TASKS, 2, 1, 2)
    observations = fleet.reset(99)
    errors = []
    for _ in range(30):
        action = probing.mean_action(agent, observations)
        errors.append((action - Wishes.WANTED)[:, PROBED])
        observations = fleet.step(action)[0]
    assert np.sqrt(np.mean(np.square(errors))) < 0.2  # the two are 0.9 apart
    after = agent.policy.mlp_extractor.value_net.parameters()
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_the_same_seed_makes_the_same_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ROUNDS": 2, "UPDATES": 20, "BATCH": 256}.items():
        monkeypatch.setattr(probing, name, value)

    def improved(seed: int) -> np.ndarray:
        agent = make("grouped_ppo", tmp_path)
        improve(agent, seed)
        return probing.mean_action(agent, np.zeros((1, SIZE), np.float32))

    assert (improved(2) == improved(2)).all() and (improved(2) != improved(3)).any()


@pytest.mark.parametrize("tasks", [TASKS, TASKS[:1]])
def test_lessons_are_of_the_agent_itself(tasks: Sequence[Task], tmp_path: Path) -> None:
    """Observations and actions are those of an episode that the agent plays alone."""
    agent: Any = make("grouped_ppo", tmp_path)
    lessons = probing.probe(agent, tasks, 0.2, seed=5)
    fleet = Fleet(tasks, len(tasks), 1, len(tasks))
    observations = fleet.reset(5)
    for step in range(30):
        if step % probing.EVERY == 0:
            for lesson, observed in zip(lessons, observations, strict=True):
                assert (lesson.observed[step // probing.EVERY] == observed).all()
        observations = fleet.step(probing.mean_action(agent, observations))[0]
    assert all(lesson.wanted.shape == lesson.weights.shape == (3, NUM_DIALS) for lesson in lessons)


def test_tops_are_those_of_the_parabolas() -> None:
    top, curvature = np.linspace(-0.3, 0.3, NUM_DIALS), np.linspace(0.5, 4.0, NUM_DIALS)

    def worth(dials: np.ndarray) -> float:
        return float(1.0 - 0.5 * curvature @ (dials - top) ** 2)

    here = worth(np.zeros(NUM_DIALS))
    moved = [worth(sign * 0.2 * dial) for sign in (1, -1) for dial in np.eye(NUM_DIALS)[PROBED]]
    offsets, weights = probing.tops(7.0 * np.array([here, *moved]), 0.2)
    curvature /= here
    assert weights[PROBED] == pytest.approx((curvature + probing.STIFFNESS)[PROBED], rel=1e-5)
    assert offsets[PROBED] == pytest.approx((top * curvature / weights)[PROBED], rel=1e-4)
    others = np.delete(np.arange(NUM_DIALS), PROBED)
    assert (offsets[others] == 0).all() and weights[others] == pytest.approx(probing.STIFFNESS)


def test_a_dial_without_effect_stays_and_one_without_top_goes_as_far_as_is_believed() -> None:
    worth = np.ones(1 + 2 * len(PROBED))
    worth[1], worth[1 + len(PROBED)] = 1.1, 0.9
    offsets, weights = probing.tops(worth, 0.2)
    assert offsets.tolist() == pytest.approx([0.2 * probing.REACH, *[0.0] * (NUM_DIALS - 1)])
    assert weights == pytest.approx(probing.STIFFNESS)


def test_an_agent_that_earns_nothing_goes_where_something_is_earned_if_anywhere() -> None:
    worth = np.zeros(1 + 2 * len(PROBED))
    offsets, weights = probing.tops(worth, 0.2)
    assert (offsets == 0).all() and weights == pytest.approx(probing.STIFFNESS)
    worth[1] = 3.0
    offsets, weights = probing.tops(worth, 0.2)
    assert offsets.tolist() == pytest.approx([0.2 * probing.REACH, *[0.0] * (NUM_DIALS - 1)])
    assert np.isfinite(weights).all()
