"""What an episode pays, against the table of requests at its end: revenue, less what nobody can change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from episodes import LATENCY, REVENUE, VALUE, Requests, random_actions, small_task

from flexirl.envs.fleet import Fleet, Task
from flexirl.policies.interface.action import NUM_DIALS
from flexirl.runtime.scheduler.state import (
    FINISHED,
    FUTURE,
    RUNNING,
    WAITING,
    State,
)
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

PROMPT_PRICE, OUTPUT_PRICE, DISCOUNT = 1.0, 4.0, 0.5
# Long enough for every request to end, though windows close for some of the deferred ones.
DRAINED = small_task(Requests(300, 300, 3.0), Requests(40, 40, 0.5, (200, 2000), (10, 300), window_s=12.0), 60.0)


def play(task: Task, actions: list[np.ndarray]) -> tuple[float, State, dict[str, float]]:
    """The rewards of one episode in price units, how it ended, and its figures."""
    fleet = Fleet(task, 1)
    fleet.reset(2)
    total = sum(float(fleet.step(action)[1][0]) for action in actions)
    return total * float(fleet._reward["scale"][0]) * task.interval_s, fleet.state(0), fleet.episode_figures(0)


def value(requests: np.ndarray) -> float:
    """What immediate requests pay."""
    return float((PROMPT_PRICE * requests["prompt_tokens"] + OUTPUT_PRICE * requests["output_tokens"]).sum())


def revenue(state: State, since_s: float = 0.0) -> float:
    """What requests that finished since then pay, by their promises and their own times."""
    r = state.requests[(state.requests["status"] == FINISHED) & (state.requests["finish_s"] > since_s)]
    immediate, deferred = r[r["request_class"] == IMMEDIATE], r[r["request_class"] == DEFERRED]
    decode_s = immediate["finish_s"] - immediate["first_token_s"]
    kept = immediate["first_token_s"] <= immediate["arrival_s"] + 1.0
    kept &= decode_s <= 0.05 * (immediate["output_tokens"] - 1) * (1 + 1e-9)
    on_time = deferred["finish_s"] <= deferred["arrival_s"] + 12.0
    return value(immediate[kept]) + DISCOUNT * value(deferred[on_time])


@pytest.mark.parametrize("steps", [7, 40, 300])
def test_rewards_sum_to_deferred_work_done_less_immediate_value_lost(steps: int) -> None:
    total, state, _ = play(DRAINED, random_actions(DRAINED, 1, steps, seed=1))
    r = state.requests[state.requests["status"] != FUTURE]
    immediate, deferred = r[r["request_class"] == IMMEDIATE], r[r["request_class"] == DEFERRED]
    # What waits after a preemption counts for nothing until it is back in the batch.
    alive = deferred[(deferred["missed"] == 0) & np.isin(deferred["status"], (RUNNING, FINISHED))]
    prompts = alive["prompt_tokens"] * (alive["generated"] / alive["output_tokens"])  # in step with the output
    done = DISCOUNT * float((PROMPT_PRICE * prompts + OUTPUT_PRICE * alive["generated"]).sum())
    lost = value(immediate[immediate["missed"] == 1])
    assert total == pytest.approx(done - lost, rel=1e-4, abs=1.0)


def test_over_a_drained_episode_rewards_are_revenue_less_a_constant() -> None:
    """The constant is what all immediate requests together would pay: no policy changes it."""
    constants, revenues = [], []
    idle = np.zeros((1, NUM_DIALS), np.float32)
    greedy = np.ones((1, NUM_DIALS), np.float32)
    greedy[0, 5] = 0.0  # but for preempting
    for actions in ([idle] * 300, [greedy] * 300, random_actions(DRAINED, 1, 300, seed=3)):
        total, state, _ = play(DRAINED, actions)
        assert not np.isin(state.requests["status"], (WAITING, RUNNING)).any()
        assert state.scheduler["trace_next"][0] == 340
        revenues.append(revenue(state))
        constants.append(revenues[-1] - total)
    assert len(set(revenues)) == 3
    everything = value(state.requests[(state.requests["request_class"] == IMMEDIATE) & (state.requests["status"] > 0)])
    assert constants == pytest.approx([everything] * 3, rel=1e-4)


def test_rewards_by_value_sum_to_value_less_a_constant() -> None:
    """What late requests are worth, and what it costs that clients give up, from the requests' own times at the end."""
    crowd = Requests(300, 300, 3.0, (500, 3000), (2, 120))
    task = replace(DRAINED, scenario=replace(DRAINED.scenario, immediate=crowd), reward=VALUE)
    constants, values = [], []
    for actions in ([np.zeros((1, NUM_DIALS), np.float32)] * 300, random_actions(task, 1, 300, seed=3)):
        total, state, figures = play(task, actions)
        r = state.requests[state.requests["status"] == FINISHED]
        assert not np.isin(state.requests["status"], (WAITING, RUNNING)).any()
        immediate, deferred = r[r["request_class"] == IMMEDIATE], r[r["request_class"] == DEFERRED]
        first = immediate["first_token_s"] - immediate["arrival_s"]  # 1 s is promised, and 50 ms for each further token
        last = immediate["finish_s"] - immediate["arrival_s"]
        promised = first + 0.05 * (immediate["output_tokens"] - 1)
        worth = np.interp(first, [1.0, 4.0], [1.0, 0.0])
        worth = np.minimum(worth, np.interp(last / promised, [1.0, 4.0], [1.0, 0.0]))
        price = PROMPT_PRICE * immediate["prompt_tokens"] + OUTPUT_PRICE * immediate["output_tokens"]
        gave_up = first > 4.0
        on_time = deferred["finish_s"] <= deferred["arrival_s"] + 12.0
        values.append((price * worth).sum() - 0.5 * price[gave_up].sum() + DISCOUNT * value(deferred[on_time]))
        constants.append(values[-1] - total)
        assert figures["value_per_s"] * state.scheduler["now_s"][0] == pytest.approx(values[-1])
        assert gave_up.any() and ((worth > 0) & (worth < 1)).any()
    everything = value(state.requests[(state.requests["request_class"] == IMMEDIATE) & (state.requests["status"] > 0)])
    assert constants == pytest.approx([everything] * 2, rel=1e-3) and values[0] != values[1]


