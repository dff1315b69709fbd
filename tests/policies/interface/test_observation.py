"""Every number of the observation against its description, worked out from the request table in plain Python."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from episodes import PROMISE, Requests, random_actions, small_engine, small_task

from flexirl.envs.fleet import Fleet, Task
from flexirl.policies.deploy.decider import SETTINGS, decide, new_decider
from flexirl.policies.deploy.network import Network
from flexirl.policies.interface.action import NUM_DIALS, decision_from_dials
from flexirl.policies.interface.decision import default_decision
from flexirl.policies.interface.observation import REQUEST_TABLE, SIZE, TABLE, bounds
from flexirl.policies.interface.view import VISIBLE, View
from flexirl.runtime.scheduler.state import FINISHED, RUNNING, WAITING, State
from flexirl.runtime.simulator.simulation import simulate
from flexirl.workloads.trace import DEFERRED, IMMEDIATE


class Slow:
    """The observation by its description: all sums and means from scratch, all running means from the whole past."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.past: list[dict[str, float]] = [dict.fromkeys(self._totals(), 0.0)]

    def _totals(self) -> dict[str, float]:
        scheduler, requests = self.state.scheduler[0], self.state.requests
        arrived = requests[(requests["status"] != 0) & (requests["request_class"] == IMMEDIATE)]
        deferred = requests[(requests["status"] != 0) & (requests["request_class"] == DEFERRED)]
        return {
            "now": float(scheduler["now_s"]), "busy": float(scheduler["busy_s"]),
            "iterations": float(scheduler["iterations"]), "arrived": float(len(arrived)),
            "prompts": float(arrived["prompt_tokens"].sum()), "lost": float(arrived["missed"].sum()),
            "deferred": float(deferred["furthest"].sum() + deferred["generated"].sum()),
            "preemptions": float(requests["preemptions"].sum()),
            "immediate output": float(arrived["generated"].sum()),
            "deferred output": float(deferred["generated"].sum()),
            "admitted": float(self.state.classes["admitted_prompt"][IMMEDIATE]),
            "found": float(self.state.classes["found_prompt"][IMMEDIATE]),
            "immediate finished": float((arrived["status"] == FINISHED).sum()),
            "deferred finished": float((deferred["status"] == FINISHED).sum()),
        }  # fmt: skip

    def running_mean(self, name: str, over_s: float) -> float:
        """Of a total's rate, exponential, from zero at the start."""
        mean = 0.0
        for before, after in zip(self.past, self.past[1:], strict=False):
            elapsed = after["now"] - before["now"]
            if elapsed > 0:
                share = 1 - math.exp(-elapsed / over_s)
                mean = (1 - share) * mean + share * (after[name] - before[name]) / elapsed
        return mean

    def step(self, decodes: list[Any]) -> float:
        """Predicted seconds of an iteration of these decodes and nothing else, by the formula of the engine profile."""
        engine, count = self.state.engine[0], len(decodes)
        attended = sum(int(request["computed"]) + 1 for request in decodes)
        seconds = engine["base_s"] + engine["host_s"] + (engine["per_sequence_s"] + engine["per_token_s"]) * count
        seconds += engine["per_context_s"] * attended
        for hinge in (64, 128, 256):
            seconds += engine[f"per_token_{hinge}_s"] * max(count - hinge, 0)
        return float(seconds + engine["over_16_s"] * (count > 16) + engine["over_256_s"] * (count > 256))

    def prefill_s(self, tokens: float) -> float:
        """Seconds that prefill tokens add to a large iteration."""
        engine = self.state.engine[0]
        return float(tokens * sum(engine[f"per_token{hinge}_s"] for hinge in ("", "_64", "_128", "_256")))

    def queue(self, request_class: int) -> list[int]:
        """Waiting requests of a class in the order of their keys."""
        requests = self.state.requests
        mine = np.flatnonzero((requests["status"] == WAITING) & (requests["request_class"] == request_class))
        return sorted(mine.tolist(), key=lambda r: (requests[r]["key"], r))

    def __call__(self) -> dict[str, float]:
        self.past.append(self._totals())
        state, now = self.state, self.past[-1]["now"]
        requests, engine = state.requests, state.engine[0]
        features: dict[str, float] = {}
        running_decodes: dict[int, list[Any]] = {}
        for name, group in (("immediate", IMMEDIATE), ("deferred", DEFERRED)):
            queued = [requests[r] for r in self.queue(group)]
            running = requests[(requests["status"] == RUNNING) & (requests["request_class"] == group)]
            owed = running["prompt_tokens"] + running["generated"] - running["computed"]
            running_decodes[group] = list(running[owed <= 1])
            if group == IMMEDIATE:
                features["immediate_given_up"] = math.log(1 + sum(q["relegated"] for q in queued)) / 5
                queued = [q for q in queued if not q["relegated"]]
            features[f"{name}_waiting"] = math.log(1 + len(queued)) / 5
            features[f"{name}_running"] = len(running) / engine["max_running"]
            features[f"{name}_kv"] = running["kv_blocks"].sum() / engine["kv_blocks"]
            features[f"{name}_unprefilled"] = self.prefill_s(owed[owed > 1].sum()) / PROMISE.ttft_s
            waiting = sum(int(q["prompt_tokens"] + q["generated"] - q["computed"]) for q in queued)
            if group == IMMEDIATE:
                features["immediate_owed"] = self.prefill_s(waiting) / PROMISE.ttft_s
                features["immediate_wait"] = (now - queued[0]["arrival_s"]) / PROMISE.ttft_s if queued else 0
            else:
                left = max(queued[0]["deadline_s"] - now, 1e-3) if queued else math.inf
                features["deferred_urgency"] = self.prefill_s(waiting) / left
                features["deferred_window"] = math.log(1 + left / PROMISE.ttft_s) / 5
                features["deferred_predicted"] = float(bool(queued) and queued[0]["predicted_output_tokens"] > 0)
            ending = self.running_mean(f"{name} finished", 30)
            outputs = self.running_mean(f"{name} output", 30)
            features[f"{name}_output"] = math.log(1 + outputs / ending) / 5 if ending > 0 else 0.0
        leads = [
            (request["generated"] - (now - request["first_token_s"]) / request["tpot_slo_s"]) / 8
            for request in running_decodes[IMMEDIATE]
        ]
        features["immediate_ahead_min"] = min(leads, default=2.0)
        features["immediate_ahead_mean"] = float(np.mean(np.clip(leads, -2, 2))) if leads else 2.0
        features["immediate_behind"] = float(np.mean(np.array(leads) < 0)) if leads else 0.0
        running, nodes = requests[requests["status"] == RUNNING], state.nodes[: state.scheduler["nodes"][0]]
        held = (running["kv_blocks"] - running["cached"]).sum() + nodes["blocks"][nodes["users"] > 0].sum()
        for name, group in (("immediate", IMMEDIATE), ("deferred", DEFERRED)):
            idle = nodes[(nodes["users"] == 0) & (nodes["owner"] == group)]
            features[f"{name}_idle"] = idle["blocks"].sum() / engine["kv_blocks"]
        admitted = self.running_mean("admitted", 30)
        features["immediate_found"] = self.running_mean("found", 30) / admitted if admitted > 0 else 0.0
        features["kv_free"] = 1 - held / engine["kv_blocks"]
        swapped = requests["host_blocks"][requests["status"] == WAITING].sum()
        features["host_kv_used"] = swapped / engine["host_kv_blocks"] if engine["host_kv_blocks"] else 0.0
        before, after = self.past[-2:]
        made = after["iterations"] - before["iterations"]
        features["step_mean"] = (after["busy"] - before["busy"]) / made / PROMISE.tpot_s if made else 0.0
        features["step_immediate"] = self.step(running_decodes[IMMEDIATE]) / PROMISE.tpot_s
        features["step_all"] = self.step(running_decodes[IMMEDIATE] + running_decodes[DEFERRED]) / PROMISE.tpot_s
        for span in (1, 5, 30):
            features[f"arrivals_{span}s"] = self.prefill_s(self.running_mean("prompts", span))
        arrived = self.running_mean("arrived", 10)
        features["lost_10s"] = self.running_mean("lost", 10) / arrived if arrived > 0 else 0.0
        often = self.running_mean("arrived", 30) * PROMISE.ttft_s
        features["arrived_30s"] = math.log(1 + often)
        features["prompt_mean_30s"] = self.prefill_s(self.running_mean("prompts", 30)) / often if often > 0 else 0.0
        one = {"computed": 0}
        features["least_step"] = self.step([one]) / PROMISE.tpot_s
        cache_tokens = float(engine["kv_blocks"] * engine["block_size"])
        features["cache_prefill"] = math.log(1 + self.prefill_s(cache_tokens) / PROMISE.ttft_s) / 2
        features["deferred_rate_5s"] = self.prefill_s(self.running_mean("deferred", 5))
        features["preemptions_5s"] = math.log(1 + self.running_mean("preemptions", 5))
        return features

    def of_request(self, r: int) -> list[float]:
        """A row of `REQUEST_TABLE`."""
        request, engine, now = self.state.requests[r], self.state.engine[0], self.past[-1]["now"]
        deferred = request["request_class"] == DEFERRED
        if deferred:
            due = request["deadline_s"]
        elif request["generated"] == 0:
            due = request["ttft_deadline_s"]
        else:
            due = request["first_token_s"] + request["generated"] * request["tpot_slo_s"]
        needs = (request["prompt_tokens"] + request["generated"]) // engine["block_size"] + 1
        blocks = request["kv_blocks"] if request["status"] == RUNNING else needs
        return [
            1.0,
            float(deferred),
            self.prefill_s(request["prompt_tokens"] + request["generated"] - request["computed"]) / PROMISE.ttft_s,
            (due - now) / PROMISE.ttft_s,
            4 * blocks / engine["kv_blocks"],
            math.log(1 + request["generated"]) / 5,
            math.log(1 + max(request["predicted_output_tokens"] - request["generated"], 0)) / 5,
        ]

    def visible(self) -> list[int | None]:
        """The first of each queue, then the newest of the running batch."""
        newest = self.state.running[: self.state.scheduler["running"][0]][::-1].tolist()
        columns = [(self.queue(IMMEDIATE), 4), (self.queue(DEFERRED), 4), (newest, 8)]
        return [(numbers + [None] * size)[i] for numbers, size in columns for i in range(size)]


