"""Probing: one agent comes to set the dials in each task as that task wants them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from test_agents import make, setting

from flexirl.envs.action import NUM_DIALS
from flexirl.envs.fleet import Fleet, Task
from flexirl.envs.observation import SIZE
from flexirl.policies import probing
from flexirl.policies.grouped_ppo import GroupedPPO

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
        return {"revenue_share": 10.0 - self.missed[member] / self.steps}


def test_the_agent_finds_what_each_task_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "Fleet", Wishes)
    for name, value in {"ROUNDS": 20, "EVERY": 1, "UPDATES": 200, "BATCH": 256}.items():
        monkeypatch.setattr(probing, name, value)
    agent = make("grouped_ppo", tmp_path)
    before = [weight.clone() for weight in agent.policy.mlp_extractor.value_net.parameters()]
    improve(agent, 1)
    fleet = Fleet(TASKS, 2, 1, 2)
    observations = fleet.reset(99)
    errors = []
    for _ in range(30):
        action = probing.mean_action(agent, observations)
        errors.append(action - Wishes.WANTED)
        observations = fleet.step(action)[0]
    assert np.sqrt(np.mean(np.square(errors))) < 0.2  # the two are 0.9 apart
    after = agent.policy.mlp_extractor.value_net.parameters()
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_the_same_seed_makes_the_same_agent_also_after_a_break(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ROUNDS": 3, "UPDATES": 20, "BATCH": 256, "REMEMBERED": 2}.items():
        monkeypatch.setattr(probing, name, value)

    def acts(agent: BaseAlgorithm) -> np.ndarray:
        return probing.mean_action(agent, np.zeros((1, SIZE), np.float32))

    def improved(seed: int) -> np.ndarray:
        agent = make("grouped_ppo", tmp_path)
        improve(agent, seed)
        return acts(agent)

    assert (improved(2) == improved(2)).all() and (improved(2) != improved(3)).any()

    agent = make("grouped_ppo", tmp_path)
    for reached in probing.improve(agent, TASKS, 2, probing.NOTHING, progress=False):
        if reached.rounds == 2:
            break
    agent.save(tmp_path / "policy.zip")
    reached.save(tmp_path / "lessons.npz")
    agent = GroupedPPO.load(tmp_path / "policy.zip")
    rounds = [
        after.rounds
        for after in probing.improve(agent, TASKS, 2, probing.Progress.load(tmp_path / "lessons.npz"), False)
    ]
    assert rounds == [3] and (acts(agent) == improved(2)).all()


@pytest.mark.parametrize("tasks", [TASKS, TASKS[:1]])
def test_probes_are_of_the_agent_itself(tasks: Sequence[Task], tmp_path: Path) -> None:
    """Observations and actions are those of an episode that the agent plays alone."""
    agent: Any = make("grouped_ppo", tmp_path)
    probes = probing.probe(agent, tasks, 0.2, seed=5)
    fleet = Fleet(tasks, len(tasks), 1, len(tasks))
    observations = fleet.reset(5)
    for step in range(30):
        action = probing.mean_action(agent, observations)
        if step % probing.EVERY == 0:
            for one, observed, taken in zip(probes, observations, action, strict=True):
                assert (one.observed[step // probing.EVERY] == observed).all()
                assert one.taken[step // probing.EVERY] == pytest.approx(taken, abs=1e-6)
        observations = fleet.step(action)[0]
    assert all(one.taken.shape == (3, NUM_DIALS) and one.slopes.shape == (NUM_DIALS,) for one in probes)


def test_neither_other_dials_nor_pairs_of_them_are_taken_for_the_worth_of_a_dial() -> None:
    rng = np.random.default_rng(0)
    slopes, pairs = rng.normal(size=NUM_DIALS), rng.normal(size=(NUM_DIALS, NUM_DIALS))

    def worth(dials: np.ndarray) -> float:
        return float(7.0 * (1.0 + slopes @ dials + dials @ pairs @ dials))

    worths = np.array([worth(np.zeros(NUM_DIALS)), *(worth(0.1 * row) for row in probing.DESIGN)])
    assert probing.slopes_of(worths, 0.1) == pytest.approx(slopes, rel=1e-5)


def test_the_mean_slope_has_an_eighth_of_the_variance_of_single_moves() -> None:
    noise = np.random.default_rng(1).normal(scale=0.01, size=(20_000, 1 + len(probing.DESIGN)))
    designed = np.array([probing.slopes_of(1 + row * [0, *[1] * len(probing.DESIGN)], 0.1)[3] for row in noise[:4000]])
    single = (noise[:, 1] - noise[:, 2]) / (2 * 0.1)
    assert np.var(single) / np.var(designed) == pytest.approx(8, rel=0.1)


def test_an_agent_that_earns_nothing_has_slopes_where_something_is_earned() -> None:
    worth = np.zeros(1 + len(probing.DESIGN))
    assert (probing.slopes_of(worth, 0.2) == 0).all()
    worth[1] = 3.0
    assert probing.slopes_of(worth, 0.2) == pytest.approx(probing.DESIGN[0] / (16 * 0.2))


def test_typical_slopes_are_one_move_and_steep_ones_two() -> None:
    slopes = np.zeros((8, NUM_DIALS), np.float32)
    slopes[:, 0] = [1, -1, 1, 1, -1, 1, -1, 1]
    slopes[:, 1] = 0.1 * slopes[:, 0]
    slopes[3, 2] = -5.0
    probes = [probing.Probe(np.zeros((2, SIZE)), np.full((2, NUM_DIALS), 0.3), one) for one in slopes]
    wanted = probing.lesson_of(probes, 0.1).wanted.reshape(8, 2, NUM_DIALS) - 0.3
    assert wanted[:, 1, 0] == pytest.approx(0.1 * slopes[:, 0], rel=0.01)
    assert wanted[:, 1, 1] == pytest.approx(0.1 * slopes[:, 0], rel=0.05)
    assert wanted[3, :, 2] == pytest.approx(-0.1 * probing.REACH)
    assert np.count_nonzero(np.abs(wanted[:, :, 2:]) > 1e-6) == 2
