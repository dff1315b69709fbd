"""Random traffic through vLLM's scheduler, whoever decides: nobody is lost or stuck, no block leaks."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm.v1", reason="vLLM is not installed here; `make test-vllm` has it")

from driven import Driver, check, check_empty, new_request, new_scheduler
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import RequestStatus

from flexirl.policies.interface.decision import default_decision
from flexirl.policies.interface.view import View
from flexirl.vllm import Scheduler

STEPS = 4_000  # of each case; five cases


class RandomDecisions:
    """Decides anything that can be carried out, never the same for long."""

    name = "random"
    every_iteration = True

    def reset(self, view: View) -> None:
        """Nothing is remembered but the numbers to come."""
        self._rng = np.random.default_rng(1)

    def decide(self, view: View) -> np.ndarray:
        """See `Policy`."""
        rng, decision = self._rng, default_decision()
        if rng.random() < 0.2:
            return decision
        for name, below in (("discipline", 3), ("decodes_first", 2), ("victim", 4), ("preempt_for_immediate", 2)):
            decision[name] = rng.integers(below)
        decision["immediate_order"], decision["deferred_order"] = rng.integers(5, size=2)
        decision["preempt_count"] = rng.choice([0, 0, 0, 1, 5])
        decision["token_budget"] = rng.choice([1, 40, 10_000])
        for name in ("relegate", "immediate_slack", "deferred_slack", "deferred_decodes", "deferred_kv_share"):
            decision[name] = rng.choice([0.0, 0.5, 1.0, 5.0])
        for name in ("immediate_step_s", "deferred_step_s"):
            decision[name] = rng.choice([0.0, 0.01, 0.02, np.inf])
        decision["reserve_ratio"], decision["reserve_new_ratio"] = rng.choice([0.0, 0.0, 0.3, 1.0], size=2)
        seen = view.requests()["request"]
        decision["scored"] = min(len(seen), 16)
        decision["scored_requests"][: decision["scored"]] = rng.permutation(seen)[:16]
        decision["scores"][: decision["scored"]] = rng.normal(size=min(len(seen), 16))
        return decision


def plugged(policy: str, **settings: Any) -> Callable[..., AsyncScheduler]:
    """Makes schedulers with the plug-in."""
    return lambda **limits: new_scheduler(Scheduler, {"policy": policy, "time_limit_s": None, **settings}, **limits)


def at_random(**limits: Any) -> AsyncScheduler:
    """A scheduler whose decisions are random."""
    scheduler = plugged("qoserve", relegated_wait_s=0.02)(**limits)
    assert isinstance(scheduler, Scheduler)
    scheduler.deciding.policy = RandomDecisions()
    scheduler.deciding.start(scheduler.lookout.view)
    return scheduler


CASES: dict[str, Callable[..., AsyncScheduler]] = {
    "vllm": lambda **limits: new_scheduler(AsyncScheduler, **limits),
    "qoserve": plugged("qoserve"),
    "hygen": plugged("hygen", knobs={"latency_budget_s": 0.02}),
    "pretrained": plugged("pretrained", interval_s=0.01),
    "random": at_random,
}


@pytest.mark.parametrize("name", CASES)
def test_nobody_is_lost_or_stuck(name: str) -> None:
    """Tiny caches, short outputs, aborts at any time, one to three steps on their way at once."""
    rng = random.Random(name)
    steps = sent = 0
    while steps < STEPS:
        scheduler = CASES[name](
            blocks=rng.choice([24, 60, 400]), seats=rng.choice([3, 16]), tokens=rng.choice([64, 512]),
            caching=rng.random() < 0.7, order=rng.choice(["fcfs", "priority"]),
        )  # fmt: skip
        driver = Driver(scheduler, depth=rng.choice([1, 2, 2, 3]))
        asked: dict[str, int] = {}
        aborted: set[str] = set()
        shared = [rng.randrange(3, 250) for _ in range(120)]
        for _ in range(500):
            for _ in range(rng.choice([0, 0, 0, 1, 1, 2])):
                sent += 1
                own = [rng.randrange(3, 250) for _ in range(rng.randrange(1, 150))]
                prompt = shared[: rng.choice([0, 0, 48, 120])] + own
                extra = {"flexirl_class": "deferred", "flexirl_window_s": 0.05} if rng.random() < 0.2 else None
                asked[f"r{sent}"] = rng.randrange(1, 40)
                scheduler.add_request(new_request(f"r{sent}", prompt, asked[f"r{sent}"], rng.choice([0, 1, 2]), extra))
            if scheduler.requests and rng.random() < 0.05:
                victim = rng.choice(list(scheduler.requests))
                scheduler.finish_requests(victim, RequestStatus.FINISHED_ABORTED)
                aborted.add(victim)
            driver.step()
            check(scheduler)
            steps += 1
        driver.drain(20_000)
        scheduler.schedule()  # hands on the last of the finished
        check_empty(scheduler)
        assert driver.finished >= set(asked) - aborted
        assert all(len(driver.made[r]) == asked[r] for r in set(asked) - aborted)
        if isinstance(scheduler, Scheduler):
            assert scheduler.failures.counts == {}
            classes = scheduler.mirror.state.classes
            arrived, ended = classes["arrived"].sum(), (classes["finished"] + classes["ended_otherwise"]).sum()
            assert arrived == ended >= len(asked) - len(aborted)  # some were gone before anybody looked
            assert not classes["waiting"].any() and not classes["running"].any() and not classes["kv_blocks"].any()
            assert not classes["waiting_tokens"].any() and not classes["relegated"].any()
