"""Small agents on short episodes, for the tests of whatever trains or deploys them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from stable_baselines3 import DQN
from stable_baselines3.common.base_class import BaseAlgorithm

from flexirl.envs.fleet import Fleet, Task
from flexirl.envs.sb3 import BatchingVecEnv
from flexirl.experiments.configuration import CONF, load_task
from flexirl.policies.interface.observation import bounds
from flexirl.policies.training.agents import make_agent

MEMBERS, GROUP = 8, 4
TINY = {
    "probing": ["episodes=2", "remembered=2", "updates=20"],
    "grouped_ppo": ["n_steps=16", "batch_size=64", "n_epochs=1"],
    "ppo": ["n_steps=16", "batch_size=64", "n_epochs=1"],
    "a2c": [],
    "dqn": ["buffer_size=2000", "learning_starts=64", "batch_size=32", "target_update_interval=100"],
    "maskable_ppo": ["n_steps=16", "batch_size=64", "n_epochs=1"],
    "recurrent_ppo": ["n_steps=16", "batch_size=64", "n_epochs=1"],
}
KIND = {name: "grid" if name in ("dqn", "maskable_ppo") else "dials" for name in TINY}


@cache
def setting(agent: str, kind: str, tiny: bool = True) -> tuple[dict[str, Any], Task]:
    """An agent's configuration, with small buffers if tiny, and episodes of 30 decisions."""
    overrides = [f"agent={agent}", f"env={kind}", "workload.duration_s=6", "workload.warmup_s=0"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", overrides + [f"agent.hyperparameters.{change}" for change in TINY[agent] if tiny])
    return OmegaConf.to_container(config.agent, resolve=True), load_task(config)  # type: ignore[return-value]


def make(agent: str, folder: Path, kind: str | None = None, seed: int = 3, **changes: Any) -> BaseAlgorithm:
    """A new agent of that algorithm on a fleet of its own."""
    config, task = setting(agent, kind or KIND[agent])
    env = BatchingVecEnv(Fleet(task, MEMBERS, GROUP, traces=4), seed)
    return make_agent({**config, **changes}, env, GROUP, seed, folder)


def decisive_agent(name: str, folder: Path, kind: str | None = None) -> BaseAlgorithm:
    """A new agent with larger, random weights in its last layer, so that its actions differ and reach their bounds."""
    agent = make(name, folder, kind)
    torch.manual_seed(0)
    policy: Any = agent.policy
    head = policy.q_net.q_net[-1] if isinstance(agent, DQN) else policy.action_net
    torch.nn.init.normal_(head.weight, std=0.3)
    torch.nn.init.normal_(head.bias, std=0.3)
    return agent


def random_observations(count: int, with_requests: bool = False) -> np.ndarray:
    """Observations anywhere within their bounds: float32 (count, size)."""
    low, high = bounds(with_requests)
    return np.random.default_rng(5).uniform(low, high, (count, len(low))).astype(np.float32)
