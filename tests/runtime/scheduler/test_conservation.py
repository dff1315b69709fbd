"""Nothing is lost: in runs that drain, every request ends once and every token is accounted for."""

from __future__ import annotations

import numpy as np
import pytest
from toys import TICK_S, ToyRun, decision_with, heavy_trace, toy_engine

from flexirl.runtime.scheduler.state import (
    CANCELLED,
    EXPIRED,
    FINISHED,
    FUTURE,
    REJECTED,
    RUNNING,
    WAITING,
    itl_bin_edges,
)
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

DECISIONS: dict[str, dict[str, float]] = {
    "defaults": {},
    "one queue": {"discipline": 0, "victim": 0, "preempt_for_immediate": 0, "decodes_first": 0},
    "swap": {"discipline": 1, "victim": 2, "preemption": 2},
    "step targets": {"immediate_step_s": 60 * TICK_S, "deferred_step_s": 40 * TICK_S, "relegate": 1},
    "reserve": {"reserve_ratio": 0.5, "reserve_new_ratio": 1.0, "immediate_order": 1, "deferred_order": 1},
    "fair": {"immediate_order": 3, "deferred_order": 3, "victim": 3, "deferred_kv_share": 0.7},
}


@pytest.mark.parametrize("name", DECISIONS)
@pytest.mark.parametrize("caching", [0, 1])
def test_every_request_ends_once_and_every_token_counts(name: str, caching: int) -> None:
    engine = toy_engine(
        kv_blocks=40, host_kv_blocks=20, max_running=12, max_model_len=100, noise=0.05, prefix_caching=caching,
        per_swap_token_s=TICK_S / 8,
    )  # fmt: skip
    trace = heavy_trace(seed=5)
    run = ToyRun(engine, trace, seed=1)
    ended_at: dict[int, float] = {}
    rng = np.random.default_rng(6)
    while len(ended_at) < len(trace):
        run.state.decision[0] = decision_with(**DECISIONS[name])
        run.state.decision["preempt_count"] = int(rng.random() < 0.1)
        run.advance(run.now_s + 0.25)
        assert run.now_s < 200, "it never drains"
        for r in np.flatnonzero(~np.isin(run.state.requests["status"], (FUTURE, WAITING, RUNNING))).tolist():
            assert ended_at.setdefault(r, run["finish_s"][r]) == run["finish_s"][r], "it ended twice"

    requests, classes, scheduler = run.state.requests, run.state.classes, run.state.scheduler[0]
    status = requests["status"]
    for request_class, group in enumerate(classes):
        mine = requests[requests["request_class"] == request_class]
        assert group["arrived"] == len(mine) and group["arrived_prompt"] == mine["prompt_tokens"].sum()
        assert group["finished"] == (mine["status"] == FINISHED).sum()
        assert group["ended_otherwise"] == np.isin(mine["status"], (EXPIRED, REJECTED, CANCELLED)).sum()
        assert group["kept"] + group["lost"] == group["arrived"]
        assert group["waiting"] == group["waiting_tokens"] == group["running"] == group["kv_blocks"] == 0
        kept = mine[mine["missed"] == 0]
        assert (kept["status"] == FINISHED).all()
        assert group["prompt_done"] == mine["furthest"].sum()
        assert group["output_done"] == mine["generated"].sum()
        # What was made either counts for a kept promise or is void.
        assert group["prompt_done"] == group["kept_prompt"] + group["void_prompt"]
        assert group["output_done"] == group["kept_output"] + group["void_output"]
        assert group["lost_prompt"] == mine["prompt_tokens"].sum() - kept["prompt_tokens"].sum()
        assert group["lost_output"] == mine["output_tokens"].sum() - kept["output_tokens"].sum()
        assert group["preemptions"] == mine["preemptions"].sum()
    finished = requests[status == FINISHED]
    assert (finished["generated"] == finished["output_tokens"]).all()
    assert (finished["furthest"] == finished["prompt_tokens"]).all()
    assert scheduler["free_blocks"] == 40 and scheduler["host_free_blocks"] == 20
    assert run.state.tenants["active"].tolist() == [0, 0, 0]
    assert scheduler["recomputed_tokens"] >= 0
    assert classes["lost"].min() > 0 and classes["kept"].sum() > 0, "the workload tests nothing"
    # One latency between every two tokens of an immediate request, and they add up to its time after the first.
    gaps = (requests["generated"] - 1).clip(0)[requests["request_class"] == IMMEDIATE].sum()
    assert run.state.itl_histogram.sum() == gaps
    spoken = requests[(requests["request_class"] == IMMEDIATE) & (requests["generated"] > 0)]
    total_s = (spoken["last_token_s"] - spoken["first_token_s"]).sum()
    edges = itl_bin_edges()
    assert (run.state.itl_histogram * edges[:-1]).sum() <= total_s <= (run.state.itl_histogram * edges[1:]).sum()
    promised = spoken[(spoken["status"] == FINISHED) & (spoken["missed"] == 0)]
    assert (promised["first_token_s"] <= promised["arrival_s"] + 1.0).all()
    pace_s = (promised["finish_s"] - promised["first_token_s"]) / (promised["output_tokens"] - 1).clip(1)
    assert (pace_s <= 0.06 * (1 + 1e-6)).all()
    on_time = requests[(requests["request_class"] == DEFERRED) & (requests["missed"] == 0)]
    assert (on_time["finish_s"] <= on_time["deadline_s"]).all()
