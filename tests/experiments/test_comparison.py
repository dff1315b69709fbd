"""What a leaderboard says of requests that the engine cannot serve."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flexirl.benchmarks.suites import composed
from flexirl.experiments.comparison import compare, on_surrogate, table
from flexirl.experiments.configuration import load_task
from flexirl.policies.interface.view import View
from flexirl.policies.registry import make_policy
from flexirl.runtime.scheduler.state import REJECTED
from flexirl.workloads.readers import read_trace


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """200 requests, one a second; every twentieth has a prompt of 3000 tokens, another twentieth an output of 2000."""
    lines = [
        f"{i},{3000 if i % 20 == 0 else 500},{2000 if i % 20 == 10 else 700 if i % 20 == 0 else 50}" for i in range(200)
    ]
    path = tmp_path / "t.csv"
    path.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *lines]) + "\n")
    return path


@pytest.mark.parametrize("limit", ["engine.max_model_len=2048", "engine.kv_blocks=128"])
def test_what_cannot_be_served_is_counted_and_is_no_load(trace: Path, limit: str) -> None:
    overrides = ("workload=trace", f"workload.path={trace}", "workload.duration_s=null", "workload.warmup_s=0",
                 "workload.load=0.3", "workload/deferred=none")  # fmt: skip
    task = load_task(composed([*overrides, limit]))
    comparison = compare(task, ["vllm_fcfs"], 1)
    row = comparison.rows[0]
    seconds = task.service_time_s.if_held(asked := read_trace(trace).rows)
    assert row["unservable_work"] == pytest.approx(seconds[asked["prompt_tokens"] == 3000].sum() / seconds.sum())
    assert row["load"] == pytest.approx(0.3)
    assert (row["unservable"], row["cut_short"]) == (0.05, 0.05)
    assert (comparison.first_runs["vllm_fcfs"].state.requests["status"] == REJECTED).sum() == 10
    said = table(comparison.rows).splitlines()[-2:]
    assert said[0].startswith("5.00% of the immediate requests (") and "no part of the load" in said[0]
    assert said[1].startswith("5.00% of the immediate requests end where")
    whole = compare(load_task(composed(overrides)), ["vllm_fcfs"], 1)
    assert whole.rows[0]["unservable"] == 0.0 and "immediate requests" not in table(whole.rows)


def test_a_trained_policy_keeps_its_interval() -> None:
    """It is asked as often as it was in training, whatever the configuration says of others."""
    task = load_task(composed(["workload=tiny", "workload.duration_s=4", "workload.warmup_s=0", "env.interval_s=0.2"]))
    asked: dict[str, int] = {}
    for name in ("seldom", "as configured"):
        policy = make_policy("edf")

        def decide(view: View, name: str = name, decide: Any = policy.decide) -> Any:
            asked[name] = asked.get(name, 0) + 1
            return decide(view)

        trained = SimpleNamespace(name=name, every_iteration=False, reset=policy.reset, decide=decide)
        if name == "seldom":
            trained.interval_s = 1.0
        on_surrogate(trained, task, task.draw(0), 0)
    assert asked["seldom"] <= 4 < 15 < asked["as configured"] <= 20
