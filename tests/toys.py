"""Small engines and traces for the scheduler's tests.

Every figure is a multiple of a power of two, so that sums are exact in whatever order they are taken: a clock computed
in another way must agree to the last bit, and ties happen as often as they can.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flexirl.policies.interface.decision import default_decision
from flexirl.runtime.profile.engine import EngineProfile, make_profile
from flexirl.runtime.scheduler.state import FUTURE, RUNNING, WAITING, State
from flexirl.runtime.simulator import simulation, surrogate
from flexirl.workloads.trace import DEFERRED, IMMEDIATE, Trace, empty_rows

TICK_S = 2.0**-10


def toy_engine(**changes: float) -> EngineProfile:
    """An engine with 8 blocks of 4 tokens whose iteration takes 16 ticks, and one more for each of its tokens."""
    figures: dict[str, float] = {
        "base_s": 16 * TICK_S,
        "per_token_s": TICK_S,
        "kv_blocks": 8,
        "block_size": 4,
        "max_tokens_per_step": 64,
        "max_running": 4,
        "max_model_len": 32,
    }
    return make_profile("toy", {**figures, **changes}, {}, {})


def toy_trace(*requests: dict[str, Any]) -> Trace:
    """A trace of requests given by the columns of `TRACE_ROW` in which they differ from `empty_rows`."""
    rows = empty_rows(len(requests))
    for row, request in zip(rows, requests, strict=True):
        for column, value in request.items():
            row[column] = value
        row["max_tokens"] = max(row["max_tokens"], row["output_tokens"])
    rows = rows[np.argsort(rows["arrival_s"], kind="stable")]
    return Trace(rows, "toy", int(rows["tenant"].max(initial=0)) + 1)


def decision_with(**changes: float) -> np.ndarray:
    """The default decision with some fields changed."""
    decision = default_decision()
    for name, value in changes.items():
        decision[name] = value
    return decision


class ToyRun:
    """An engine on a trace, one decision in force at a time."""

    def __init__(self, engine: EngineProfile, trace: Trace, seed: int = 0, **changes: float) -> None:
        self.trace = trace
        self.state: State = simulation.start(engine, trace, seed)
        self.decide(**changes)

    def decide(self, **changes: float) -> None:
        """Puts the default decision with these changes in force from the next advance on."""
        self.state.decision[0] = decision_with(**changes)

    def advance(self, until_s: float = 1e6, iterations: int = 0) -> None:
        """Runs to `until_s`, or for `iterations` iterations if that is above 0."""
        surrogate.advance(self.state, self.trace.rows, until_s, iterations)

    def drain(self) -> None:
        """Runs iteration by iteration until every request has ended, so that the clock stands at the last end."""
        while np.isin(self.state.requests["status"][: len(self.trace)], (FUTURE, WAITING, RUNNING)).any():
            before = self.iterations
            self.advance(iterations=1)
            assert self.iterations > before, "a request can never end"

    def __getitem__(self, name: str) -> list[Any]:
        """A column of the requests, in order of arrival."""
        return list(self.state.requests[name][: len(self.trace)].tolist())

    @property
    def now_s(self) -> float:
        """Seconds on the engine's clock."""
        return float(self.state.scheduler["now_s"][0])

    @property
    def iterations(self) -> int:
        """Iterations since the start."""
        return int(self.state.scheduler["iterations"][0])

    def total(self, name: str) -> int:
        """A running total of the classes, both together."""
        return int(self.state.classes[name].sum())


def immediate(arrival_s: float, prompt: int, output: int, **more: float) -> dict[str, Any]:
    """An immediate request for `toy_trace`."""
    columns = {"arrival_s": arrival_s, "prompt_tokens": prompt, "output_tokens": output, **more}
    return {"request_class": IMMEDIATE, **columns}


def deferred(arrival_s: float, prompt: int, output: int, **more: float) -> dict[str, Any]:
    """A deferred request for `toy_trace`."""
    return {**immediate(arrival_s, prompt, output, **more), "request_class": DEFERRED}


def heavy_trace(seed: int, count: int = 400) -> Trace:
    """More than the engine can serve in time: every way for a request to end occurs."""
    rng = np.random.default_rng(seed)
    rows = empty_rows(count)
    rows["arrival_s"] = np.sort(rng.uniform(0, 4, count))
    rows["request_class"] = rng.integers(0, 2, count)
    rows["tenant"] = rng.integers(0, 3, count)
    rows["prompt_tokens"] = rng.integers(1, 60, count)
    rows["output_tokens"] = rng.integers(1, 30, count)
    rows["max_tokens"] = rows["output_tokens"] + rng.integers(0, 20, count)
    rows["prefix_tokens"] = rows["prompt_tokens"] // 2
    is_immediate = rows["request_class"] == IMMEDIATE
    rows["ttft_slo_s"] = np.where(is_immediate, 1.0, np.inf)
    rows["tpot_slo_s"] = np.where(is_immediate, 0.06, np.inf)
    rows["window_s"] = np.where(is_immediate, np.inf, rng.choice([2.0, 8.0, np.inf], count))
    return Trace(rows, "heavy", 3)
