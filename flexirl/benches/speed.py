"""The speeds of the surrogate, its environments, training and decisions: `python -m flexirl.bench`.

Each measurement is one function whose docstring says what is measured; speeds and seconds are medians of repeats.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from flexirl.benches.figures import Row
from flexirl.compiled import compiled
from flexirl.envs.fleet import Fleet, Task
from flexirl.envs.sb3 import BatchingVecEnv
from flexirl.envs.vector import BatchingVectorEnv
from flexirl.experiments.configuration import load_task
from flexirl.experiments.values import CONF
from flexirl.policies.deploy.learned import load_policy
from flexirl.policies.registry import PRETRAINED_FILE
from flexirl.policies.training.agents import make_agent
from flexirl.runtime.borrow import borrow
from flexirl.runtime.profile.engine import load_profile
from flexirl.runtime.profile.step_time import step_time
from flexirl.runtime.scheduler.commit import commit
from flexirl.runtime.scheduler.looking import Lookout
from flexirl.runtime.scheduler.plan import plan
from flexirl.runtime.scheduler.state import State
from flexirl.runtime.simulator import simulation, surrogate
from flexirl.workloads.trace import CONTENT, DEFERRED, IMMEDIATE, Trace, empty_rows, merge

MEMBERS = 64
SEATS = 64
QUEUED, MANY_QUEUED = 60_000, 1_000_000  # the first lasts all repeats


def median(measure: Callable[[], float], repeats: int) -> float:
    """The median of `repeats` measurements, after one that does not count and compiles what is not compiled yet."""
    measure()
    return float(np.median([measure() for _ in range(repeats)]))


def surrogate_speed(repeats: int) -> Iterator[Row]:
    """One engine on one core, in simulated iterations per second of real time, all statistics on.

    64 seats, blocks of 16 tokens. Immediate requests arrive in a Poisson process, deferred ones all wait from the start
    and take the seats that are left, so that all seats are taken all the time. Prompts and outputs have 256 to 768
    tokens. Three ways: as the programs run it; every iteration planned and committed by itself, without the closed form
    for runs of decodes; and as the programs run it with a million deferred requests waiting.
    """
    iterations = 50_000
    unit = "iterations/s"
    state, trace = _busy_engine(QUEUED, iterations * (repeats + 2))
    yield Row("surrogate_iterations_per_s", median(lambda: _advance(state, trace, iterations), repeats), unit)
    yield Row("surrogate_running_sequences", float(state.scheduler["running"][0]), "sequences")
    state, trace = _busy_engine(QUEUED, iterations * (repeats + 2))
    stepped = median(lambda: _advance_stepped(state, trace, iterations), repeats)
    yield Row("surrogate_iterations_per_s_stepped", stepped, unit)
    state, trace = _busy_engine(MANY_QUEUED, iterations * (repeats + 2))
    many = median(lambda: _advance(state, trace, iterations), repeats)
    yield Row("surrogate_iterations_per_s_million_queued", many, unit)


def cache_speed(repeats: int) -> Iterator[Row]:
    """The same engine with conversations: eight turns each, five hundred going on at once, system prompts shared.

    Without a prefix cache, and with one of 100,000 and of a million blocks, all of them full before it is timed.
    """
    iterations = 50_000
    for name, caching, blocks in (("off", 0, 100_000), ("100k_blocks", 1, 100_000), ("1m_blocks", 1, 1_000_000)):
        engine = load_profile("h100-llama-3.1-8b").replace(
            max_running=SEATS, block_size=16, kv_blocks=blocks, prefix_caching=caching
        )
        trace = _conversations(_busy_trace(QUEUED, iterations * (repeats + 2)))
        state = simulation.start(engine, trace, 0)
        surrogate.advance(state, trace.rows, np.inf, 2_000)
        speed = median(partial(_advance, state, trace, iterations), repeats)
        yield Row(f"surrogate_iterations_per_s_cache_{name}", speed, "iterations/s")


def _conversations(trace: Trace, at_once: int = 500, turns: int = 8) -> Trace:
    rows, number = trace.rows, np.arange(len(trace))
    session, turn = number // (at_once * turns) * at_once + number % at_once, number % (at_once * turns) // at_once
    rows["prompt_tokens"] = 256 * (turn + 1)
    contents = np.zeros((int(session.max()) + 1, turns + 1), CONTENT)
    contents["end"] = np.append(128, 256 * np.arange(2, turns + 2))
    contents["origin"] = np.arange(contents.size).reshape(contents.shape) + 64
    contents["origin"][:, 0] = np.arange(len(contents)) % 64
    rows["content_first"], rows["content_count"] = session * (turns + 1), turn + 2
    return Trace(rows, "conversations", 1, contents=contents.ravel())


def _busy_engine(queued: int, iterations: int) -> tuple[State, Trace]:
    """An engine whose 64 seats are taken, with `queued` deferred requests waiting and arrivals for `iterations`."""
    engine = load_profile("h100-llama-3.1-8b").replace(max_running=SEATS, block_size=16)
    trace = _busy_trace(queued, iterations)
    state = simulation.start(engine, trace, 0)
    surrogate.advance(state, trace.rows, np.inf, 2_000)
    return state, trace


def _busy_trace(queued: int, iterations: int) -> Trace:
    rng = np.random.default_rng(0)
    gaps_s = rng.exponential(0.25, iterations // 10)
    immediate = _requests(len(gaps_s), IMMEDIATE, rng)
    immediate.rows["arrival_s"] = np.cumsum(gaps_s)
    immediate.rows["ttft_slo_s"], immediate.rows["tpot_slo_s"] = 1.0, 0.05
    return merge([immediate, _requests(queued, DEFERRED, rng)], "bench")


def _requests(count: int, request_class: int, rng: np.random.Generator) -> Trace:
    rows = empty_rows(count)
    rows["request_class"] = request_class
    for column in ("prompt_tokens", "output_tokens"):
        rows[column] = rng.integers(256, 769, count)
    rows["max_tokens"] = rows["output_tokens"]
    return Trace(rows, "bench", 1)


def _advance(state: State, trace: Trace, iterations: int) -> float:
    began = time.perf_counter()
    surrogate.advance(state, trace.rows, np.inf, iterations)
    return iterations / (time.perf_counter() - began)


def _advance_stepped(state: State, trace: Trace, iterations: int) -> float:
    began = time.perf_counter()
    _step(state, trace.rows, iterations)
    return iterations / (time.perf_counter() - began)


@compiled
def _step(state: State, trace: np.ndarray, iterations: int) -> None:
    state = borrow(state)
    for _ in range(iterations):
        surrogate.arrive(state, trace, state.scheduler[0].now_s)
        plan(state)
        commit(state, step_time(state.engine[0], state.batch[0]))


def environment_speed(task: Task, config: Any, repeats: int) -> Iterator[Row]:
    """Steps of `BatchingVectorEnv` per second, all members together, on all cores.

    64 members in the default scenario, one step a decision interval of 0.2 s, actions zero, ended episodes restarted.
    """
    env = BatchingVectorEnv(task, MEMBERS, config.env.group_size, config.env.traces)
    env.reset(seed=0)
    action = np.zeros(env.action_space.shape or (), np.float32)

    def measure(steps: int = 1_000) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            env.step(action)
        return steps * MEMBERS / (time.perf_counter() - began)

    yield Row("environment_steps_per_s", median(measure, repeats), "steps/s")
    env.close()


def training_speed(task: Task, config: Any, repeats: int) -> Iterator[Row]:
    """Environment steps per second of `learn`, without validation: of probing, fits included, and of grouped PPO.

    Then the ceiling: grouped PPO with the same hyperparameters on an environment that costs nothing.
    """
    yield Row("probing_steps_per_s", _probe(task), "steps/s")
    env = BatchingVecEnv(Fleet(task, MEMBERS, config.env.group_size, config.env.traces))
    free = FreeVecEnv(env)
    with tempfile.TemporaryDirectory() as folder:
        agents = [_agent(config, each, Path(folder)) for each in (env, free)]
        # In turns, so that whatever else the machine does meets both.
        speeds = np.array([[_learn(agent, config) for agent in agents] for _ in range(repeats + 1)])
    training, ceiling = np.median(speeds[1:], axis=0).tolist()
    env.close()
    yield Row("training_steps_per_s", training, "steps/s")
    yield Row("sb3_ceiling_steps_per_s", ceiling, "steps/s")
    yield Row("training_share_of_ceiling", training / ceiling, "share")


def _probe(task: Task) -> float:
    """A round after another, whose episodes are those of the default."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", ["agent=probing"])
    env = BatchingVecEnv(Fleet(task, MEMBERS, config.env.group_size, config.env.traces))
    with tempfile.TemporaryDirectory() as folder:
        agent = _agent(config, env, Path(folder)).learn(1)
        played, began = agent.num_timesteps, time.perf_counter()
        agent.learn(1, reset_num_timesteps=False)
        seconds = time.perf_counter() - began
    env.close()
    return (agent.num_timesteps - played) / seconds


