"""PPO whose baseline is what the same arrivals did to others: the members of a group replay one trace.

Most of the variance of a return comes from the arrivals, which all members of a group share at the same simulated
time. So each reward is taken relative to the mean of the others' at that time (leave one out, so that a member's own
action is not in its baseline, which keeps the gradient unbiased), and PPO goes on as usual on what is left.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer


def relative_to_others(rewards: np.ndarray, group_size: int) -> np.ndarray:
    """Rewards less the mean of the other members' of the group at the same step: float array (steps, members)."""
    if group_size == 1:
        return rewards
    grouped = rewards.reshape(len(rewards), -1, group_size)
    others = (grouped.sum(axis=2, keepdims=True) - grouped) / (group_size - 1)
    return (grouped - others).reshape(rewards.shape)


class GroupedRolloutBuffer(RolloutBuffer):
    """A rollout buffer that makes rewards relative before it computes advantages."""

    def __init__(self, *args: Any, group_size: int = 1, **kwargs: Any) -> None:
        self.group_size = group_size
        super().__init__(*args, **kwargs)

    def compute_returns_and_advantage(self, last_values: torch.Tensor, dones: np.ndarray) -> None:
        """Generalised advantage estimation on relative rewards."""
        self.rewards = relative_to_others(self.rewards, self.group_size)
        super().compute_returns_and_advantage(last_values, dones)


class GroupedPPO(PPO):
    """PPO on relative rewards; `group_size` neighbours of the vector environment form a group."""

    def __init__(self, *args: Any, group_size: int = 1, **kwargs: Any) -> None:
        self.group_size = group_size
        kwargs.setdefault("rollout_buffer_class", GroupedRolloutBuffer)
        kwargs.setdefault("rollout_buffer_kwargs", {"group_size": group_size})
        super().__init__(*args, **kwargs)
