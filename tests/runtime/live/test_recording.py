"""Traces of execution: what a run on the toy device leaves behind, against what came of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from live_toys import TickClock, ToyExecutor
from toys import toy_engine

from flexirl.errors import UserError
from flexirl.policies.registry import make_policy
from flexirl.runtime.live.engine import LiveEngine
from flexirl.runtime.live.options import Options
from flexirl.runtime.live.recording import Recording, read_timeline
from flexirl.runtime.live.requests import Completion, Request
from flexirl.runtime.live.step import Step
from flexirl.workloads.slo import SLO
from flexirl.workloads.trace import DEFERRED, IMMEDIATE


def test_a_recorded_run_tells_what_happened(tmp_path: Path) -> None:
    steps: list[Step] = []
    ended: list[Completion] = []
    with Recording(tmp_path) as recording:

        def record(step: Step) -> None:
            steps.append(step)
            recording(step)

        executor = ToyExecutor(toy_engine())
        options = Options(clock=TickClock(), on_step=record, on_end=ended.append)
        engine = LiveEngine(executor, make_policy("qoserve"), SLO(10.0, 1.0), options)
        for i in range(6):
            engine.add_request(Request(f"r{i}", [i, 1, 2, 3], 5, DEFERRED if i % 2 else IMMEDIATE))
        engine.drain()
    events = [event for event in json.loads((tmp_path / "trace.json").read_text()) if event]
    iterations = [event for event in events if event["ph"] == "X" and event["tid"] == 1]
    assert len(iterations) == len(steps) == engine.metrics()["iterations"]
    # Every token of every prompt and all output but the last token of each was computed, unless it was preempted.
    computed = sum(sum(event["args"]["tokens"].values()) for event in iterations)
    assert computed >= sum(4 + len(completion.token_ids) - 1 for completion in ended)
    starts = [event["ts"] for event in iterations]
    assert starts == sorted(starts) and all(event["dur"] > 0 for event in iterations)
    assert sum(event["name"] == "decision" for event in events) >= 1
    timeline = read_timeline(tmp_path / "timeline.csv")
    assert len(timeline) == len(steps) and (np.diff(timeline["now_s"]) > 0).all()
    last = timeline[-1]
    assert last["immediate_running"] == last["deferred_running"] == 0 == last["immediate_kv_share"]


def test_what_is_no_timeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a readable timeline"):
        read_timeline(tmp_path / "missing.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="columns a, b"):
        read_timeline(tmp_path / "other.csv")
