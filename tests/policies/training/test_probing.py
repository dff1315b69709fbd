"""Probing: one agent comes to set the dials in each task as that task wants them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from agent_toys import setting
from stable_baselines3.common.base_class import BaseAlgorithm

from flexirl.envs.fleet import Fleet, Task
from flexirl.envs.sb3 import BatchingVecEnv
from flexirl.policies.interface.action import NUM_DIALS
from flexirl.policies.interface.observation import SIZE
from flexirl.policies.training import probing
from flexirl.policies.training.agents import make_agent

PROBED = probing.PROBED_DIALS

# A task is known by its promise: an iteration is another share of it.
TASK = setting("probing", "dials")[1]
TASKS = [TASK, replace(TASK, slo=replace(TASK.slo, tpot_s=4 * TASK.slo.tpot_s))]
ROUND = 2 * (1 + 2 * len(PROBED)) * 30  # decisions: two episodes of 30, each with every dial up and down


def probing_agent(folder: Path, tasks: Sequence[Task] = TASKS, seed: int = 3, **changes: Any) -> probing.Probing:
    """A new agent, at zero of all dials."""
    config = setting("probing", "dials")[0]
    config = {**config, "hyperparameters": {**config["hyperparameters"], **changes}}
    agent = make_agent(config, BatchingVecEnv(Fleet(tasks, 8, 4, 4), seed), 4, seed, folder)
    assert isinstance(agent, probing.Probing)
    return agent


def acts(agent: BaseAlgorithm) -> np.ndarray:
    return probing.mean_action(agent, np.zeros((1, SIZE), np.float32))


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
    monkeypatch.setattr(probing, "EVERY", 1)
    monkeypatch.setattr(probing, "BATCH", 256)
    agent = probing_agent(tmp_path, updates=300, remembered=4)
    before = [weight.clone() for weight in agent.policy.mlp_extractor.value_net.parameters()]
    agent.learn(12 * ROUND)
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


def test_the_same_seed_makes_the_same_agent(tmp_path: Path) -> None:
    def improved(seed: int) -> np.ndarray:
        return acts(probing_agent(tmp_path, seed=seed).learn(2 * ROUND))

    assert (improved(2) == improved(2)).all() and (improved(2) != improved(3)).any()


def test_steps_are_decisions_and_all_tasks_have_their_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[float] = []
    probe = probing.probe

    def watched(agent: BaseAlgorithm, tasks: Sequence[Task], move: float, seed: int) -> probing.Probe:
        probed.extend(task.slo.ttft_s for task in tasks)
        return probe(agent, tasks, move, seed)

    monkeypatch.setattr(probing, "probe", watched)
    tasks = [replace(TASK, slo=replace(TASK.slo, ttft_s=1.0 + i)) for i in range(6)]
    agent = probing_agent(tmp_path, tasks).learn(5 * ROUND + 1)
    assert agent.num_timesteps == 6 * ROUND and agent.probed == len(probed) == 12
    assert sorted(probed[:6]) == sorted(probed[6:]) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert len(agent.lessons) == 2


def test_interrupted_it_goes_on_from_its_last_round_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = probing_agent(tmp_path).learn(4 * ROUND)
    fit, calls = probing._fit, []

    def interrupted(*given: Any) -> float:
        calls.append(given)
        loss = fit(*given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loss

    monkeypatch.setattr(probing, "_fit", interrupted)
    agent = probing_agent(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        agent.learn(4 * ROUND)
    agent.save(tmp_path / "policy.zip")
    other = probing.Probing.load(tmp_path / "policy.zip", env=agent.env)
    assert other.num_timesteps == 2 * ROUND
    other.learn(2 * ROUND, reset_num_timesteps=False)
    assert len(calls) == 5 and (acts(other) == acts(whole)).all()


@pytest.mark.parametrize("tasks", [TASKS, TASKS[:1]])
def test_lessons_are_of_the_agent_itself(tasks: Sequence[Task], tmp_path: Path) -> None:
    """Observations and actions are those of an episode that the agent plays alone."""
    agent = probing_agent(tmp_path, tasks)
    probed = probing.probe(agent, tasks, 0.2, seed=5)
    lessons = probed.lessons
    fleet = Fleet(tasks, len(tasks), 1, len(tasks))
    observations = fleet.reset(5)
    for step in range(30):
        if step % probing.EVERY == 0:
            for lesson, observed in zip(lessons, observations, strict=True):
                assert (lesson.observed[step // probing.EVERY] == observed).all()
        observations = fleet.step(probing.mean_action(agent, observations))[0]
    assert all(lesson.wanted.shape == lesson.weights.shape == (3, NUM_DIALS) for lesson in lessons)
    assert probed.figures == [fleet.episode_figures(m) for m in range(len(tasks))]
    assert probed.decisions == 30 * len(tasks) * (1 + 2 * len(PROBED))


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
