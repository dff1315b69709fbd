"""The live environment is the surrogate's with another engine: where iterations take as long, nothing else differs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import gymnasium
import numpy as np
import pytest
from episodes import REVENUE, Requests, random_actions
from gymnasium.utils.env_checker import check_env as gymnasium_check
from live_toys import TickClock, ToyExecutor
from stable_baselines3.common.env_checker import check_env as sb3_check
from toys import TICK_S, toy_engine

import flexirl  # noqa: F401 - registers the environments
from flexirl.envs.batching import BatchingEnv
from flexirl.envs.fleet import Fleet, Task
from flexirl.envs.live import LiveFleet
from flexirl.envs.sb3 import BatchingVecEnv
from flexirl.errors import UserError
from flexirl.policies.interface.action import NUM_DIALS
from flexirl.runtime.live.clock import WallClock
from flexirl.runtime.live.executor import Batch, Outcome
from flexirl.runtime.profile.engine import EngineProfile
from flexirl.runtime.profile.step_time import step_time
from flexirl.workloads.scenario import Rngs, Scenario, ServiceTime
from flexirl.workloads.slo import SLO
from flexirl.workloads.trace import Trace

INTERVAL_S = 0.25
ENGINE = toy_engine(
    kv_blocks=24, host_kv_blocks=12, max_running=6, max_tokens_per_step=32, max_model_len=64, per_context_s=TICK_S / 8,
    per_swap_token_s=TICK_S / 4,
)  # fmt: skip


@dataclass
class OnTheTick(Requests):
    """Requests whose times are multiples of a power of two, so that clocks computed in different ways agree."""

    def draw(self, duration_s: float | None, service_time_s: ServiceTime, rngs: Rngs) -> Trace:
        """See `Requests`."""
        trace = super().draw(duration_s, service_time_s, rngs)
        trace.rows["arrival_s"] = np.floor(trace.rows["arrival_s"] / TICK_S) * TICK_S
        return trace


def task(action: str = "dials", engine: EngineProfile = ENGINE) -> Task:
    """Episodes of 32 decisions on an engine too small for what comes."""
    scenario = Scenario(
        "toy", OnTheTick(40, 40, 6.0, (2, 24), (1, 20)),
        OnTheTick(24, 24, 2.0, (4, 30), (4, 30), window_s=4.0), 32 * INTERVAL_S, 2.0,
    )  # fmt: skip
    return Task(scenario, engine, SLO(0.25, 2.0**-5), REVENUE, interval_s=INTERVAL_S, action=action)


class ModelClock(TickClock):
    """A clock that an executor moves on by what the step-time model says its iterations take."""

    def now_s(self) -> float:
        """See `Clock`."""
        return self._now_s

    def work(self, seconds: float) -> None:
        """Lets an iteration pass."""
        self._now_s += seconds


class ModelTimed(ToyExecutor):
    """Computes toy tokens in exactly the surrogate's time."""

    def __init__(self, profile: EngineProfile) -> None:
        super().__init__(profile)
        self.clock = ModelClock()
        self.fleet: Fleet | None = None

    def new_clock(self) -> ModelClock:
        """The clock of an episode."""
        self.clock = ModelClock()
        return self.clock

    def execute(self, batch: Batch, sampling: np.ndarray | None, interrupted: Callable[[], bool] | None) -> Outcome:
        """See `Executor`."""
        assert self.fleet is not None
        outcome = super().execute(batch, sampling, interrupted)
        state = self.fleet.state(0)
        self.clock.work(step_time(state.engine[0], state.batch[0]))
        return outcome


def live_fleet(task: Task) -> tuple[LiveFleet, ModelTimed]:
    """A fleet on a toy device, and the device."""
    executor = ModelTimed(task.engine)
    executor.fleet = fleet = LiveFleet(task, executor, executor.new_clock)
    return fleet, executor


# Where scores evict a request in the plan that swaps it in, the live engine knows that it is still in host memory.
@pytest.mark.parametrize(("action", "host_blocks"), [("dials", 12), ("grid", 12), ("scores", 0)])
def test_the_same_actions_give_the_same_observations_and_rewards(action: str, host_blocks: int) -> None:
    played = task(action, ENGINE.replace(host_kv_blocks=host_blocks))
    live, executor = live_fleet(played)
    surrogate = Fleet(played, 1)
    preemptions = losses = 0
    for seed in range(3):
        # Live, a promise is broken when its time has passed; the surrogate would know as soon as it is certain.
        first = surrogate.reset(seed).copy()
        surrogate.state(0).scheduler["fastest_step_s"] = 0.0
        assert (live.reset(seed) == first).all()
        for step, decision in enumerate(random_actions(surrogate.task, 1, 32, seed)):
            observations, rewards, over = surrogate.step(decision)
            ours = live.step(decision)
            assert (ours[0] == observations).all() and ours[1] == rewards and ours[2] == over, (seed, step)
        assert over[0] and live.episode_figures(0) == surrogate.episode_figures(0)
        state = live.state(0)
        preemptions += int(state.classes["preemptions"].sum())
        losses += int(state.classes["lost"].sum())
    assert preemptions > 10 and losses > 10 and (executor.moved_out > 0) == (host_blocks > 0), "nothing to compare"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("action", ["dials", "grid", "scores"])
