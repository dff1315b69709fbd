"""Agents: stable-baselines3 algorithms made from data, with the observation's normalisation inside the network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from sb3_contrib import MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from flexirl.errors import UserError
from flexirl.policies.interface.action import GRID_ZERO, NUM_DIALS
from flexirl.policies.training.grouped_ppo import GroupedPPO
from flexirl.policies.training.probing import Probing

ALGORITHMS: dict[str, type[BaseAlgorithm]] = {
    "probing": Probing,
    "grouped_ppo": GroupedPPO,
    "ppo": PPO,
    "a2c": A2C,
    "dqn": DQN,
    "recurrent_ppo": RecurrentPPO,
    "maskable_ppo": MaskablePPO,
}
NORMALISED_LIMIT = 5.0
ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


class Normaliser(BaseFeaturesExtractor):
    """Shifts and scales observations to mean 0 and variance 1; the figures are set once, before training."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, observation_space: gym.Space[Any]) -> None:
        size = int(np.prod(observation_space.shape or ()))
        super().__init__(observation_space, size)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        """Normalised observations, cut at NORMALISED_LIMIT standard deviations."""
        return torch.clamp((observations - self.mean) / self.std, -NORMALISED_LIMIT, NORMALISED_LIMIT)

    def set(self, observations: np.ndarray) -> None:
        """Takes mean and deviation from a sample (rows of observations); what does not vary is only shifted."""
        std = observations.std(axis=0)
        self.mean.copy_(torch.as_tensor(observations.mean(axis=0)))
        self.std.copy_(torch.as_tensor(np.where(std > 1e-3, std, 1.0)))


def make_agent(config: dict[str, Any], env: VecEnv, group_size: int, seed: int, log_folder: Path) -> BaseAlgorithm:
    """The agent that `config` (group `agent`) describes.

    Raises UserError for an unknown algorithm or hyperparameter, or one that cannot act in this action space.
    """
    name = config["algorithm"]
    if name not in ALGORITHMS:
        raise UserError(f"agent.algorithm={name} is unknown; choose from {', '.join(ALGORITHMS)}.")
    discrete = isinstance(env.action_space, gym.spaces.Discrete)
    if name in ("dqn", "maskable_ppo") and not discrete:
        raise UserError(f"agent={name} needs one discrete choice; add env=grid.")
    if name == "probing" and env.action_space.shape != (NUM_DIALS,):
        raise UserError("agent=probing moves dials, and nothing else; add agent=grouped_ppo, or env=dials.")
    hyperparameters = dict(config["hyperparameters"])
    network = dict(config["network"])
    if network["activation"] not in ACTIVATIONS:
        raise UserError(f"agent.network.activation={network['activation']} is unknown; choose tanh or relu.")
    policy_kwargs: dict[str, Any] = {
        "net_arch": list(network["layers"]),
        "activation_fn": ACTIVATIONS[network["activation"]],
        "features_extractor_class": Normaliser,
    }
    if not discrete and name != "dqn":
        policy_kwargs["log_std_init"] = float(network["log_std"])
    if name == "recurrent_ppo":
        policy_kwargs["lstm_hidden_size"] = int(network["lstm"])
    if name == "grouped_ppo":
        hyperparameters["group_size"] = group_size
    policy = "MlpLstmPolicy" if name == "recurrent_ppo" else "MlpPolicy"
    try:
        if config["decay_learning_rate"]:
            hyperparameters["learning_rate"] = LinearDecay(float(hyperparameters["learning_rate"]))
        agent = ALGORITHMS[name](
            policy, env, policy_kwargs=policy_kwargs, seed=seed, tensorboard_log=str(log_folder), device="cpu",
            **hyperparameters,
        )  # fmt: skip
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"agent.hyperparameters do not fit {name}: {error}.") from None
    normalise(agent, env)
    return agent


class LinearDecay:
    """A learning rate that falls linearly to a tenth; a class, so that a saved agent can be loaded anywhere."""

    def __init__(self, peak: float) -> None:
        self.peak = peak

    def __call__(self, remaining: float) -> float:
        """The rate when this share of training remains."""
        return self.peak * (0.1 + 0.9 * remaining)


def normalise(agent: BaseAlgorithm, env: VecEnv, steps: int = 300) -> None:
    """Sets every normaliser of the agent from what the heuristic at zero of all dials or scores observes."""
    discrete = isinstance(env.action_space, gym.spaces.Discrete)
    action = np.full((env.num_envs, *(env.action_space.shape or ())), GRID_ZERO if discrete else 0)
    observations = [np.asarray(env.reset())]
    for _ in range(steps):
        observations.append(np.asarray(env.step(action)[0]))
    sample = np.concatenate(observations)
    for module in agent.policy.modules():
        if isinstance(module, Normaliser):
            module.set(sample)


def start_at(agent: BaseAlgorithm, dials: Sequence[float]) -> None:
    """Moves an untrained agent of the dials action space to a constant setting, from which it learns."""
    head = agent.policy.action_net
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.bias.copy_(torch.as_tensor(dials, dtype=torch.float32))