@pytest.mark.parametrize("warmup_s", [0.0, 2.0])
def test_figures_of_an_episode_are_those_of_its_requests(warmup_s: float) -> None:
    task = replace(DRAINED, scenario=replace(DRAINED.scenario, warmup_s=warmup_s))
    fleet = Fleet(task, 1)
    fleet.reset(2)
    began_s = preemptions = 0.0
    for action in random_actions(task, 1, 300, seed=3):
        fleet.step(action)
        state = fleet.state(0)
        now_s = float(state.scheduler["now_s"][0])
        if began_s == 0 < warmup_s <= now_s:
            began_s, preemptions = now_s, float(state.requests["preemptions"].sum())
    figures = fleet.episode_figures(0)
    r = state.requests
    immediate = (r["request_class"] == IMMEDIATE) & (r["status"] != FUTURE)
    assert figures["revenue_per_s"] * (now_s - began_s) == pytest.approx(revenue(state, began_s))
    assert figures["preemptions_per_s"] * (now_s - began_s) == pytest.approx(r["preemptions"].sum() - preemptions)
    if warmup_s == 0:
        assert figures["immediate_attainment"] == pytest.approx(1 - r["missed"][immediate].mean())


def test_weights_of_the_reward() -> None:
    """Each weight scales its own part."""
    task = replace(DRAINED, scenario=replace(DRAINED.scenario, immediate=Requests(100, 100, 3.0)))
    actions = random_actions(task, 1, 100, seed=4)
    totals = [
        play(replace(task, reward=replace(REVENUE, deferred=deferred, loss=loss)), actions)[0]
        for deferred, loss in ((1.0, 0.0), (0.0, 1.0), (1.0, 5.0))
    ]
    assert totals[0] > 0 > totals[1]
    assert totals[2] == pytest.approx(totals[0] + 5 * totals[1], rel=1e-4)


def test_latency_reward_is_minus_the_time_integral_of_immediate_requests() -> None:
    """It samples at the ends of intervals, so it is exact for the samples and close for the integral."""
    task = replace(DRAINED, reward=LATENCY)
    fleet = Fleet(task, 1)
    fleet.reset(2)
    before_s, sampled, total = 0.0, 0.0, 0.0
    for _ in range(300):
        _, rewards, _ = fleet.step(np.zeros((1, NUM_DIALS), np.float32))
        state = fleet.state(0)
        now_s = float(state.scheduler["now_s"][0])
        in_system = np.isin(state.requests["status"], (WAITING, RUNNING)) & (
            state.requests["request_class"] == IMMEDIATE
        )
        sampled += in_system.sum() * (now_s - before_s) / task.slo.ttft_s
        total += float(rewards[0])
        before_s = now_s
    ended = state.requests[(state.requests["request_class"] == IMMEDIATE) & (state.requests["status"] != FUTURE)]
    integral = float((ended["finish_s"] - ended["arrival_s"]).sum())
    assert total == pytest.approx(-sampled, rel=1e-4)
    assert total == pytest.approx(-integral / task.slo.ttft_s, rel=0.05)


def test_a_reward_of_one_is_an_engine_full_of_such_requests() -> None:
    task = small_task()
    trace = task.draw(0)
    rows = trace.of_class(IMMEDIATE)
    assert task.revenue_scale(trace) == pytest.approx(value(rows) / task.service_time_s(rows).sum())
