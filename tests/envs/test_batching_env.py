"""The single environment keeps Gymnasium's and stable-baselines3's contracts, without a word of warning."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from episodes import small_engine, small_task
from gymnasium.utils.env_checker import check_env as gymnasium_check
from stable_baselines3.common.env_checker import check_env as sb3_check

import flexirl  # noqa: F401 - registers the environment
from flexirl.envs.batching import COUNTED, BatchingEnv
from flexirl.envs.fleet import Fleet
from flexirl.policies.interface.action import NUM_DIALS
from flexirl.runtime.scheduler.state import FINISHED
from flexirl.workloads.trace import IMMEDIATE

KINDS = ("dials", "grid", "scores")
SHORT = ["workload.duration_s=5", "workload.warmup_s=0"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", KINDS)
def test_passes_both_checkers_without_warnings(kind: str) -> None:
    env = gymnasium.make("flexirl/Batching-v0", overrides=[f"env={kind}", *SHORT])
    gymnasium_check(env.unwrapped)
    sb3_check(env.unwrapped)
    env.close()


@pytest.mark.parametrize("kind", KINDS)
def test_random_episodes_stay_within_the_spaces(kind: str) -> None:
    env = BatchingEnv(Fleet(small_task(action=kind), 1))
    env.action_space.seed(1)
    for episode in range(3):
        observation, info = env.reset(seed=episode)
        assert env.observation_space.contains(observation) and info == {}
        for step in range(1, 41):
            observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
            assert env.observation_space.contains(observation)
            assert type(reward) is float and np.isfinite(reward)
            assert terminated is False and type(truncated) is bool
            assert truncated == (step == 40) == ("figures" in info)
        # What a run costs in seconds of this machine is not part of what happened.
        assert set(info["figures"]) == {
            "value_per_s", "revenue_per_s", "worth_share", "immediate_attainment", "deferred_tokens_per_s",
            "preemptions_per_s",
        }  # fmt: skip
        assert all(type(value) is float for value in info["figures"].values())


def test_an_episode_follows_from_its_seed() -> None:
    env, other = BatchingEnv(Fleet(small_task(), 1)), BatchingEnv(Fleet(small_task(), 1))
    env.reset(seed=7)
    assert (env.reset(seed=4)[0] == other.reset(seed=4)[0]).all()
    env.action_space.seed(0)
    for _ in range(40):
        action = env.action_space.sample()
        ours, theirs = env.step(action), other.step(action)
        assert (ours[0] == theirs[0]).all() and ours[1:] == theirs[1:]
    # The next episode is another one, and the same one for both.
    assert (env.reset()[0] == other.reset()[0]).all()
    rewards = [env.step(np.zeros(NUM_DIALS, np.float32))[1] for _ in range(40)]
    env.reset(seed=4)
    assert rewards != [env.step(np.zeros(NUM_DIALS, np.float32))[1] for _ in range(40)]


def test_an_observation_is_the_callers_to_keep() -> None:
    env = BatchingEnv(Fleet(small_task(), 1))
    first, _ = env.reset(seed=0)
    kept = first.copy()
    env.step(np.zeros(NUM_DIALS, np.float32))
    assert (first == kept).all()


def test_step_noise_differs_between_episodes() -> None:
    env = BatchingEnv(Fleet(small_task(engine=small_engine(noise=0.05)), 1))
    seeds = []
    for seed in (1, 2):
        env.reset(seed=seed)
        seeds.append(int(env.fleet.state(0).scheduler["rng"][0]))
    assert seeds[0] != seeds[1]


def test_renders_a_picture() -> None:
    env = gymnasium.make("flexirl/Batching-v0", task=small_task(), render_mode="rgb_array")
    env.reset(seed=0)
    for _ in range(5):
        env.step(np.zeros(NUM_DIALS, np.float32))
    picture = env.render()
    assert isinstance(picture, np.ndarray)
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3 and min(picture.shape[:2]) > 300
    assert 50 < len(np.unique(picture.reshape(-1, 3), axis=0))  # lines, areas, letters: not an empty sheet
    env.step(np.full(NUM_DIALS, -1, np.float32))
    later = env.render()
    assert isinstance(later, np.ndarray) and later.shape == picture.shape and (later != picture).any()


def test_info_counts_what_came_about_in_every_interval() -> None:
    """The sums over an episode are the totals that the engine has at its end."""
    env = BatchingEnv(Fleet(small_task(), 1))
    env.reset(seed=3)
    sums: dict[tuple[str, str], int] = {}
    elapsed_s, over = 0.0, False
    while not over:
        _, _, _, over, info = env.step(np.zeros(env.action_space.shape or (), np.float32))
        elapsed_s += info["elapsed_s"]
        for which in ("immediate", "deferred"):
            for name, count in info[which].items():
                assert count >= 0
                sums[which, name] = sums.get((which, name), 0) + count
    state = env.fleet.state(0)
    assert elapsed_s == pytest.approx(float(state.scheduler["now_s"][0]))
    for c, which in enumerate(("immediate", "deferred")):
        for name, field in COUNTED.items():
            assert sums.get((which, name)) == state.classes[c][field]
    requests = state.requests[state.requests["status"] == FINISHED]
    assert sums["immediate", "finished"] == (requests["request_class"] == IMMEDIATE).sum() > 0


def test_a_reward_of_ones_own_by_a_wrapper() -> None:
    """The example of docs/environment.md."""

    class KeptPromises(gymnasium.Wrapper):  # type: ignore[type-arg]
        def step(self, action):  # type: ignore[no-untyped-def]
            observation, _, terminated, truncated, info = self.env.step(action)
            reward = info["immediate"]["kept"] - 2 * info["immediate"]["lost"]
            return observation, reward, terminated, truncated, info

    env = KeptPromises(gymnasium.make("flexirl/Batching-v0", task=small_task()))
    env.reset(seed=1)
    assert any(env.step(env.action_space.sample())[1] != 0 for _ in range(40))


def test_what_cannot_be_stepped() -> None:
    env = BatchingEnv(Fleet(small_task(), 1))
    with pytest.raises(gymnasium.error.ResetNeeded, match="step comes before reset"):
        env.step(env.action_space.sample())
    env.reset(seed=0)
    with pytest.raises(ValueError, match="not finite"):
        env.step(np.full(env.action_space.shape or (), np.nan, np.float32))
