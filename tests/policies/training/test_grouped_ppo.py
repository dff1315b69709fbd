"""The groups' baseline and the advantages made with it, against loops that follow the definitions."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

from flexirl.policies.training.grouped_ppo import GroupedRolloutBuffer, relative_to_others

STEPS, MEMBERS, GROUP = 11, 12, 4
GAMMA, LAMBDA = 0.97, 0.9


def naive_relative(rewards: np.ndarray, group_size: int) -> np.ndarray:
    result = np.empty_like(rewards)
    for t in range(len(rewards)):
        for m in range(rewards.shape[1]):
            first = m - m % group_size
            others = [rewards[t, i] for i in range(first, first + group_size) if i != m]
            result[t, m] = rewards[t, m] - (sum(others) / len(others) if others else 0.0)
    return result


@pytest.mark.parametrize("group_size", [1, 2, 4, 12])
def test_rewards_relative_to_the_others_of_the_group(group_size: int) -> None:
    rewards = np.random.default_rng(0).normal(size=(STEPS, MEMBERS))
    before = rewards.copy()
    assert relative_to_others(rewards, group_size) == pytest.approx(naive_relative(rewards, group_size))
    assert (rewards == before).all()


def test_a_members_baseline_does_not_depend_on_its_own_reward() -> None:
    """That is what keeps the gradient unbiased: what is subtracted is the same whatever the member did."""
    rng = np.random.default_rng(1)
    rewards = rng.normal(size=(STEPS, MEMBERS))
    for m in range(MEMBERS):
        changed = rewards.copy()
        changed[:, m] += rng.normal(size=STEPS)
        baseline = rewards[:, m] - relative_to_others(rewards, GROUP)[:, m]
        assert changed[:, m] - relative_to_others(changed, GROUP)[:, m] == pytest.approx(baseline)


def test_what_the_arrivals_did_to_all_is_gone() -> None:
    rng = np.random.default_rng(2)
    own, shared = rng.normal(size=(STEPS, MEMBERS)), 50 * rng.normal(size=(STEPS, MEMBERS // GROUP))
    together = own + np.repeat(shared, GROUP, axis=1)
    assert relative_to_others(together, GROUP) == pytest.approx(relative_to_others(own, GROUP))


def test_the_gradient_keeps_its_mean_and_loses_its_noise() -> None:
    """A bandit whose reward is 0.3 x action + what a group shares: the score-function estimate of the slope."""
    rng = np.random.default_rng(3)
    actions = rng.normal(size=(40_000, MEMBERS))
    rewards = 0.3 * actions + 5 * np.repeat(rng.normal(size=(40_000, MEMBERS // GROUP)), GROUP, axis=1)
    plain, relative = (actions * rewards).mean(axis=1), (actions * relative_to_others(rewards, GROUP)).mean(axis=1)
    assert relative.mean() == pytest.approx(0.3, abs=0.01)
    assert plain.std() > 5 * relative.std()


@pytest.mark.parametrize("group_size", [1, GROUP])
def test_advantages_against_the_sum_that_defines_them(group_size: int) -> None:
    rng = np.random.default_rng(4)
    space = gym.spaces.Box(-1, 1, (3,), np.float32)
    buffer = GroupedRolloutBuffer(
        STEPS, space, space, gae_lambda=LAMBDA, gamma=GAMMA, n_envs=MEMBERS, group_size=group_size
    )
    rewards = rng.normal(size=(STEPS, MEMBERS)).astype(np.float32)
    values = rng.normal(size=(STEPS + 1, MEMBERS)).astype(np.float32)
    starts = np.repeat(rng.random((STEPS + 1, MEMBERS // GROUP)) < 0.2, GROUP, axis=1)
    nothing = np.zeros((MEMBERS, 3), np.float32)
    for t in range(STEPS):
        buffer.add(nothing, nothing, rewards[t], starts[t], torch.tensor(values[t]), torch.zeros(MEMBERS))
    buffer.compute_returns_and_advantage(torch.tensor(values[STEPS]), starts[STEPS])

    relative = naive_relative(rewards, group_size)
    for m in range(MEMBERS):
        for t in range(STEPS):
            advantage, weight = 0.0, 1.0
            for k in range(t, STEPS):
                ends = bool(starts[k + 1, m])
                advantage += weight * (relative[k, m] + GAMMA * values[k + 1, m] * (not ends) - values[k, m])
                if ends:
                    break
                weight *= GAMMA * LAMBDA
            assert buffer.advantages[t, m] == pytest.approx(advantage, abs=1e-5)
    assert buffer.returns == pytest.approx(buffer.advantages + values[:STEPS])