def _agent(config: Any, env: VecEnv, folder: Path) -> BaseAlgorithm:
    settings: Any = OmegaConf.to_container(config.agent, resolve=True)
    return make_agent(settings, env, config.env.group_size, 0, folder)


def _learn(agent: BaseAlgorithm, config: Any, rollouts: int = 4) -> float:
    steps = rollouts * MEMBERS * config.agent.hyperparameters.n_steps
    began = time.perf_counter()
    agent.learn(steps)
    return steps / (time.perf_counter() - began)


class FreeVecEnv(VecEnv):
    """An environment that costs nothing: the spaces of another one, always the same observation, never an end."""

    def __init__(self, like: VecEnv) -> None:
        self.render_mode = None
        super().__init__(like.num_envs, like.observation_space, like.action_space)
        self._observations = np.zeros((like.num_envs, *(like.observation_space.shape or ())), np.float32)
        self._rewards = np.zeros(like.num_envs, np.float32)
        self._over = np.zeros(like.num_envs, bool)
        self._infos: list[dict[str, Any]] = [{} for _ in range(like.num_envs)]

    def reset(self) -> np.ndarray:
        """The observation."""
        return self._observations

    def step_async(self, actions: np.ndarray) -> None:
        """Ignores the actions."""

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """The observation, no reward, no end."""
        return self._observations, self._rewards, self._over, self._infos

    def close(self) -> None:
        """Nothing to close."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The same attribute for every member."""
        return [getattr(self, attr_name)] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Members have no attributes of their own."""

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Members have no methods."""
        return []

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """No member is wrapped."""
        return [False] * self.num_envs


