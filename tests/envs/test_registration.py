"""The environments by their names: Gymnasium finds them, and finds its caller's Hydra as it was."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.version import getbase

import flexirl  # noqa: F401  registers them
from flexirl.envs.vector import BatchingVectorEnv
from flexirl.errors import UserError
from flexirl.experiments.configuration import CONF, default_task
from flexirl.policies.interface.action import GRID

SHORT = ["workload.duration_s=4", "workload.warmup_s=0"]


def test_make_vec_gives_the_fleet() -> None:
    returns = []
    for _ in range(2):
        env = gymnasium.make_vec("flexirl/Batching-v0", num_envs=4, overrides=SHORT, group_size=2)
        assert isinstance(env.unwrapped, BatchingVectorEnv) and env.num_envs == 4
        single = gymnasium.make("flexirl/Batching-v0", overrides=SHORT)
        assert env.single_observation_space == single.observation_space
        assert env.single_action_space == single.action_space
        env.reset(seed=3)
        steps = [env.step(np.zeros(env.action_space.shape, np.float32)) for _ in range(5)]
        returns.append(np.array([step[1] for step in steps]))
        env.close()
    assert (returns[0] == returns[1]).all() and returns[0].shape == (5, 4)


def test_the_callers_hydra_is_left_alone() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        before = GlobalHydra.instance().hydra
        gymnasium.make("flexirl/Batching-v0", overrides=SHORT)
        assert GlobalHydra.instance().hydra is before
        assert compose("evaluate").seeds == 5
    with initialize_config_dir(str(CONF), version_base="1.2"):
        default_task(SHORT)
        assert str(getbase()) == "1.2"  # Hydra behaves as that version where they compose or run further
    assert not GlobalHydra.instance().is_initialized()


def test_one_override_may_be_a_plain_string() -> None:
    assert default_task("slo.ttft_s=7").slo.ttft_s == 7
    single = gymnasium.make("flexirl/Batching-v0", overrides="env=grid")
    many = gymnasium.make_vec("flexirl/Batching-v0", num_envs=2, overrides="env=grid")
    assert single.action_space == many.single_action_space == gymnasium.spaces.Discrete(len(GRID))
    live = gymnasium.make("flexirl/LiveBatching-v0", overrides="slo.ttft_s=7")
    assert live.unwrapped.task.slo.ttft_s == 7  # type: ignore[attr-defined]


def test_a_setting_by_its_old_name_is_named_anew() -> None:
    with pytest.raises(UserError, match=r"^env\.executor is called executor now\.$"):
        gymnasium.make("flexirl/Batching-v0", overrides=["env.executor=live"])
