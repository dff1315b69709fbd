"""Agents as their YAML files describe them: each trains, the same way each time, or says why it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from agent_toys import GROUP, MEMBERS, TINY, make
from stable_baselines3.common.base_class import BaseAlgorithm

from flexirl.errors import UserError
from flexirl.experiments.configuration import CONF
from flexirl.policies.interface.action import NUM_DIALS
from flexirl.policies.training.agents import ALGORITHMS, LinearDecay, Normaliser, start_at


def weights(agent: BaseAlgorithm) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in agent.policy.state_dict().items()}


def test_every_algorithm_has_its_file() -> None:
    assert set(TINY) == set(ALGORITHMS) == {path.stem for path in (CONF / "agent").glob("*.yaml")}


@pytest.mark.parametrize("name", TINY)
def test_trains_and_learns_the_same_thing_each_time(name: str, tmp_path: Path) -> None:
    learned = []
    for _ in range(2):
        agent = make(name, tmp_path)
        before = weights(agent)
        agent.learn(320)
        assert agent.num_timesteps >= 320
        learned.append(weights(agent))
        changed = {key for key in before if not torch.equal(before[key], learned[-1][key])}
        assert any("weight" in key for key in changed)
        assert not any(".mean" in key or ".std" in key for key in changed), "normalisation is fixed before training"
        agent.get_env().close()  # type: ignore[union-attr]
    assert all(torch.equal(learned[0][key], learned[1][key]) for key in learned[0])
    assert all(torch.isfinite(tensor).all() for tensor in learned[0].values())


def test_other_seeds_learn_other_things(tmp_path: Path) -> None:
    first, second = (weights(make("grouped_ppo", tmp_path, seed=seed).learn(128)) for seed in (1, 2))
    assert any(not torch.equal(first[key], second[key]) for key in first)


def test_saved_agents_go_on(tmp_path: Path) -> None:
    agent = make("grouped_ppo", tmp_path).learn(128)
    agent.save(tmp_path / "policy.zip")
    loaded = ALGORITHMS["grouped_ppo"].load(tmp_path / "policy.zip", env=agent.get_env(), device="cpu")
    assert loaded.group_size == GROUP and loaded.rollout_buffer.group_size == GROUP  # type: ignore[attr-defined]
    observations = np.random.default_rng(0).uniform(0, 1, (50, *agent.observation_space.shape)).astype(np.float32)  # type: ignore[misc]
    actions = [each.predict(observations, deterministic=True)[0] for each in (agent, loaded)]
    assert (actions[0] == actions[1]).all()
    loaded.learn(128, reset_num_timesteps=False)
    assert loaded.num_timesteps == 256


@pytest.mark.parametrize(
    "name, kind, changes, message",
    [
        ("dqn", "dials", {}, "agent=dqn needs one discrete choice; add env=grid"),
        ("maskable_ppo", "dials", {}, "agent=maskable_ppo needs one discrete choice; add env=grid"),
        ("probing", "grid", {}, "agent=probing moves dials, and nothing else; add agent=grouped_ppo, or env=dials"),
        ("ppo", "dials", {"algorithm": "sac"}, "agent.algorithm=sac is unknown; choose from probing, grouped_ppo"),
        ("ppo", "dials", {"hyperparameters": {"rate": 1.0}, "decay_learning_rate": False}, "do not fit ppo.*rate"),
        ("ppo", "dials", {"hyperparameters": {"learning_rate": "fast"}}, "do not fit ppo.*fast"),
        ("ppo", "dials", {"network": {"layers": [8], "activation": "gelu", "log_std": -1}}, "gelu is unknown"),
    ],
)  # fmt: skip
def test_mistakes_are_named(name: str, kind: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        make(name, tmp_path, kind, **changes)


def test_agents_of_one_choice_or_many_numbers_fit_the_other_spaces(tmp_path: Path) -> None:
    for name, kind in (("ppo", "grid"), ("a2c", "grid"), ("grouped_ppo", "scores")):
        make(name, tmp_path, kind).learn(128)


def test_a_new_agent_plays_the_heuristic(tmp_path: Path) -> None:
    """Warm start: before training all dials stand near zero, with the exploration noise of the configuration."""
    agent = make("ppo", tmp_path)
    observations = agent.get_env().reset()  # type: ignore[union-attr]
    assert abs(agent.predict(observations, deterministic=True)[0]).max() < 0.05  # type: ignore[arg-type]
    assert weights(agent)["log_std"].numpy() == pytest.approx(np.full(NUM_DIALS, -1.5))


@pytest.mark.parametrize("name", ["grouped_ppo", "ppo", "a2c", "recurrent_ppo"])
def test_an_agent_starts_at_given_dials(name: str, tmp_path: Path) -> None:
    agent = make(name, tmp_path)
    dials = np.linspace(-0.9, 0.9, NUM_DIALS)
    start_at(agent, dials.tolist())
    taken, _ = agent.predict(agent.get_env().reset(), deterministic=True)  # type: ignore[union-attr, arg-type]
    assert taken == pytest.approx(np.tile(dials, (MEMBERS, 1)), abs=0.06)


def test_normaliser_takes_out_mean_and_deviation() -> None:
    rng = np.random.default_rng(0)
    sample = rng.normal([3.0, -1.0, 0.5], [2.0, 0.01, 0.0], (5000, 3)).astype(np.float32)
    module = Normaliser(gym.spaces.Box(-100, 100, (3,), np.float32))
    assert (module(torch.tensor(sample[:5])) == torch.tensor(sample[:5]).clamp(-5, 5)).all()
    module.set(sample)
    result = module(torch.tensor(sample)).numpy()
    assert result.mean(axis=0) == pytest.approx(np.zeros(3), abs=0.01)
    assert result.std(axis=0) == pytest.approx([1, 1, 0], abs=0.02)  # what does not vary is only shifted
    assert module(torch.tensor([[1000.0, -1.0, -9.0]])).tolist()[0] == pytest.approx([5, 0, -5], abs=0.1)


def test_normalisation_is_set_from_what_the_heuristic_observes(tmp_path: Path) -> None:
    agent = make("dqn", tmp_path)
    modules = [module for module in agent.policy.modules() if isinstance(module, Normaliser)]
    assert len(modules) == 2  # the target network has its own
    assert all(torch.equal(module.mean, modules[0].mean) for module in modules) and modules[0].mean.abs().sum() > 0


def test_the_learning_rate_falls_to_a_tenth(tmp_path: Path) -> None:
    decay = LinearDecay(2e-3)
    assert [decay(left) for left in (1.0, 0.5, 0.0)] == pytest.approx([2e-3, 1.1e-3, 2e-4])
    agent = make("ppo", tmp_path).learn(256)
    assert agent.lr_schedule(1.0) == pytest.approx(10 * agent.lr_schedule(0.0))
    assert agent.policy.optimizer.param_groups[0]["lr"] < agent.lr_schedule(1.0)