def test_passes_both_checkers_without_warnings(action: str) -> None:
    env = BatchingEnv(live_fleet(task(action))[0])
    gymnasium_check(env, skip_render_check=True)
    sb3_check(env)
    env.close()


def test_an_episode_cut_short_leaves_nothing_on_the_device() -> None:
    fleet, executor = live_fleet(task())
    played = []
    for cut in (32, 3, 17, 32):
        fleet.reset(5)
        steps = random_actions(fleet.task, 1, cut, 1)
        played.append([tuple(fleet.step(action)[0][0].tolist()) for action in steps])
    assert played[0] == played[3] and played[1] == played[0][:3] and played[2] == played[0][:17]
    fleet.close()
    assert executor.free_host_blocks == 12 and not executor.host._held


def test_the_vector_environment_starts_the_next_episode_by_itself() -> None:
    env = BatchingVecEnv(live_fleet(task())[0], 3)
    env.reset()
    ends = []
    for step in range(1, 97):
        _, _, over, infos = env.step(np.zeros((1, NUM_DIALS), np.float32))
        if over[0]:
            ends.append(step)
            assert infos[0]["TimeLimit.truncated"] and infos[0]["figures"]["revenue_per_s"] > 0
    assert ends == [32, 64, 96]


def test_by_the_walls_clock_time_passes_while_the_agent_thinks() -> None:
    class Thinking(WallClock):
        """Seconds pass when told to."""

        ahead_s = 0.0

        def now_s(self) -> float:
            return time.perf_counter() * 1e-9 + self.ahead_s

        def wait(self, until_s: float, wake: threading.Event) -> bool:
            self.ahead_s = max(self.ahead_s, until_s)
            return True

    clock = Thinking()
    fleet = LiveFleet(task(), ToyExecutor(ENGINE), lambda: clock)
    fleet.reset(0)
    fleet.step(np.zeros((1, NUM_DIALS), np.float32))
    clock.ahead_s += 4.2 * INTERVAL_S
    fleet.step(np.zeros((1, NUM_DIALS), np.float32))
    assert fleet.state(0).scheduler["now_s"][0] == pytest.approx(6 * INTERVAL_S, abs=1e-3)
    assert fleet._member["steps"][0] == 6


def test_the_registered_environment_runs_a_model() -> None:
    env = gymnasium.make("flexirl/LiveBatching-v0", overrides=["workload.duration_s=3"], render_mode="rgb_array")
    surrogate = gymnasium.make("flexirl/Batching-v0")
    assert (env.observation_space, env.action_space) == (surrogate.observation_space, surrogate.action_space)
    env.reset(seed=0)
    ends = [env.step(np.zeros(NUM_DIALS, np.float32))[3] for _ in range(15)]
    assert ends == [False] * 14 + [True]
    assert env.unwrapped.fleet.state(0).scheduler["iterations"][0] > 10  # type: ignore[attr-defined]
    assert isinstance(env.render(), np.ndarray)
    env.close()


def test_requests_that_the_device_cannot_hold_are_refused() -> None:
    longer = task()
    longer.scenario.deferred.prompts = (60, 70)  # type: ignore[union-attr]
    fleet, _ = live_fleet(longer)
    with pytest.raises(UserError, match="longer than the 64 tokens"):
        fleet.reset(0)


def test_a_longer_trace_than_the_first_finds_room() -> None:
    """Episodes of very different size and many things said, one after the other."""
    growing = replace(task(), scenario=replace(task().scenario, immediate=OnTheTick(2, 300, 6.0, (2, 24), (1, 20))))
    fleet, _ = live_fleet(growing)
    sizes = set()
    fleet.reset(1)
    for _ in range(6):
        over = np.zeros(1, bool)
        while not over[0]:
            over = fleet.step(np.zeros((1, NUM_DIALS), np.float32))[2]
        sizes.add(len(fleet.state(0).requests))
        fleet.restart(over)
    assert len(sizes) > 1
