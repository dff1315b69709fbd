"""Each hand-written rule on a small engine where its choice can be read off, and all of them on short scenarios."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from toys import TICK_S, toy_engine

from flexirl.errors import UserError
from flexirl.policies.heuristics.base import slo_token_budget
from flexirl.policies.interface.decision import CLASSES, ONE_QUEUE, SHORTEST
from flexirl.policies.interface.policy import Policy
from flexirl.policies.interface.view import View
from flexirl.policies.registry import make_policy
from flexirl.policies.rules import rule_names
from flexirl.runtime.profile.engine import EngineProfile, load_profile
from flexirl.runtime.scheduler.invariants import check_invariants
from flexirl.runtime.scheduler.looking import Lookout
from flexirl.runtime.scheduler.plan import apply, plan
from flexirl.runtime.scheduler.state import FINISHED, RUNNING, WAITING, State
from flexirl.runtime.simulator import simulation, surrogate
from flexirl.runtime.simulator.simulation import simulate
from flexirl.workloads.slo import SLO
from flexirl.workloads.trace import DEFERRED, IMMEDIATE, Trace, empty_rows

TOY_SLO = SLO(ttft_s=1024 * TICK_S, tpot_s=32 * TICK_S)
LARGE = {"kv_blocks": 64, "max_model_len": 256}


def request(request_class: int, prompt: int, output: int, **columns: float) -> dict[str, Any]:
    promise = {} if request_class == DEFERRED else {"ttft_slo_s": TOY_SLO.ttft_s, "tpot_slo_s": TOY_SLO.tpot_s}
    row = {"request_class": request_class, "prompt_tokens": prompt, "output_tokens": output, "max_tokens": output}
    return {**row, **promise, **columns}


def immediate(prompt: int, output: int, **columns: float) -> dict[str, Any]:
    return request(IMMEDIATE, prompt, output, **columns)


def deferred(prompt: int, output: int, **columns: float) -> dict[str, Any]:
    return request(DEFERRED, prompt, output, **columns)


class Play:
    """A policy on a toy engine, an iteration at a time, with the invariants checked after each."""

    def __init__(self, policy: Policy, *requests: dict[str, Any], engine: EngineProfile | None = None) -> None:
        rows = empty_rows(len(requests))
        for row, columns in zip(rows, requests, strict=True):
            for column, value in columns.items():
                row[column] = value
        self.policy, self.trace = policy, Trace(rows, "toy", int(rows["tenant"].max()) + 1)
        self.state: State = simulation.start(engine or toy_engine(), self.trace, 0)
        self._lookout = Lookout(self.state, TOY_SLO)
        policy.reset(self.view)

    @property
    def view(self) -> View:
        """The engine as it stands now."""
        return self._lookout.look()

    def step(self, count: int = 1) -> list[int]:
        """Runs `count` iterations; tokens that each request computed in the last one."""
        for _ in range(count):
            before = self["computed"]
            self.state.decision[0] = self.policy.decide(self.view)
            surrogate.advance(self.state, self.trace.rows, 1e9, 1)
            check_invariants(self.state)
        return [int(now - then) for now, then in zip(self["computed"], before, strict=True)]

    def sort_queues(self) -> Play:
        """Puts the first decision in force, so that later ones find the queues in its order."""
        self.state.decision[0] = self.policy.decide(self.view)
        apply(self.state)
        return self

    def __getitem__(self, column: str) -> list[Any]:
        values: list[Any] = self.state.requests[column][: len(self.trace)].tolist()
        return values


# ---------------------------------------------------------------------------------------------- one rule each


def test_vllm_fcfs_goes_by_arrival_and_preempts_the_last_of_the_batch() -> None:
    play = Play(make_policy("vllm_fcfs"), deferred(12, 8), immediate(12, 8))
    assert play.step() == [12, 12]
    play.step(5)
    # Both hold 16 tokens in 4 blocks now, all there are: the newest goes although it is immediate.
    assert play["preemptions"] == [0, 1]


def test_vllm_fcfs_mixes_chunks_and_decodes_in_order_of_the_running_list() -> None:
    policy = make_policy("vllm_fcfs", {"token_budget": 8})
    play = Play(policy, immediate(20, 4), immediate(4, 4), engine=toy_engine(**LARGE))
    assert [play.step() for _ in range(3)] == [[8, 0], [8, 0], [4, 4]]
    assert play.step() == [1, 1]


def test_vllm_priority_preempts_the_least_important_and_only_for_a_running_request() -> None:
    play = Play(make_policy("vllm_priority"), deferred(12, 8), immediate(12, 8))
    play.step(6)
    assert play["preemptions"] == [1, 0]
    # A waiting immediate request takes neither seat nor memory from deferred ones that run.
    play = Play(make_policy("vllm_priority"), deferred(28, 4), immediate(8, 2, arrival_s=TICK_S))
    play.step(3)
    assert play["preemptions"] == [0, 0] and play["status"] == [RUNNING, WAITING]
    play.step()
    play.step()
    assert play["status"] == [FINISHED, RUNNING]


def test_vllm_priority_admits_immediate_requests_first() -> None:
    policy = make_policy("vllm_priority", {"token_budget": 8})
    play = Play(policy, deferred(8, 2), immediate(8, 2))
    assert play.step() == [0, 8]


def test_sarathi_gives_decodes_their_tokens_and_chunks_the_rest() -> None:
    policy = make_policy("sarathi", {"token_budget": 8, "immediate_first": False})
    play = Play(policy, deferred(16, 4), immediate(4, 4), immediate(16, 4), engine=toy_engine(**LARGE))
    assert [play.step() for _ in range(5)] == [[8, 0, 0], [8, 0, 0], [1, 4, 3], [1, 1, 6], [1, 1, 6]]
    play = Play(make_policy("sarathi", {"token_budget": 8}), deferred(16, 4), immediate(8, 4))
    assert play.step() == [0, 8] and play.step() == [7, 1]


def test_the_slo_token_budget_fills_an_iteration_up_to_the_promise() -> None:
    engine = toy_engine(max_tokens_per_step=4096)
    # 16 ticks and one per token; four of the tokens are decodes.
    assert slo_token_budget(engine.values, SLO(1.0, (16 + 1024) * TICK_S)) == 1024
    assert slo_token_budget(engine.values, SLO(1.0, (16 + 1023) * TICK_S)) == 1024 - 128
    assert slo_token_budget(engine.values, SLO(1.0, TICK_S)) == 512


def test_no_evict_sets_aside_all_output_that_may_come() -> None:
    requests = [immediate(4, 8, max_tokens=12) for _ in range(3)]
    play = Play(make_policy("no_evict"), *requests)
    # Each may need 4 of the 8 blocks, so two run, although three prompts would fit.
    play.step()
    assert play["status"] == [RUNNING, RUNNING, WAITING]
    play.step(8)
    assert play["status"] == [FINISHED, FINISHED, RUNNING] and play["preemptions"] == [0, 0, 0]


def test_sglang_ratio_decays_per_decode_iteration_and_restarts_when_idle() -> None:
    policy: Any = make_policy("sglang", {"conservativeness": 0.5, "decay_steps": 10})
    play = Play(policy, immediate(4, 4), immediate(4, 20, arrival_s=1.0), engine=toy_engine(**LARGE))
    start, least = 0.35, 0.35 * 0.14
    play.step()
    assert policy.decide(play.view)["reserve_ratio"] == pytest.approx(start)  # a prefill only so far
    play.step()
    assert policy.decide(play.view)["reserve_ratio"] == pytest.approx(start - (start - least) / 10)
    play.step(2)
    assert play["status"][0] == FINISHED
    assert policy.decide(play.view)["reserve_ratio"] == pytest.approx(start)
    play.step(18)
    assert policy.decide(play.view)["reserve_ratio"] == pytest.approx(least)


def test_sglang_retracts_the_fewest_output_and_raises_the_ratio() -> None:
    policy: Any = make_policy("sglang", {"init_ratio": 0.0, "retract_steps": 2, "clip_output": 1})
    play = Play(policy, immediate(7, 16), immediate(8, 12, arrival_s=TICK_S), engine=toy_engine())
    while not any(play["preemptions"]):
        play.step()
    assert play["preemptions"] == [0, 1] and play["generated"][0] > play["generated"][1]
    made = play["generated"][0]
    assert policy.decide(play.view)["reserve_ratio"] == pytest.approx((made + 2) / (16 + 1))


def test_hygen_lets_deferred_work_join_up_to_the_budget() -> None:
    budget_s = (16 + 6) * TICK_S
    policy = make_policy("hygen", {"latency_budget_s": budget_s})
    play = Play(policy, deferred(16, 4), immediate(8, 8), engine=toy_engine(**LARGE))
    # The immediate prompt alone takes 24 ticks, more than the budget: it runs, and nothing joins it.
    assert play.step() == [0, 8]
    assert [play.step() for _ in range(4)] == [[5, 1], [5, 1], [5, 1], [1, 1]]
    assert play.step() == [1, 1]


def test_hygen_takes_memory_from_deferred_work() -> None:
    policy = make_policy("hygen", {"latency_budget_s": 1.0})
    play = Play(policy, deferred(28, 4), immediate(8, 2, arrival_s=TICK_S))
    play.step(2)
    assert play["preemptions"] == [1, 0] and play["status"][1] == RUNNING


def test_hygen_does_not_run_without_a_budget() -> None:
    with pytest.raises(UserError, match="latency_budget_s"):
        Play(make_policy("hygen"), immediate(4, 2))


def test_conserve_keeps_the_target_beside_immediate_work_and_fills_without() -> None:
    policy = make_policy("conserve", {"tbt_share": 0.75})
    play = Play(policy, deferred(60, 2), immediate(4, 3, arrival_s=TICK_S), engine=toy_engine(**LARGE))
    assert play.step() == [60, 0]
    play = Play(policy, deferred(60, 2), immediate(4, 3), engine=toy_engine(**LARGE))
    # 24 ticks: 8 tokens beside 4 of the immediate prompt, then beside its decodes; then whatever is left.
    assert [play.step() for _ in range(4)] == [[4, 4], [7, 1], [7, 1], [42, 0]]


def test_qoserve_slack_is_that_of_the_next_token_due() -> None:
    play = Play(make_policy("qoserve"), immediate(4, 8), deferred(4, 8), immediate(4, 8), engine=toy_engine(**LARGE))
    play.step(3)
    requests, scheduler = play.state.requests, play.state.scheduler[0]
    requests["first_token_s"][2] -= 16 * TICK_S  # its tokens are due earlier
    due_s = float(requests["first_token_s"][2]) + int(requests["generated"][2]) * TOY_SLO.tpot_s
    decision = play.state.decision[0]
    decision["immediate_step_s"] = decision["deferred_step_s"] = np.inf
    decision["immediate_slack"], decision["deferred_slack"], decision["deferred_decodes"] = 0.5, 1.0, 1.0

    def targets(now_s: float) -> tuple[float, float, int]:
        scheduler["now_s"] = now_s
        plan(play.state)
        return tuple(scheduler[[f"{of}_target_s" for of in ("immediate", "deferred")] + ["deferred_floor"]])

    # The deferred decode runs whatever the slack, and its tick is set aside from the immediate share.
    assert targets(due_s - 5 * TICK_S) == pytest.approx((1.5 * TICK_S, 5 * TICK_S, 0))
    assert targets(due_s + 1.0)[1] == 0.0
    # A request whose promise is broken has nothing left to keep.
    requests["missed"][[0, 2]] = 1
    assert targets(due_s - 5 * TICK_S)[1] == np.inf


def test_qoserve_sizes_chunks_by_the_least_slack_and_runs_all_decodes() -> None:
    policy = make_policy("qoserve", {"slack_used": 1.0})
    play = Play(policy, immediate(4, 8), deferred(4, 8), deferred(200, 2), engine=toy_engine(**LARGE))
    assert play.step() == [4, 4, 56]
    # The next token is due 32 ticks on: 16 of base, two decodes, 14 tokens of prefill. No slack is left unused.
    assert [play.step() for _ in range(3)] == [[1, 1, 14], [1, 1, 14], [1, 1, 14]]
    # With a promise that no iteration can keep, decodes run all the same and prefill waits.
    play.state.requests["tpot_slo_s"][0] = 0.0
    assert play.step() == [1, 1, 0]


def test_qoserve_orders_by_deadline_and_work_and_relegates_what_will_be_late() -> None:
    knobs = {"max_chunk_tokens": 16, "low_load_alpha_s": 8 * TICK_S}
    long, short, late = immediate(32, 2), immediate(16, 2, arrival_s=0.0), immediate(16, 2)
    late["ttft_slo_s"] = 8 * TICK_S  # cannot be met: the prompt alone takes longer
    play = Play(make_policy("qoserve", knobs), long, short, late, deferred(16, 2), engine=toy_engine(**LARGE))
    assert [play.step() for _ in range(2)] == [[0, 16, 0, 0], [15, 1, 0, 0]]
    assert play["relegated"] == [0, 0, 1, 0]
    play.step(3)
    # Behind all others, deferred ones included.
    assert play["computed"][3] == 16 and play["computed"][2] < 16


def test_qoserve_puts_a_deferred_request_first_whose_window_closes_first() -> None:
    urgent = deferred(8, 4, window_s=512 * TICK_S)
    play = Play(make_policy("qoserve"), immediate(8, 4), urgent).sort_queues()
    assert play.policy.decide(play.view)["discipline"] == ONE_QUEUE
    play = Play(make_policy("qoserve"), immediate(8, 4), deferred(8, 4, window_s=64.0)).sort_queues()
    assert play.policy.decide(play.view)["discipline"] == CLASSES
    play = Play(make_policy("qoserve"), immediate(8, 4), deferred(8, 4))
    assert play.policy.decide(play.view)["deferred_order"] == SHORTEST


def test_qoserve_expects_the_mean_of_finished_requests_and_two_deviations() -> None:
    policy = make_policy("qoserve", {"revise_s": TICK_S})
    play = Play(policy, deferred(4, 2), deferred(4, 6), deferred(4, 20), engine=toy_engine(**LARGE))
    play.step(7)
    assert policy.decide(play.view)["expected_output"] == pytest.approx(4 + 2 * 2)


def test_edf_serves_whatever_is_due_first() -> None:
    policy = make_policy("edf", {"token_budget": 8})
    soon = deferred(8, 2, window_s=512 * TICK_S)
    assert Play(policy, deferred(8, 2), immediate(8, 2), soon).sort_queues().step() == [0, 0, 8]
    assert Play(policy, deferred(8, 2), immediate(8, 2)).step() == [0, 8]
    assert Play(policy, deferred(8, 2, window_s=9.0), deferred(8, 2, window_s=8.0)).step() == [0, 8]
    tight = {**immediate(8, 2), "ttft_slo_s": 256 * TICK_S}
    assert Play(policy, immediate(8, 2), tight).step() == [0, 8]


def test_laxity_raises_the_target_along_its_ramp_and_then_a_floor() -> None:
    knobs = {"ramp_share": 0.5, "calm_share": 0.75, "urgent_share": 1.0, "revise_s": 8 * TICK_S, "floor_tokens": 3}
    calm = Play(make_policy("laxity", knobs), deferred(40, 200, window_s=1e6), engine=toy_engine(**LARGE))
    calm.step(3)
    decision = calm.policy.decide(calm.view)
    assert decision["deferred_step_s"] == pytest.approx(0.75 * TOY_SLO.tpot_s, rel=1e-3)
    assert decision["deferred_token_floor"] == 0
    urgent = Play(make_policy("laxity", knobs), deferred(40, 200, window_s=0.5), engine=toy_engine(**LARGE))
    urgent.step(4)
    decision = urgent.policy.decide(urgent.view)
    assert decision["deferred_step_s"] == pytest.approx(TOY_SLO.tpot_s) and decision["deferred_token_floor"] == 3


def test_laxity_calls_starved_work_urgent() -> None:
    knobs = {"calm_share": 0.5, "urgent_share": 1.0, "revise_s": 8 * TICK_S}
    play = Play(
        make_policy("laxity", knobs), immediate(4, 40), deferred(8, 4, window_s=1e6), engine=toy_engine(**LARGE)
    )
    # 16 ticks leave no room beside the immediate decode, so nothing deferred has run when it looks again.
    assert play.step() == [4, 0]
    assert play.step() == [1, 8]


def test_laxity_counts_work_at_the_rate_of_late() -> None:
    knobs = {"ramp_share": 1.0, "calm_share": 1.0, "urgent_share": 2.0, "revise_s": 0.001}
    policy = make_policy("laxity", knobs)
    play = Play(policy, deferred(4, 20, window_s=1.0), engine=toy_engine(**LARGE))
    play.step(4)
    # Since the last look one token was made in one iteration of 17 ticks; none has finished, so 20 are expected.
    state, now_s = play.state, play.view.now_s
    left = 1 + 20 - int(state.requests["generated"][0])
    rates = [4 + 1, 1, 1, 1]  # tokens of the four iterations, the first with the prompt
    seconds = [(16 + tokens) * TICK_S for tokens in (4, 1, 1, 1)]
    rate = rates[0] / seconds[0]
    for tokens, second in zip(rates[1:], seconds[1:], strict=True):
        rate = 0.5 * tokens / second + 0.5 * rate
    u = 1.0 - (1.0 - now_s - left / rate)
    expected = (1.0 + np.clip(u, 0.0, 1.0)) * TOY_SLO.tpot_s
    assert policy.decide(play.view)["deferred_step_s"] == pytest.approx(expected)


def test_vtc_serves_the_tenant_that_has_had_least() -> None:
    policy = make_policy("vtc", {"token_budget": 8})
    requests = [immediate(8, 1, tenant=0), immediate(8, 1, tenant=0), immediate(8, 1, tenant=1)]
    play = Play(policy, *requests)
    assert [play.step() for _ in range(3)] == [[8, 0, 0], [0, 0, 8], [0, 8, 0]]
    # Service of either class counts where there is one queue.
    one_queue = make_policy("vtc", {"token_budget": 8, "immediate_first": False})
    play = Play(one_queue, deferred(8, 1, tenant=0), immediate(8, 1, tenant=0), deferred(8, 1, tenant=1))
    assert [play.step() for _ in range(3)] == [[8, 0, 0], [0, 0, 8], [0, 8, 0]]


def test_anchors_keep_the_other_class_out() -> None:
    play = Play(make_policy("immediate_only"), deferred(8, 2), immediate(4, 2))
    play.step(2)
    assert play["status"] == [WAITING, FINISHED]
    requests = [immediate(8, 2), *(deferred(8, 6) for _ in range(6))]
    play = Play(make_policy("deferred_only"), *requests)
    while FINISHED not in play["status"][1:] or WAITING in play["status"][1:]:
        play.step()
        assert play["status"][0] == WAITING or WAITING not in play["status"][1:]


def test_fixed_dials_hold_what_the_dials_stand_for() -> None:
    play = Play(make_policy("fixed_dials", {"tune": False}), immediate(4, 2), deferred(4, 2))
    at_rest = play.policy.decide(play.view).copy()
    play = Play(make_policy("fixed_dials", {"dials": [0.0, -1.0]}), immediate(4, 2), deferred(4, 2))
    assert play.policy.decide(play.view)["deferred_slack"] < at_rest["deferred_slack"]
    assert play.policy.decide(play.view)["immediate_step_s"] == at_rest["immediate_step_s"]


# ---------------------------------------------------------------------------------------------- all rules

ALL = [(name, {"latency_budget_s": 0.03} if name == "hygen" else {}) for name in rule_names()]


def contended_trace(seed: int, duration_s: float, window_s: float = np.inf) -> Trace:
    """Bursts of immediate requests beside more deferred work than fits, on an H100's scale."""
    rng = np.random.default_rng(seed)
    bursts = np.repeat(np.arange(0.5, duration_s, 4.0), 20)
    rows = empty_rows(len(bursts) + 150)
    rows["request_class"][len(bursts) :] = DEFERRED
    rows["window_s"][len(bursts) :] = window_s
    rows["arrival_s"][: len(bursts)] = bursts + rng.uniform(0, 0.5, len(bursts))
    rows["ttft_slo_s"][: len(bursts)], rows["tpot_slo_s"][: len(bursts)] = 1.0, 0.05
    rows["prompt_tokens"] = rng.integers(200, 3000, len(rows))
    rows["output_tokens"] = rng.integers(2, 200, len(rows))
    rows["max_tokens"] = 400
    rows["tenant"] = rng.integers(0, 3, len(rows))
    return Trace(rows[np.argsort(rows["arrival_s"], kind="stable")], "contended", 3)


