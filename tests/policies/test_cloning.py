"""Cloning: one agent learns each task's own setting of the dials from what it observes there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_agents import make, setting

from flexirl.envs.action import NUM_DIALS
from flexirl.envs.fleet import Fleet
from flexirl.policies.cloning import clone

# A task is known by its promise: an iteration is another share of it.
TASK = setting("grouped_ppo", "dials")[1]
TASKS = [TASK, replace(TASK, slo=replace(TASK.slo, tpot_s=4 * TASK.slo.tpot_s))]


def test_the_agent_takes_each_tasks_own_setting(tmp_path: Path) -> None:
    agent = make("grouped_ppo", tmp_path)
    value_before = [weight.clone() for weight in agent.policy.mlp_extractor.value_net.parameters()]
    dials = np.zeros((2, NUM_DIALS))
    dials[0], dials[1] = 0.5, -0.4
    dials[:, 5] = 0.0  # nothing is preempted
    left = clone(agent, TASKS, dials, seed=1)
    fleet = Fleet(TASKS, 2, 1, 2)
    observations = fleet.reset(99)
    errors = []
    for _ in range(30):
        action, _ = agent.predict(observations, deterministic=True)
        errors.append(action - dials)
        observations = fleet.step(action)[0]
    assert np.sqrt(np.mean(np.square(errors))) < 0.15
    assert left < 0.1
    untouched = zip(value_before, agent.policy.mlp_extractor.value_net.parameters(), strict=True)
    assert all(torch.equal(before, after) for before, after in untouched)


def test_cloning_is_deterministic(tmp_path: Path) -> None:
    dials = np.stack([np.full(NUM_DIALS, 0.2), np.full(NUM_DIALS, -0.2)])
    left = [clone(make("grouped_ppo", tmp_path), TASKS, dials, seed=2) for _ in range(2)]
    assert left[0] == pytest.approx(left[1], rel=1e-6)
