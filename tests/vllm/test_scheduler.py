"""The plug-in in vLLM's scheduler: who goes first, who gives way, and what happens where a policy fails."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm.v1", reason="vLLM is not installed here; `make test-vllm` has it")

import vllm
from driven import BLOCK_SIZE, Driver, check, check_empty, new_request, new_scheduler
from vllm.v1.request import Request, RequestStatus

from flexirl.errors import UserError
from flexirl.policies.interface.decision import default_decision
from flexirl.policies.interface.view import View
from flexirl.runtime.profile.step_time import step_time
from flexirl.vllm import Scheduler
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

DEFERRED_PRIORITY = 1


class Fixed:
    """Always decides the same: the default decision but for some figures."""

    name = "fixed"
    every_iteration = True

    def __init__(self, **changes: float) -> None:
        self.decision = default_decision()
        for name, value in changes.items():
            self.decision[name] = value

    def reset(self, view: View) -> None:
        """Nothing to forget."""

    def decide(self, view: View) -> np.ndarray:
        """See `Policy`."""
        return self.decision


def plugged(policy: Any = None, settings: dict[str, Any] | None = None, **limits: Any) -> Scheduler:
    """A scheduler with the plug-in, and a policy in charge that has no name."""
    # Not in time, but for its own sake: another test looks at the limit.
    scheduler = new_scheduler(Scheduler, {"policy": "qoserve", "time_limit_s": None, **(settings or {})}, **limits)
    assert isinstance(scheduler, Scheduler)
    if policy is not None:
        scheduler.deciding.policy = policy
        scheduler.deciding.start(scheduler.lookout.view)
    return scheduler


def prompt_of(tokens: int, salt: int) -> list[int]:
    """Prompts of different salt have nothing in common."""
    return [3 + (salt * 31 + i * 7) % 240 for i in range(tokens)]


def running(scheduler: Scheduler) -> set[str]:
    return {request.request_id for request in scheduler.running}


def test_a_waiting_immediate_request_takes_a_seat_of_a_deferred_one() -> None:
    scheduler = plugged(Fixed(), seats=2)
    driver = Driver(scheduler)
    for name in ("d1", "d2"):
        scheduler.add_request(new_request(name, prompt_of(40, int(name[1])), 30, DEFERRED_PRIORITY))
        driver.step()
    driver.step()
    assert running(scheduler) == {"d1", "d2"}
    scheduler.add_request(new_request("i", prompt_of(20, 9), 30))
    driver.step()
    assert "i" in running(scheduler) and len(running(scheduler)) == 2
    left = next(iter(running(scheduler) - {"i"}))
    assert left == "d1", "the deferred request with less work done gives way"
    driver.drain(1000)
    assert {name: len(tokens) for name, tokens in driver.made.items()} == {"d1": 30, "d2": 30, "i": 30}
    assert scheduler.requests == {} and scheduler.failures.counts == {}


def test_a_waiting_immediate_request_takes_memory_of_a_deferred_one() -> None:
    scheduler = plugged(Fixed(), blocks=13)  # of which 12 can be used
    driver = Driver(scheduler)
    scheduler.add_request(new_request("d", prompt_of(9 * BLOCK_SIZE, 1), 30, DEFERRED_PRIORITY))
    for _ in range(3):
        driver.step()
    scheduler.add_request(new_request("i", prompt_of(6 * BLOCK_SIZE, 2), 30))
    driver.step()
    assert running(scheduler) == {"i"}
    driver.drain(1000)
    assert len(driver.made["d"]) == len(driver.made["i"]) == 30


@pytest.mark.parametrize("limits", [{"seats": 2}, {"blocks": 13}])
@pytest.mark.parametrize("victims", ["least_work", "policy"])
@pytest.mark.parametrize("discipline", [0, 1, 2])
def test_a_deferred_request_never_takes_anything_of_an_immediate_one(
    limits: dict[str, int], victims: str, discipline: int
) -> None:
    scheduler = plugged(Fixed(discipline=discipline), {"victims": victims}, **limits)
    driver = Driver(scheduler)
    for i in range(2):
        scheduler.add_request(new_request(f"i{i}", prompt_of(4 * BLOCK_SIZE, i), 30))
    for _ in range(3):
        driver.step()
    for i in range(4):
        scheduler.add_request(new_request(f"d{i}", prompt_of(2 * BLOCK_SIZE, 5 + i), 60, DEFERRED_PRIORITY))
    while {"i0", "i1"} & set(scheduler.requests):
        driver.step()
        check(scheduler)
        assert {"i0", "i1"} & set(scheduler.requests) <= running(scheduler)
    driver.drain(1000)
    assert int(scheduler.mirror.state.classes[IMMEDIATE]["preemptions"]) == 0


def test_two_classes_do_not_evict_each_other_in_turn() -> None:
    """Immediate requests come all the time; a deferred one that gave way waits until there is room."""
    scheduler = plugged(Fixed(), blocks=13)
    driver = Driver(scheduler)
    scheduler.add_request(new_request("d", prompt_of(6 * BLOCK_SIZE, 1), 60, DEFERRED_PRIORITY))
    for i in range(40):
        if i % 10 == 3:
            scheduler.add_request(new_request(f"i{i}", prompt_of(7 * BLOCK_SIZE, i), 8))
        driver.step()
    driver.drain(1000)
    assert int(scheduler.mirror.state.classes[DEFERRED]["preemptions"]) <= 4


def test_deferred_requests_join_below_their_share_of_the_cache() -> None:
    scheduler = plugged(Fixed(deferred_kv_share=0.5), blocks=41)
    driver = Driver(scheduler)
    for i in range(10):
        scheduler.add_request(new_request(f"d{i}", prompt_of(6 * BLOCK_SIZE, i), 6, DEFERRED_PRIORITY))
    driver.step()
    assert len(running(scheduler)) == 4  # 24 of 40 blocks are taken by the time the share is passed
    scheduler.add_request(new_request("i", prompt_of(6 * BLOCK_SIZE, 20), 6))
    driver.step()
    assert "i" in running(scheduler)
    driver.drain(1000)


def test_deferred_decodes_pause_and_chunks_are_cut() -> None:
    """A step target that only immediate work may pass."""
    scheduler = plugged(Fixed(deferred_step_s=1e-6))
    driver = Driver(scheduler)
    scheduler.add_request(new_request("i", prompt_of(20, 1), 40))
    scheduler.add_request(new_request("d", prompt_of(20, 2), 40, DEFERRED_PRIORITY))
    for _ in range(10):
        driver.step()
    assert running(scheduler) == {"i"}
    scheduler.deciding.policy = Fixed()
    driver.step()
    assert running(scheduler) == {"i", "d"}
    scheduler.deciding.policy = Fixed(deferred_step_s=1e-6)
    driver.step()
    before = len(driver.made.get("d", []))
    for _ in range(10):
        assert "d" not in driver.step().num_scheduled_tokens
    assert running(scheduler) == {"i", "d"} and len(driver.made.get("d", [])) <= before + 2
    driver.drain(1000)  # once it is alone, it runs: an engine does not stand idle
    assert len(driver.made["d"]) == 40


def test_a_token_budget_is_kept() -> None:
    scheduler = plugged(Fixed(token_budget=48))
    driver = Driver(scheduler)
    for i in range(4):
        scheduler.add_request(new_request(f"r{i}", prompt_of(100, i), 5, i % 2))
    most = 0
    while scheduler.has_unfinished_requests():
        most = max(most, driver.step().total_num_scheduled_tokens)
    assert most == 48


def test_the_order_is_the_decisions() -> None:
    scheduler = plugged(Fixed(immediate_order=2), seats=1)  # SHORTEST
    driver = Driver(scheduler)
    for name, tokens in (("long", 90), ("middle", 50), ("short", 10)):
        scheduler.add_request(new_request(name, prompt_of(tokens, tokens), 3))
    order: list[str] = []
    while scheduler.has_unfinished_requests():
        driver.step()
        order += [name for name in running(scheduler) if name not in order]
    assert order == ["short", "middle", "long"]


@pytest.mark.parametrize("last", [0, 1])
def test_who_is_given_up_goes_last_only_if_the_policy_says_so_and_still_ends(last: int) -> None:
    """The first token of `late` was due before it came; deferred work without end must not keep it for ever."""
    scheduler = plugged(Fixed(relegate=1.0, relegated_last=last), {"relegated_wait_s": 3.0}, seats=1)
    now_s = 0.0
    scheduler.clock = lambda: now_s + scheduler._began_s
    driver = Driver(scheduler)
    late = new_request("late", prompt_of(30, 1), 3)
    late.arrival_time = scheduler._began_wall_s - 1.5
    for i in range(400):
        scheduler.add_request(new_request(f"d{i}", prompt_of(10, i), 3, DEFERRED_PRIORITY))
    scheduler.add_request(late)
    while "late" not in driver.finished:
        now_s += 0.02
        assert now_s < 4.0
        driver.step()
    assert 10 < len(driver.finished) < 390 if last else len(driver.finished) < 3
    driver.drain(5000)
    check_empty(scheduler)


class Raises(Fixed):
    """Cannot decide at all."""

    def decide(self, view: View) -> np.ndarray:
        """See `Policy`."""
        raise RuntimeError("no idea")


class Slow(Fixed):
    """Takes its time."""

    def decide(self, view: View) -> np.ndarray:
        """See `Policy`."""
        import time

        time.sleep(0.02)
        return self.decision


@pytest.mark.parametrize(
    ("policy", "settings", "reason"),
    [
        (Raises(), {}, "RuntimeError"),
        (Fixed(relegate=np.nan), {}, "unsound"),
        (Fixed(token_budget=0), {}, "unsound"),
        (Slow(), {"time_limit_s": 0.01}, "too late"),
    ],
)
@pytest.mark.parametrize("order", ["fcfs", "priority"])
def test_where_a_policy_fails_vllms_own_order_holds(
    policy: Fixed, settings: dict[str, Any], reason: str, order: str, caplog: pytest.LogCaptureFixture
) -> None:
    def requests() -> list[Request]:
        return [new_request(f"r{i}", prompt_of(20 + i, i), 4, i % 3) for i in range(12)]

    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    def trail(scheduler: AsyncScheduler) -> list[dict[str, int]]:
        for request, at in zip(requests(), range(12), strict=True):
            request.arrival_time = float(at)
            scheduler.add_request(request)
        driver, steps = Driver(scheduler), []
        while scheduler.has_unfinished_requests():
            steps.append(dict(driver.step().num_scheduled_tokens))
        return steps

    limits: dict[str, Any] = {"seats": 3, "blocks": 9, "order": order}
    expected = trail(new_scheduler(AsyncScheduler, **limits))
    scheduler = plugged(policy, settings, **limits)
    with caplog.at_level(logging.WARNING, logger="vllm.flexirl"):
        logging.getLogger("vllm").propagate = True
        assert trail(scheduler) == expected
    assert scheduler.failures.counts == {reason: len(expected)}


def test_a_fault_of_the_plug_in_costs_a_step_of_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = plugged(Fixed(), seats=2)
    driver = Driver(scheduler)
    for i in range(6):
        scheduler.add_request(new_request(f"r{i}", prompt_of(20, i), 12, i % 2))
    driver.step()
    with monkeypatch.context() as patch:
        patch.setattr(scheduler.mirror, "plan", lambda *_: 1 / 0)
        driver.step()
    assert scheduler.failures.counts == {"plan": 1}
    driver.drain(500)
    assert all(len(driver.made[f"r{i}"]) == 12 for i in range(6))
    check_empty(scheduler)
    assert scheduler.failures.counts == {"plan": 1}


def test_a_request_whose_words_mean_nothing_is_immediate() -> None:
    scheduler = plugged(Fixed())
    scheduler.add_request(new_request("r", prompt_of(5, 1), 2, DEFERRED_PRIORITY, {"flexirl_class": "batch"}))
    Driver(scheduler).drain(20)
    assert scheduler.failures.counts == {"request": 1}
    assert int(scheduler.mirror.state.classes[IMMEDIATE]["finished"]) == 1


def test_more_requests_than_places_wait_outside() -> None:
    scheduler = plugged(Fixed(), {"max_requests": 5}, seats=2)
    driver = Driver(scheduler)
    for i in range(20):
        scheduler.add_request(new_request(f"r{i}", prompt_of(20, i), 3, i % 2))
    scheduler.finish_requests(["r17", "r2"], RequestStatus.FINISHED_ABORTED)
    driver.drain(500)
    assert len(driver.finished) == 18 and scheduler.failures.counts == {}


def test_the_step_time_of_this_engine_is_learned() -> None:
    """The clock says what a step of a known law takes; soon the profile predicts it."""
    scheduler = plugged(Fixed(), seats=8)
    law = scheduler.mirror.state.engine[0].copy()
    for name in law.dtype.names or ():
        if name.endswith("_s"):
            law[name] = 0.0
    law["base_s"], law["per_sequence_s"], law["per_token_s"], law["per_context_s"] = 0.02, 1e-4, 2e-5, 3e-7
    now_s = scheduler._began_s
    scheduler.clock = lambda: now_s
    driver = Driver(scheduler, depth=1)
    rng = np.random.default_rng(0)
    hear = driver.hear

    def timed() -> None:
        nonlocal now_s
        now_s += float(step_time(law, scheduler.mirror.state.batch[0]))
        hear()

    driver.hear = timed  # type: ignore[method-assign]
    for i in range(120):
        scheduler.add_request(new_request(f"r{i}", prompt_of(int(rng.integers(5, 300)), i), int(rng.integers(5, 60))))
    errors = []
    while scheduler.has_unfinished_requests():
        driver.step()
        batch = scheduler.mirror.state.batch[0]
        if batch["decode_sequences"] + batch["prefill_tokens"]:
            errors.append(abs(step_time(scheduler.mirror.state.engine[0], batch) / step_time(law, batch) - 1))
    assert np.mean(errors[-100:]) < 0.02


@pytest.mark.parametrize("version", ["0.31.0", "0.33.0"])
def test_another_vllm_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(UserError, match=f"vLLM {version} has not been tried"):
        plugged()
    plugged(settings={"any_version": True})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"policy": "quoserve"}, "quoserve"),
        ({"policy": "hygen"}, "latency_budget_s"),
        ({"policy": "nowhere.onnx"}, "nowhere.onnx"),
        ({"profile": "h1"}, "h1"),
        ({"knobs": {"alpha": 1}}, "alpha"),
    ],
)
def test_bad_settings_stop_the_server_in_one_sentence(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as raised:
        plugged(settings=settings)
    assert named in str(raised.value) and "\n" not in str(raised.value)


def test_deciding_imports_no_torch_of_ours(tmp_path: Path) -> None:
    """vLLM has its own; everything of the plug-in that vLLM does not import does without."""
    import subprocess
    import sys

    code = "import sys, flexirl.vllm.mirror, flexirl.vllm.deciding, flexirl.vllm.classes; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert ran.stdout.strip() == "False"