SMALL_H100 = load_profile("h100-llama-3.1-8b").replace(kv_blocks=3000, max_running=48)
H100_SLO = SLO(1.0, 0.05)


@pytest.mark.parametrize("name, knobs", ALL, ids=rule_names())
def test_every_policy_keeps_the_invariants_and_its_word(name: str, knobs: dict[str, Any]) -> None:
    policy = make_policy(name, knobs)
    assert policy.name == name
    trace = contended_trace(0, 6.0, window_s=5.0)
    state = simulation.start(SMALL_H100, trace, 0)
    lookout = Lookout(state, H100_SLO)
    policy.reset(lookout.view)
    until_s = 0.0
    while lookout.look().now_s < 6.0:
        decision = policy.decide(lookout.view)
        assert decision.dtype == state.decision.dtype and decision.shape == ()
        state.decision[0] = decision
        until_s = lookout.view.now_s + 0.2
        surrogate.advance(state, trace.rows, until_s, 1 if policy.every_iteration else 0)
        check_invariants(state)


@pytest.mark.parametrize("name, knobs", ALL, ids=rule_names())
def test_every_policy_repeats_itself_also_from_one_object(name: str, knobs: dict[str, Any]) -> None:
    policy = make_policy(name, knobs)
    trace = contended_trace(1, 8.0)
    figures = [
        simulate(again, SMALL_H100, trace, H100_SLO, 8.0).figures
        for again in (policy, policy, make_policy(name, knobs))
    ]
    for run in figures:
        run.pop("wall_s")
    assert figures[0] == figures[1] == figures[2]


def test_policies_that_know_the_classes_earn_more_than_first_come_first_served() -> None:
    trace = contended_trace(2, 20.0)

    def revenue(name: str, knobs: dict[str, Any] | None = None) -> float:
        value = simulate(make_policy(name, knobs), SMALL_H100, trace, H100_SLO, 20.0).figures["revenue_per_s"]
        assert value is not None
        return float(value)

    fcfs = revenue("vllm_fcfs")
    assert revenue("hygen", {"latency_budget_s": 0.03}) > fcfs
    assert revenue("conserve") > fcfs
    assert revenue("qoserve") > fcfs
