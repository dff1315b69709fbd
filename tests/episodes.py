"""Short episodes for the tests of the environments: random requests on an engine small enough to run out of memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from flexirl.envs.fleet import Task
from flexirl.envs.reward import Reward
from flexirl.policies.interface.action import GRID
from flexirl.runtime.profile.engine import EngineProfile, load_profile
from flexirl.workloads.scenario import Rngs, Scenario, ServiceTime
from flexirl.workloads.slo import SLO
from flexirl.workloads.trace import CONTENT, Trace, empty_rows

REVENUE = Reward("revenue", "revenue", deferred=1.0, loss=1.0, waiting=0.0)
VALUE = Reward("value", "value", deferred=1.0, loss=0.0, waiting=0.0, lateness=1.0)
LATENCY = Reward("latency", "requests in the system", deferred=0.0, loss=0.0, waiting=1.0)
PROMISE = SLO(ttft_s=1.0, tpot_s=0.05)


@dataclass
class Requests:
    """A stream, immediate or deferred: `least` to `most` requests that arrive evenly spread over `within_s`."""

    least: int
    most: int
    within_s: float
    prompts: tuple[int, int] = (20, 1500)
    outputs: tuple[int, int] = (2, 120)
    window_s: float = np.inf
    always_the_same: bool = False
    num_tenants: int = 1
    predicted: bool = False
    in_common: int = 0  # tokens that all longer prompts begin with

    def length_s(self, duration_s: float | None, service_time_s: ServiceTime) -> float:
        """The scenario's own."""
        assert duration_s is not None
        return duration_s

    def draw(self, duration_s: float | None, service_time_s: ServiceTime, rngs: Rngs) -> Trace:
        """Rows sorted by arrival."""
        rng = np.random.default_rng(3) if self.always_the_same else rngs["arrivals"]
        rows = empty_rows(int(rngs["tenants"].integers(self.least, self.most + 1)))
        rows["arrival_s"] = np.sort(rng.uniform(0, self.within_s, len(rows)))
        rows["prompt_tokens"] = rng.integers(*self.prompts, len(rows), endpoint=True)
        rows["output_tokens"] = rng.integers(*self.outputs, len(rows), endpoint=True)
        rows["max_tokens"] = rows["output_tokens"]
        rows["predicted_output_tokens"] = rows["output_tokens"] * (rng.random(len(rows)) < 0.5) * self.predicted
        rows["window_s"] = self.window_s
        rows["tenant"] = rng.integers(0, self.num_tenants, len(rows))
        rows["content_count"] = (self.in_common > 0) & (rows["prompt_tokens"] > self.in_common)
        return Trace(
            rows, "requests", self.num_tenants, contents=np.array([(7, self.in_common)][: self.in_common], CONTENT)
        )


def small_engine(**changes: float) -> EngineProfile:
    """An H100 with a cache of 12,800 tokens and 24 seats, so that requests queue and are preempted."""
    figures: dict[str, float] = {
        "kv_blocks": 800, "host_kv_blocks": 100, "max_running": 24, "max_tokens_per_step": 2048, "max_model_len": 4096,
    }  # fmt: skip
    return load_profile("h100-llama-3.1-8b").replace(**{**figures, **changes})


def small_task(
    immediate: Requests | None = None, deferred: Requests | None = None, duration_s: float = 8.0,
    engine: EngineProfile | None = None, reward: Reward = REVENUE, **changes: Any,
) -> Task:  # fmt: skip
    """Busy episodes of 40 decisions: immediate requests for most of the time, deferred ones all there at once."""
    immediate = immediate or Requests(80, 80, 6.0)
    deferred = deferred or Requests(60, 60, 0.0, (200, 2000), (10, 200))
    scenario = Scenario("small", immediate, deferred, duration_s)
    return Task(scenario, engine or small_engine(), PROMISE, reward, **changes)


def random_actions(task: Task, members: int, steps: int, seed: int = 0) -> list[np.ndarray]:
    """Uniform actions of the task's kind for every member and step."""
    rng = np.random.default_rng(seed)
    if task.action == "grid":
        return [rng.integers(len(GRID), size=members) for _ in range(steps)]
    return [rng.uniform(-1, 1, (members, *task.action_shape())).astype(np.float32) for _ in range(steps)]
