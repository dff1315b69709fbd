"""Many members at once, for Gymnasium and for stable-baselines3: each member plays what it would play alone."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from episodes import Requests, random_actions, small_task
from gymnasium.vector import AutoresetMode
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from stable_baselines3 import PPO
from stable_baselines3.common.monitor import Monitor

from flexirl.envs.batching import BatchingEnv
from flexirl.envs.fleet import Fleet
from flexirl.envs.sb3 import BatchingVecEnv
from flexirl.envs.vector import BatchingVectorEnv
from flexirl.policies.interface.action import NUM_DIALS, PREEMPTS
from flexirl.workloads.trace import DEFERRED

STEPS = 40  # of an episode of `small_task`
SAME: dict[str, Any] = {
    "immediate": Requests(80, 80, 6.0, always_the_same=True),
    "deferred": Requests(60, 60, 0.0, (200, 2000), (10, 200), always_the_same=True),
}


@pytest.mark.parametrize("kind", ["dials", "grid", "scores"])
def test_members_equal_single_environments(kind: str) -> None:
    task = small_task(**SAME, action=kind)
    together = BatchingVectorEnv(task, 3)
    alone = [BatchingEnv(Fleet(task, 1)) for _ in range(3)]
    observations, _ = together.reset(seed=0)
    assert (observations == np.stack([env.reset(seed=m)[0] for m, env in enumerate(alone)])).all()
    for action in random_actions(task, 3, STEPS - 1):
        observations, rewards, terminated, truncated, info = together.step(action)
        steps = [env.step(action[m]) for m, env in enumerate(alone)]
        assert (observations == np.stack([step[0] for step in steps])).all()
        assert rewards.tolist() == [step[1] for step in steps]
        assert not terminated.any() and not truncated.any() and info == {}
    action = random_actions(task, 3, 1, seed=9)[0]
    observations, rewards, _, truncated, info = together.step(action)
    steps = [env.step(action[m]) for m, env in enumerate(alone)]
    assert truncated.all() and info["_final_obs"].all() and info["_final_info"].all()
    for m, step in enumerate(steps):
        assert (info["final_obs"][m] == step[0]).all() and rewards[m] == step[1]
        figures = {name: values[m] for name, values in info["final_info"]["figures"].items() if name[0] != "_"}
        assert figures == step[4]["figures"]
    # The same arrivals again, from the start.
    assert (observations == np.stack([env.reset()[0] for env in alone])).all()


def test_vector_environment_keeps_gymnasiums_contract() -> None:
    env = BatchingVectorEnv(small_task(), 4, group_size=2)
    assert isinstance(env, gym.vector.VectorEnv) and env.num_envs == 4
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    wrapped = gym.wrappers.vector.RecordEpisodeStatistics(env)
    observations, info = wrapped.reset(seed=3)
    assert env.observation_space.contains(observations) and info == {}
    env.action_space.seed(0)
    total = np.zeros(4)
    for step in range(1, 2 * STEPS + 1):
        observations, rewards, terminated, truncated, info = wrapped.step(env.action_space.sample())
        assert env.observation_space.contains(observations)
        assert rewards.shape == (4,) and terminated.dtype == truncated.dtype == bool
        total += rewards
        if step % STEPS == 0:
            assert truncated.all() and not terminated.any()
            assert info["episode"]["l"].tolist() == [STEPS] * 4
            assert np.allclose(info["episode"]["r"], total, atol=1e-4)
            total[:] = 0
    wrapped.close()


def test_seeds_of_the_vector_environment() -> None:
    first, second = (BatchingVectorEnv(small_task(), 4) for _ in range(2))
    zeros = np.zeros((4, NUM_DIALS), np.float32)

    def play(env: BatchingVectorEnv, seed: int | None) -> list[list[float]]:
        env.reset(seed=seed)
        return [env.step(zeros)[1].tolist() for _ in range(10)]

    assert play(first, 1) == play(second, 1) != play(first, 2)
    play(second, 2)
    assert play(first, None) == play(second, None)


def test_sb3_environment_truncates_in_the_same_step_and_says_so() -> None:
    task = small_task()
    env = BatchingVecEnv(Fleet(task, 4, group_size=2), 5)
    reference = BatchingVectorEnv(task, 4, group_size=2)
    started = env.reset()
    reference.fleet.reset(5, stagger=True)
    returns, lengths = np.zeros(4), np.zeros(4, int)
    ends = []
    expected: Any
    for step, action in enumerate(random_actions(task, 4, 90), 1):
        observations, rewards, dones, infos = env.step(action)
        expected = reference.step(action)
        for ours, theirs in zip((observations, rewards, dones), (expected[0], expected[1], expected[3]), strict=True):
            assert np.array_equal(ours, theirs)  # type: ignore[arg-type]
        returns += rewards
        lengths += 1
        for m in range(4):
            if not dones[m]:
                assert infos[m] == {}
                continue
            ends.append((step, m))
            assert infos[m]["TimeLimit.truncated"] is True
            assert (infos[m]["terminal_observation"] == expected[4]["final_obs"][m]).all()
            assert infos[m]["episode"]["l"] == lengths[m]
            assert infos[m]["episode"]["r"] == pytest.approx(returns[m], abs=1e-4)
            assert (np.asarray(observations)[m] != infos[m]["terminal_observation"]).any()
            returns[m], lengths[m] = 0, 0
    # Two groups: the first one's first episode is half as long, so that they never end together.
    assert ends == [(20, 0), (20, 1), (40, 2), (40, 3), (60, 0), (60, 1), (80, 2), (80, 3)]
    assert (env.reset() == started).all()
    env.seed(6)
    env.reset()
    assert env.num_envs == 4 and env.env_is_wrapped(Monitor) == [False] * 4
    assert env.get_attr("render_mode", [0, 2]) == [None, None] and env.get_attr("num_envs", 1) == [4]
    with pytest.raises(AttributeError, match="some"):
        env.set_attr("num_envs", 3)
    env.close()


def test_ppo_learns_on_it() -> None:
    env = BatchingVecEnv(Fleet(small_task(), 4), 1)
    agent = PPO("MlpPolicy", env, n_steps=32, batch_size=64, n_epochs=1, seed=0, device="cpu")
    before = [parameter.detach().clone() for parameter in agent.policy.parameters()]
    agent.learn(256)
    assert len(agent.ep_info_buffer or ()) > 0
    assert any((old != new).any() for old, new in zip(before, agent.policy.parameters(), strict=True))


def test_masks_reach_maskable_ppo() -> None:
    env = BatchingVecEnv(Fleet(small_task(action="grid"), 4))
    env.reset()
    assert is_masking_supported(env)
    masks = get_action_masks(env)
    assert masks.shape == (4, env.action_space.n) and masks.dtype == bool  # type: ignore[attr-defined]
    assert not masks[:, PREEMPTS].any()  # nothing runs yet
    for action in random_actions(env.fleet.task, 4, 60):
        env.step(action)
        masks = get_action_masks(env)
        running = [int(env.fleet.state(m).classes["running"][DEFERRED]) for m in range(4)]
        assert masks[:, PREEMPTS].tolist() == [count > 0 for count in running]
        assert np.delete(masks, PREEMPTS, axis=1).all()
    assert env.env_method("action_masks", indices=[2])[0].tolist() == masks[2].tolist()