CONTESTED = small_task(
    Requests(80, 80, 6.0, in_common=400), Requests(60, 60, 0.0, (200, 2000), (10, 200), in_common=100),
    engine=small_engine(prefix_caching=1),
)  # fmt: skip
WINDOWED = Requests(60, 60, 0.0, (200, 2000), (10, 200), window_s=15.0, predicted=True)
OF_THE_ENGINE = {"least_step", "cache_prefill"}  # the same all the time
OF_WINDOWS = {"deferred_urgency", "deferred_window", "deferred_predicted"}
OF_MEMORY = {"immediate_idle", "immediate_found", "deferred_idle"}  # and of requests that have something in common
OF_OVERLOAD = {"lost_10s", "immediate_behind", "immediate_given_up"}


@pytest.mark.parametrize(
    ("task", "still"),
    [
        (small_task(), OF_WINDOWS | OF_MEMORY | OF_OVERLOAD),
        (small_task(deferred=WINDOWED, deferred_order="deadline"), OF_MEMORY | OF_OVERLOAD),
        (
            small_task(Requests(250, 250, 7.0), engine=small_engine(host_kv_blocks=0)),
            OF_WINDOWS | OF_MEMORY | {"host_kv_used", "immediate_behind"},
        ),
        (CONTESTED, OF_WINDOWS | OF_OVERLOAD | {"immediate_unprefilled"}),
        (small_task(action="scores", deferred=WINDOWED), OF_MEMORY | OF_OVERLOAD | {"immediate_unprefilled"}),
    ],
    ids=["backlog", "windows", "overload", "memory", "scores"],
)
def test_every_number_is_what_its_description_says(task: Task, still: set[str]) -> None:
    """And all numbers move in the course of the episode, but for those that `still` and `OF_THE_ENGINE` name."""
    fleet = Fleet(task, 2, group_size=2)
    observations = fleet.reset(3)
    slow = [Slow(fleet.state(m)) for m in range(2)]
    spread = []
    for action in [*random_actions(task, 2, 39, seed=2), None]:
        for m in range(2):
            expected = slow[m]()
            assert list(expected.keys()) and set(expected) == {feature.name for feature in TABLE}
            numbers = [min(max(expected[f.name], f.low), f.high) for f in TABLE]
            if task.action == "scores":
                for r in slow[m].visible():
                    row = [0.0] * len(REQUEST_TABLE) if r is None else slow[m].of_request(r)
                    numbers += [min(max(x, f.low), f.high) for x, f in zip(row, REQUEST_TABLE, strict=True)]
            assert observations[m] == pytest.approx(np.array(numbers), abs=2e-5)
        spread.append(observations.copy())
        if action is not None:
            observations, _, _ = fleet.step(action)
    moved = np.ptp(np.concatenate(spread), axis=0)[:SIZE] > 0
    assert {feature.name for feature, moves in zip(TABLE, moved, strict=True) if not moves} <= still | OF_THE_ENGINE


