"""Trains stable-baselines3's PPO on `flexirl/Batching-v0`, and shows what it has learned: less than a minute.

    python examples/train_with_sb3.py

Nothing here is FlexiRL's own but the environment. `python -m flexirl.train` does more: it groups members that replay
the same arrivals, starts at the best constant dials, and holds the result against the published rules.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

import flexirl  # noqa: F401  makes the environment known to Gymnasium

# Bursts of immediate requests beside an endless backlog of deferred ones: 60 s of them, a decision every 0.2 s.
OVERRIDES = ("workload=high_bursty", "workload.duration_s=60", "workload.warmup_s=10")
TEST_SEED = 1_000  # arrivals that are not trained on


def revenue_per_s(agent: PPO | None, env: VecEnv) -> float:
    """Mean revenue of an episode of each member; without an agent, of all dials in the middle, a sensible rule."""
    env.seed(TEST_SEED)
    observations = env.reset()
    earned: list[float] = []
    while len(earned) < env.num_envs:
        if agent is None:
            actions = np.zeros((env.num_envs, *env.action_space.shape), np.float32)
        else:
            actions, _ = agent.predict(observations, deterministic=True)
        observations, _, _, infos = env.step(actions)
        earned += [info["figures"]["revenue_per_s"] for info in infos if "figures" in info]
    return float(np.mean(earned))


def main(steps: int = 192_000, overrides: Sequence[str] = OVERRIDES) -> None:
    """Trains for so many decisions; overrides: of the configuration of `python -m flexirl.train`."""
    torch.set_num_threads(1)  # the network is too small to share
    env = make_vec_env("flexirl/Batching-v0", n_envs=8, seed=0, env_kwargs={"overrides": list(overrides)})
    agent = PPO(
        "MlpPolicy", env, n_steps=300, batch_size=600, n_epochs=5, gamma=0.995, policy_kwargs={"log_std_init": -1.0},
        seed=0, device="cpu",
    )  # fmt: skip
    agent.learn(steps)
    print(f"revenue per second: {revenue_per_s(None, env):,.0f} with all dials in the middle, ", end="")
    print(f"{revenue_per_s(agent, env):,.0f} with the agent after {steps:,} decisions")


if __name__ == "__main__":
    main()