def decision_time(task: Task, repeats: int) -> Iterator[Row]:
    """Seconds of one `decide` of the policy that comes with the package on a busy engine.

    Observation, the mean of five networks, decision.
    """
    policy = load_policy(PRETRAINED_FILE)
    trace = task.draw(0)
    state = simulation.start(task.engine, trace, 0)
    surrogate.advance(state, trace.rows, 60.0, 0)
    lookout = Lookout(state, task.slo)
    policy.reset(lookout.view)
    seconds = []
    for _ in range(2_000 * repeats):
        began = time.perf_counter()
        policy.decide(lookout.look())
        seconds.append(time.perf_counter() - began)
    if policy.failures:
        raise RuntimeError(f"the policy failed: {policy.failures}")
    yield Row("policy_decision_median_s", float(np.median(seconds)), "s")
    yield Row("policy_decision_p99_s", float(np.percentile(seconds, 99)), "s")


def memory(task: Task) -> Iterator[Row]:
    """Peak resident memory of a fresh process that draws a trace of a million requests and runs its first minute.

    The default scenario, as long as it takes. All that the bench imports is in it, PyTorch too; the second figure is
    what the process held before it drew.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        before, peak = pool.submit(_peak_bytes, task, 1_000_000).result()
    yield Row("million_requests_peak_bytes", peak, "bytes")
    yield Row("million_requests_peak_bytes_before", before, "bytes")


def _peak_bytes(task: Task, requests: int) -> tuple[int, int]:
    before = _max_rss()
    duration_s = 1.02 * task.duration_s() * requests / len(task.draw(0))
    longer = replace(task, scenario=replace(task.scenario, duration_s=duration_s))
    trace = longer.draw(0)
    if len(trace) < requests:
        raise RuntimeError(f"a trace of {len(trace)} requests is too short")
    state = simulation.start(task.engine, trace, 0)
    surrogate.advance(state, trace.rows, 60.0, 0)
    return before, _max_rss()


def _max_rss() -> int:
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run(quick: bool) -> Iterator[Row]:
    """All measurements, one after the other; quick: fewer repeats."""
    torch.set_num_threads(1)  # as in training
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", ["agent=grouped_ppo"])
    task = load_task(config)
    repeats = 1 if quick else 5
    yield from memory(task)  # first, since a new process starts at its parent's peak
    yield from surrogate_speed(repeats)
    yield from cache_speed(repeats)
    yield from environment_speed(task, config, repeats)
    yield from training_speed(task, config, repeats)
    yield from decision_time(task, repeats)
