"""Behaviour cloning: teaches one agent of many tasks to set the dials, in each, to what was found best for that task.

The agent is never told which task it plays; it has to tell them apart by what it observes. Where they cannot be told
apart, or the dials do not matter, it learns something between. From there it goes on to learn by itself.

The first episodes are played with the settings themselves, the next ones by the agent, so that it learns what to do
where its own mistakes lead (DAgger: Ross, Gordon and Bagnell, AISTATS 2011).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm

from flexirl.envs.fleet import Fleet, Task

ROUNDS = 4  # episodes of each task, the first played with its setting
EVERY = 10  # decisions between two observations to learn from: neighbours are much alike
UPDATES, BATCH, LEARNING_RATE = 400, 4096, 1e-3  # of each round


def clone(agent: BaseAlgorithm, tasks: Sequence[Task], dials: np.ndarray, seed: int) -> float:
    """Fits the mean of the agent's policy to `dials` (tasks, NUM_DIALS), a setting for each task.

    Least squares by Adam (Kingma and Ba, ICLR 2015); only the policy's layers change. Returns the root mean square of
    what is left, in positions of a dial.
    """
    fleet = Fleet([replace(task, action="dials") for task in tasks], len(tasks), 1, len(tasks))
    settings = dials.astype(np.float32)
    observed: list[np.ndarray] = []
    wanted: list[np.ndarray] = []
    left = 0.0
    for round_ in range(ROUNDS):
        observations, over = fleet.reset(seed + round_), np.zeros(len(tasks), bool)
        step = 0
        while not over.all():
            if step % EVERY == 0:
                observed.append(observations[~over].copy())
                wanted.append(settings[~over])
            action = settings if round_ == 0 else agent.predict(observations, deterministic=True)[0]
            observations, _, over = fleet.step(action)
            step += 1
        left = _fit(agent, torch.as_tensor(np.concatenate(observed)), torch.as_tensor(np.concatenate(wanted)), seed)
    fleet.close()
    return left


def _fit(agent: BaseAlgorithm, observed: torch.Tensor, wanted: torch.Tensor, seed: int) -> float:
    policy: Any = agent.policy
    layers = [*policy.mlp_extractor.policy_net.parameters(), *policy.action_net.parameters()]
    optimizer = torch.optim.Adam(layers, LEARNING_RATE)
    draw = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    for _ in range(UPDATES):
        chosen = torch.randint(len(observed), (BATCH,), generator=draw)
        features = policy.extract_features(observed[chosen], policy.pi_features_extractor)
        mean = policy.action_net(policy.mlp_extractor.forward_actor(features))
        loss = torch.nn.functional.mse_loss(mean, wanted[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return float(np.sqrt(np.mean(losses[-UPDATES // 10 :])))