def test_bounds_are_finite_and_ordered() -> None:
    for with_requests, size in ((False, SIZE), (True, SIZE + VISIBLE * len(REQUEST_TABLE))):
        low, high = bounds(with_requests)
        assert len(low) == len(high) == size and low.dtype == np.float32
        assert np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()


def test_a_deployed_policy_observes_what_it_observed_in_training() -> None:
    """`simulate` asks at the fleet's decision times here, since no iteration is longer than an interval."""
    task = small_task(Requests(50, 50, 6.0, always_the_same=True), Requests(60, 60, 0.0, always_the_same=True))
    dials = random_actions(task, 1, 40)
    for dial in dials:
        dial[0, 3] = -1.0  # short iterations

    class Recorder:
        name, every_iteration = "recorder", False

        def reset(self, view: View) -> None:
            zeros = np.concatenate([np.zeros(SIZE), np.ones(SIZE), np.zeros((SIZE + 1) * NUM_DIALS)])
            network = Network(np.array([SIZE, NUM_DIALS]), zeros.astype(np.float32)[None], 10.0, False)
            self.observed, settings = np.zeros(SIZE, np.float32), np.zeros(1, SETTINGS)
            self.decider = new_decider(view, network, settings, np.array([default_decision()]), self.observed)
            self.seen: list[np.ndarray] = []

        def decide(self, view: View) -> np.ndarray:
            assert decide(self.decider)
            self.seen.append(self.observed.copy())
            return decision_from_dials(dials[len(self.seen) - 1][0], view.slo.tpot_s)

    recorder = Recorder()
    trace = task.draw(0)
    run = simulate(recorder, task.engine, trace, task.slo, task.duration_s(), interval_s=task.interval_s)
    fleet = Fleet(task, 1)
    trained = [fleet.reset(0)[0].copy()]
    for dial in dials:
        trained.append(fleet.step(dial)[0][0].copy())
    assert len(recorder.seen) == 40
    assert (np.stack(recorder.seen) == np.stack(trained[:40])).all()
    assert run.state.scheduler["iterations"][0] == fleet.state(0).scheduler["iterations"][0]
