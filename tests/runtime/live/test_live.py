"""The live engine on a toy device: no schedule loses, repeats or alters a token, and everything is given back."""

from __future__ import annotations

import csv
import itertools
import json
import logging
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from live_toys import END, TICK_S, VOCAB, Constant, LiveRun, RandomPolicy, ToyExecutor, alone, random_decision
from onnx import TensorProto, helper, numpy_helper
from toys import toy_engine

from flexirl.errors import UserError
from flexirl.policies.deploy.learned import load_policy
from flexirl.policies.interface import action, observation
from flexirl.policies.interface.decision import LAST, ONE_QUEUE, RECOMPUTE, SWAP
from flexirl.policies.interface.view import View
from flexirl.policies.training.export import FORMAT
from flexirl.runtime.live.clock import VirtualClock, WallClock
from flexirl.runtime.live.executor import Moves, OutOfMemory
from flexirl.runtime.live.requests import Completion, Request, Update
from flexirl.runtime.live.sampling import Sampling
from flexirl.runtime.live.shadow import Shadow
from flexirl.runtime.live.step import Step
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

ENGINE: dict[str, float] = {
    "kv_blocks": 24, "host_kv_blocks": 16, "block_size": 4, "max_running": 8, "max_tokens_per_step": 16,
    "max_model_len": 64, "prefix_caching": 1, "host_cache_blocks": 20, "per_swap_token_s": TICK_S / 8,
}  # fmt: skip


def random_request(rng: np.random.Generator, number: int, now_s: float) -> Request:
    """A request of either class, with or without promises, now or soon."""
    immediate = rng.random() < 0.5
    return Request(
        id=f"r{number}",
        prompt=rng.integers(0, VOCAB, rng.integers(1, 30)).tolist(),
        max_tokens=int(rng.integers(1, 34)),
        request_class=IMMEDIATE if immediate else DEFERRED,
        ttft_s=float(rng.choice([0.1, 1.0, 30.0])) if immediate else None,
        window_s=float(rng.choice([np.inf, np.inf, 0.5])),
        sampling=Sampling(
            ignore_eos=bool(rng.random() < 0.3), stop_token_ids=tuple(rng.integers(0, VOCAB, 1).tolist())
        ),
        arrival_s=None if rng.random() < 0.7 else now_s + float(rng.random()) / 8,
    )


def ends_of(request: Request) -> list[int]:
    """The tokens that end a request."""
    return [*request.sampling.stop_token_ids, *([] if request.sampling.ignore_eos else [END])]


@pytest.mark.parametrize("caching", [0, 1])
@pytest.mark.parametrize("save_blocks", [0, 3])
def test_no_schedule_changes_a_token(caching: int, save_blocks: int) -> None:
    rng = np.random.default_rng(7 + 2 * caching + save_blocks)
    executor = ToyExecutor(toy_engine(**{**ENGINE, "prefix_caching": caching}))
    run = LiveRun(executor, RandomPolicy(0, 16), save_blocks=save_blocks, max_requests=40)
    requests: dict[str, Request] = {}
    cancelled: set[str] = set()

    def maybe_add(likely: float) -> None:
        if rng.random() < likely and run.engine.unfinished < 40:
            request = random_request(rng, len(requests), run.engine.now_s)
            requests[request.id] = request
            run.engine.add_request(request)

    executor.between_layers = lambda: maybe_add(0.4)
    for step in range(400):
        for _ in range(2):
            maybe_add(0.35)
        if rng.random() < 0.1 and requests:
            cancelled.add(chosen := f"r{rng.integers(len(requests))}")
            run.engine.cancel(chosen)
        if step % 50 == 0:
            run.engine.swap_policy(RandomPolicy(step, 16, every_iteration=bool(step % 100)))
        run.step(int(rng.integers(1, 7)))
    executor.between_layers = lambda: None
    run.drain()

    assert len(requests) > 200 and set(run.completions) == set(requests)
    reasons = {completion.finish_reason for completion in run.completions.values()}
    assert reasons == {"stop", "length", "cancelled", "expired"}
    for name, completion in run.completions.items():
        request = requests[name]
        expected = alone(request.prompt, request.max_tokens, ends_of(request))
        if completion.finish_reason in ("stop", "length"):
            assert completion.token_ids == expected
            assert (completion.finish_reason == "stop") == (expected[-1] in ends_of(request))
        else:
            assert completion.token_ids == expected[: len(completion.token_ids)]
            assert completion.finish_reason == "expired" or name in cancelled
    metrics = run.engine.metrics()
    assert metrics["abandoned_iterations"] > 5 and metrics["policy_swaps"] == 8 and metrics["preemptions"] > 100
    assert executor.moved_out > 20 and executor.moved_back > 20 and (executor.saved > 20) == (save_blocks > 0)
    everything_is_given_back(run)


def everything_is_given_back(run: LiveRun) -> None:
    """An engine without requests holds nothing."""
    run.check()
    scheduler, profile = run.engine.state.scheduler[0], run.executor.profile.values
    assert scheduler["free_blocks"] == profile["kv_blocks"]
    assert scheduler["host_free_blocks"] == profile["host_kv_blocks"] == run.executor.free_host_blocks
    assert scheduler["promised"] == 0
    assert not run.engine._places.place_of and len(run.engine._places.free) == len(run.engine.state.requests)


def live_run(policy: Any = None, **options: Any) -> LiveRun:
    """An engine with room for everything, unless its figures are changed."""
    figures = {name: options.pop(name) for name in list(options) if name in ENGINE}
    engine = toy_engine(**{**ENGINE, "kv_blocks": 100, "max_running": 16, **figures})
    return LiveRun(ToyExecutor(engine), policy or Constant(), **options)


def plain(name: str, prompt: list[int], max_tokens: int, request_class: int = IMMEDIATE, **more: Any) -> Request:
    """A request that runs to max_tokens."""
    return Request(name, prompt, max_tokens, request_class, Sampling(ignore_eos=True), **more)


# ------------------------------------------------------------------------------------------------ safepoints


@pytest.mark.parametrize("safepoints", [True, False])
def test_deferred_work_steps_aside_between_layers(safepoints: bool) -> None:
    steps: list[Step] = []
    run = live_run(safepoints=safepoints, on_step=steps.append)
    run.engine.add_request(plain("d", list(range(10)), 20, DEFERRED))
    run.step(3)
    waiting = [plain("i", [3, 1, 4], 4)]
    run.executor.between_layers = lambda: run.engine.add_request(waiting.pop()) if waiting else None
    before = len(steps)
    run.step(1)
    run.executor.between_layers = lambda: None
    after = steps[before:]
    if safepoints:
        # The iteration is broken off and does not count; the next one has the immediate request in it.
        assert [step.abandoned for step in after] == [True, False]
        assert after[0].requests == ["d"] and after[1].requests == ["d", "i"]
        assert after[0].elapsed_s > 0 and after[1].began_s == pytest.approx(
            after[0].began_s + after[0].elapsed_s, abs=0.1
        )
    else:
        assert [step.requests for step in after] == [["d"]] and not after[0].abandoned
    asked = run.executor.asked
    run.step(2)
    assert run.executor.asked == asked, "an iteration with immediate work asked whether to stop"
    run.drain()
    assert run.completions["d"].token_ids == alone(range(10), 20, ()) and run.completions["i"].token_ids == alone(
        [3, 1, 4], 4, ()
    )
    assert run.engine.metrics()["abandoned_iterations"] == safepoints


def test_an_expected_arrival_interrupts_when_its_time_has_come() -> None:
    steps: list[Step] = []
    run = live_run(on_step=steps.append)
    run.engine.add_request(plain("d", [1, 2, 3], 30, DEFERRED))
    run.engine.add_request(plain("i", [4, 5], 2, arrival_s=0.1))
    run.engine.add_request(plain("e", [4, 5], 2, DEFERRED, arrival_s=0.05))
    clock = run.engine.clock
    run.executor.between_layers = lambda: [clock.now_s() for _ in range(20)] and None
    run.drain()
    broken_off = [step for step in steps if step.abandoned]
    assert len(broken_off) == 1 and broken_off[0].began_s < 0.1 <= broken_off[0].began_s + broken_off[0].elapsed_s


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("mode", [SWAP, RECOMPUTE])
def test_what_a_plan_swaps_in_it_does_not_evict(mode: int) -> None:
    """An immediate request behind a returning deferred one, without memory for both, comes an iteration later."""
    rule: dict[str, float] = {"discipline": ONE_QUEUE, "preempt_for_immediate": 1, "victim": LAST, "preemption": SWAP}
    executor = ToyExecutor(toy_engine(kv_blocks=6, host_kv_blocks=8, block_size=4, max_model_len=24, prefix_caching=1))
    run = LiveRun(executor, Constant(**rule))
    sampling = Sampling(ignore_eos=True)
    waits = Request("waits", list(range(12)), 8, DEFERRED, sampling)
    urgent = Request("urgent", list(range(16, 32)), 4, IMMEDIATE, sampling, ttft_s=1e9, tpot_s=1e9)
    run.engine.add_request(waits)
    run.step(3)
    run.obey(Constant(**rule, preempt_count=1))
    run.step()
    run.engine.add_request(urgent)
    run.obey(Constant(**{**rule, "preemption": mode}))
    preemptions = 0
    while run.engine.unfinished:
        run.step()
        if executor.moved_back == 1 and not preemptions:
            preemptions = run.engine.metrics()["preemptions"]
    assert preemptions == 1  # it was back, and ran, before it had to leave again
    metrics = run.engine.metrics()
    assert metrics["preemptions"] == 2 and executor.moved_out == executor.moved_back == (2 if mode == SWAP else 1)
    for request in (waits, urgent):
        assert run.completions[request.id].token_ids == alone(request.prompt, request.max_tokens, ())


def test_out_of_memory_makes_iterations_smaller(caplog: pytest.LogCaptureFixture) -> None:
    run = live_run()
    run.executor.most_tokens = 5
    requests = [plain(str(i), list(range(i, i + 12)), 6, i % 2) for i in range(6)]
    for request in requests:
        run.engine.add_request(request)
    with caplog.at_level(logging.WARNING):
        run.drain()
    for request in requests:
        assert run.completions[request.id].token_ids == alone(request.prompt, 6, ())
    budget = run.engine.state.engine["max_tokens_per_step"]
    assert budget[0] <= 5 and "out of memory" in caplog.text
    run.executor.most_tokens = None
    for i in range(12):
        run.engine.add_request(plain(f"more {i}", [i], 60))
        run.drain()
    assert budget[0] == 16, "iterations stay small though there is memory again"
    everything_is_given_back(run)


def test_memory_that_runs_out_again_and_again_ends_nobody() -> None:
    """Every third iteration does not fit, whatever its size: the others carry all requests to their end."""
    run = live_run()
    execute, calls = run.executor.execute, itertools.count(1)

    def short_of_memory(*arguments: Any) -> Any:
        if next(calls) % 3 == 0:
            raise OutOfMemory
        return execute(*arguments)

    run.executor.execute = short_of_memory
    requests = [plain(str(i), [*range(i, 30), *range(i)][:12], 6, i % 2) for i in range(30)]
    for request in requests:
        run.engine.add_request(request)
    run.drain()
    for request in requests:
        assert run.completions[request.id].token_ids == alone(request.prompt, 6, ())
    everything_is_given_back(run)


def test_what_never_fits_ends_with_an_error_and_the_others_go_on() -> None:
    run = live_run()
    run.executor.most_tokens = 0
    forget = run.executor.forget

    def free_memory(r: int) -> None:
        forget(r)
        run.executor.most_tokens = None

    run.executor.forget = free_memory
    run.engine.add_request(plain("a", [1, 2, 3], 4))
    run.engine.add_request(plain("b", [1, 2, 3], 4))
    run.drain()
    assert run.completions["a"].finish_reason == "error" and "out of memory" in str(run.completions["a"].error)
    assert run.completions["b"].token_ids == alone([1, 2, 3], 4, ())
    everything_is_given_back(run)


@pytest.mark.parametrize("save_blocks", [0, 3])
def test_a_device_that_fails_costs_only_what_it_was_computing(
    save_blocks: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Forward passes and moves fail now and then: whoever was in them ends with an error, all others are right."""
    rng = np.random.default_rng(5)

    class Faulty(ToyExecutor):
        healthy = True
        faults = 0

        def maybe_fail(self) -> None:
            if not self.healthy and rng.random() < 0.08:
                self.faults += 1
                raise RuntimeError("an illegal address")

        def move(self, moves: Moves) -> dict[int, int]:
            self.maybe_fail()
            return super().move(moves)

    executor = Faulty(toy_engine(**ENGINE))
    executor.between_layers = executor.maybe_fail
    run = LiveRun(executor, RandomPolicy(3, 16), save_blocks=save_blocks)
    requests = [random_request(rng, i, 0.0) for i in range(60)]
    for request in requests:
        run.engine.add_request(request)
    executor.healthy = False
    for _ in range(60):
        run.step(2)
    executor.healthy = True
    run.drain()
    failed = {name for name, completion in run.completions.items() if completion.finish_reason == "error"}
    assert run.engine.metrics()["device_failures"] == executor.faults > 3 and 0 < len(failed) < 60
    for request in requests:
        completion = run.completions[request.id]
        assert (request.id in failed) == ("RuntimeError: an illegal address" in str(completion.error))
        if completion.finish_reason in ("stop", "length"):
            assert completion.token_ids == alone(request.prompt, request.max_tokens, ends_of(request))
    assert "the device failed" in caplog.text
    everything_is_given_back(run)


def test_what_a_failed_move_left_behind_is_not_taken_for_what_it_was() -> None:
    """The cache keeps a finished prompt; then a move fails and nobody knows what lies where; then it comes again."""

    class Scrambled(ToyExecutor):
        def move(self, moves: Moves) -> dict[int, int]:
            self._cache.zero_()
            raise RuntimeError("an illegal address")

    run = LiveRun(Scrambled(toy_engine(**ENGINE)), Constant())
    prompt, sampling = list(range(20)), Sampling(ignore_eos=True)
    run.engine.add_request(Request("first", prompt, 4, IMMEDIATE, sampling))
    run.drain()
    run.engine.add_request(Request("swapped", list(range(20, 32)), 20, DEFERRED, sampling))
    run.step(3)
    run.obey(Constant(preempt_count=1, preemption=SWAP))
    run.step()
    assert run.completions["swapped"].finish_reason == "error"
    run.obey(Constant())
    run.engine.add_request(Request("again", prompt, 4, IMMEDIATE, sampling))
    run.drain()
    assert run.completions["again"].token_ids == run.completions["first"].token_ids == alone(prompt, 4, ())
    everything_is_given_back(run)


# ------------------------------------------------------------------------------------------------ requests


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (plain("x", [], 5), "empty prompt"),
        (plain("x", [1], 0), "max_tokens=0"),
        (plain("x", [1] * 60, 5), "60 prompt tokens and max_tokens=5, together more than the 64"),
        (plain("x", [1, VOCAB], 5), "prompt that is not from 0 to 39"),
        (plain("x", [-1], 5), "prompt that is not from 0 to 39"),
        (Request("x", [1], 5, sampling=Sampling(stop_token_ids=(99,))), "stop_token_ids that is not from 0 to 39"),
        (Request("x", [1], 5, sampling=Sampling(stop=("x",))), "stop strings but the model no tokenizer"),
        (plain("x", [1], 5, 7), "class 7"),
        (plain("x", [1], 5, tenant=1), "tenant=1"),
        (plain("there", [1], 5), "there already"),
    ],
)
def test_bad_requests_are_refused_and_the_others_run(request_: Request, message: str) -> None:
    run = live_run()
    run.engine.add_request(plain("there", [1, 2], 3))
    with pytest.raises(UserError, match=message):
        run.engine.add_request(request_)
    run.drain()
    assert list(run.completions) == ["there"] and run.completions["there"].token_ids == alone([1, 2], 3, ())


def test_a_full_engine_refuses_and_places_are_used_again() -> None:
    run = live_run(max_requests=2)
    for i in range(10):
        run.engine.add_request(plain(f"a{i}", [1, i], 3))
        run.engine.add_request(plain(f"b{i}", [2, i], 3))
        with pytest.raises(UserError, match="holds 2 requests"):
            run.engine.add_request(plain("c", [3], 3))
        run.drain()
    assert len(run.completions) == 20
    for name, completion in run.completions.items():
        assert completion.token_ids == alone([1 if name[0] == "a" else 2, int(name[1:])], 3, ())


def test_a_request_that_has_not_arrived_can_be_cancelled() -> None:
    run = live_run()
    updates: list[Update] = []
    run.engine.add_request(plain("later", [1], 3, arrival_s=1e6, listener=updates.append))
    run.engine.cancel("later")
    run.engine.cancel("never heard of")
    run.drain()
    assert run.completions["later"].finish_reason == "cancelled" and run.completions["later"].ttft_s is None
    assert [update.completion for update in updates] == [run.completions["later"]]


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, tokens: list[int], **options: Any) -> str:
        """Token 0 is A."""
        return "".join(chr(65 + token) for token in tokens)


def test_listeners_hear_every_token_and_stop_strings_are_cut_off() -> None:
    run = live_run(tokenizer=Letters())
    whole = Letters().decode(alone([5], 30, ()))
    stop = whole[10:13]
    updates: dict[str, list[Update]] = {"heard": [], "stopped": []}
    for name, stops in (("heard", ()), ("stopped", (stop, "??"))):
        sampling = Sampling(ignore_eos=True, stop=stops)
        run.engine.add_request(Request(name, [5], 30, sampling=sampling, listener=updates[name].append))
    run.engine.add_request(Request("silent", [5], 30, sampling=Sampling(ignore_eos=True, stop=(stop,))))
    run.engine.add_request(Request("by token", [5], 30, sampling=Sampling(stop_token_ids=(alone([5], 8, ())[7],))))
    run.drain()
    for name, heard in updates.items():
        completion = run.completions[name]
        assert [update.token for update in heard] == completion.token_ids
        assert "".join(update.text for update in heard) == completion.text
        assert [update.completion for update in heard] == [None] * (len(heard) - 1) + [completion]
    assert run.completions["heard"].text == whole and run.completions["heard"].finish_reason == "length"
    cut = whole.index(stop)
    for name in ("stopped", "silent"):
        completion = run.completions[name]
        assert completion.text == whole[:cut] and completion.finish_reason == "stop"
        assert completion.token_ids == alone([5], 30, ())[: cut + 3]
    by_token = run.completions["by token"]
    assert by_token.finish_reason == "stop" and by_token.text == Letters().decode(by_token.token_ids[:-1])


# ------------------------------------------------------------------------------------------------ accounts


def test_the_accounts_are_right_though_lengths_are_unknown() -> None:
    """What was promised and counted on max_tokens is put right when an output ends earlier."""
    rng = np.random.default_rng(11)
    run = live_run(RandomPolicy(1, 16), kv_blocks=30, max_running=6, max_requests=400)
    requests: dict[str, Request] = {}
    for i in range(300):
        request = random_request(rng, i, 0.0)
        object.__setattr__(request, "arrival_s", i * 0.02)
        object.__setattr__(request, "tpot_s", float(rng.choice([0.004, 0.01, 0.1])) if request.immediate else None)
        requests[request.id] = request
        run.engine.add_request(request)
    while run.engine.unfinished:
        run.step(5)
        if rng.random() < 0.1:
            run.engine.cancel(str(rng.choice(list(run.engine._places.place_of) or ["none"])))

    state = run.engine.state
    records = {name: state.requests[i] for i, name in enumerate(sorted(requests, key=lambda name: int(name[1:])))}
    early = broken = 0
    for name, record in records.items():
        request, completion = requests[name], run.completions[name]
        if completion.finish_reason in ("stop", "length"):
            count = len(completion.token_ids)
            assert record["output_tokens"] == record["generated"] == count
            early += count < request.max_tokens
            due_s = request.arrival_s + request.window_s  # type: ignore[operator]
            late = record["finish_s"] > due_s
            if request.immediate:
                late |= record["first_token_s"] > request.arrival_s + request.ttft_s  # type: ignore[operator]
                late |= record["finish_s"] - record["first_token_s"] > request.tpot_s * (count - 1) * (1 + 1e-9)  # type: ignore[operator]
            assert record["missed"] == late
            broken += late
        else:
            assert record["missed"] == 1
    assert early > 50 and broken > 20
    for request_class, group in enumerate(state.classes):
        mine = np.array([record for name, record in records.items() if requests[name].request_class == request_class])
        kept = mine[mine["missed"] == 0]
        assert group["arrived"] == len(mine) and group["kept"] == len(kept) and group["lost"] == len(mine) - len(kept)
        assert group["kept_output"] == kept["output_tokens"].sum()
        assert group["lost_output"] == mine["output_tokens"].sum() - kept["output_tokens"].sum()
        assert group["prompt_done"] == group["kept_prompt"] + group["void_prompt"]
        assert group["output_done"] == mine["generated"].sum() == group["kept_output"] + group["void_output"]


# ------------------------------------------------------------------------------------------------ policies


def test_a_decision_once_an_interval() -> None:
    asked: list[float] = []

    class Asked(Constant):
        every_iteration = False

        def decide(self, view: View) -> np.ndarray:
            asked.append(view.now_s)
            return super().decide(view)

    run = live_run(Asked(), interval_s=0.25, clock=VirtualClock())
    run.engine.add_request(plain("a", [1], 3, arrival_s=0.6))
    run.engine.run(until_s=1.6)
    assert asked == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5], abs=0.1)
    assert run.engine.now_s == pytest.approx(1.6, abs=0.1) and run.completions["a"].ttft_s is not None
    assert run.engine.metrics()["decisions"] == 7 and run.engine.metrics()["decision_median_s"] > 0


def test_a_policy_that_lets_nothing_run_is_left_after_a_while() -> None:
    run = live_run(Constant(deferred_kv_share=0.0))
    run.engine.add_request(plain("d", [1], 3, DEFERRED))
    run.engine.add_request(plain("i", [1], 3))
    run.engine.drain(patience_s=2.0)
    assert list(run.completions) == ["i"] and run.engine.unfinished == 1 and 2.0 < run.engine.now_s < 6.0


def test_a_policy_that_cannot_start_does_not_take_over(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Constant):
        name = "broken"

        def reset(self, view: View) -> None:
            raise UserError("it needs something else.")

    run = live_run()
    run.engine.add_request(plain("a", [1], 9))
    run.step(2)
    with caplog.at_level(logging.WARNING):
        run.engine.swap_policy(Broken())
        run.drain()
    assert "broken cannot take over" in caplog.text and run.engine.policy.name == "constant"
    assert run.completions["a"].token_ids == alone([1], 9, ()) and run.engine.metrics()["policy_swaps"] == 0


def exported_policy(path: Path) -> Path:
    """A network that sets all dials to zero, in the form in which policies are exported."""
    inputs, dials = len(observation.bounds(False)[0]), action.NUM_DIALS
    numbers = {
        "mean": np.zeros(inputs), "deviation": np.ones(inputs), "least": np.array(-1.0), "most": np.array(1.0),
        "weights": np.zeros((dials, inputs)), "biases": np.zeros(dials),
    }  # fmt: skip
    nodes = [
        helper.make_node("Sub", ["observation", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "deviation"], ["scaled"]),
        helper.make_node("Clip", ["scaled", "least", "most"], ["normalised"]),
        helper.make_node("Gemm", ["normalised", "weights", "biases"], ["raw"], transB=1),
        helper.make_node("Clip", ["raw", "least", "most"], ["action"]),
    ]
    graph = helper.make_graph(
        nodes, "policy",
        [helper.make_tensor_value_info("observation", TensorProto.FLOAT, ["batch", inputs])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", dials]) for name in ("action", "raw")],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in numbers.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    schemas = {"format": FORMAT, "observation_schema": observation.SCHEMA, "action_schema": action.SCHEMA}
    helper.set_model_props(model, {**schemas, "action": json.dumps("dials")})
    onnx.save(model, path)
    return path


def test_an_exported_policy_is_swapped_in_while_requests_run(tmp_path: Path) -> None:
    policy = load_policy(exported_policy(tmp_path / "night.onnx"))
    run = live_run(kv_blocks=30)
    for i in range(12):
        run.engine.add_request(plain(str(i), [i, 1], 20, i % 2))
    run.step(3)
    run.engine.swap_policy(policy)
    run.drain()
    assert run.engine.policy is policy and policy.failures == {}
    assert run.engine.metrics()["policy_swaps"] == 1 and run.engine.metrics()["decisions"] > 2
    for i in range(12):
        assert run.completions[str(i)].token_ids == alone([i, 1], 20, ())


@pytest.mark.parametrize("fault", ["exception", "not finite", "too late"])
def test_where_a_network_cannot_decide_its_fallback_does(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    policy = load_policy(exported_policy(tmp_path / "night.onnx"), "edf", 0.0 if fault == "too late" else None)

    def fail() -> bool:
        if fault == "exception":
            raise RuntimeError
        return False

    if fault != "too late":
        monkeypatch.setattr(policy, "_decide", fail)
    run = live_run()
    run.engine.swap_policy(policy)
    for i in range(12):
        run.engine.add_request(plain(str(i), [i, 1], 20, i % 2))
    run.drain()
    assert all(run.completions[str(i)].token_ids == alone([i, 1], 20, ()) for i in range(12))
    metrics = run.engine.metrics()
    assert metrics["fallback_decisions"] == sum(policy.failures.values()) == metrics["decisions"] - 1 >= 3
    assert "edf decides instead" in caplog.text


def test_a_policy_of_another_schema_is_refused_and_the_old_one_goes_on(tmp_path: Path) -> None:
    path = exported_policy(tmp_path / "old.onnx")
    model = onnx.load(path)
    helper.set_model_props(model, {"format": FORMAT, "observation_schema": "flexirl-observation-0"})
    onnx.save(model, path)
    run = live_run()
    run.engine.add_request(plain("a", [1], 9))
    run.step(2)
    with pytest.raises(UserError, match="observation_schema flexirl-observation-0"):
        run.engine.swap_policy(load_policy(path))
    run.drain()
    assert run.completions["a"].token_ids == alone([1], 9, ()) and run.engine.metrics()["policy_swaps"] == 0


# ------------------------------------------------------------------------------------------------ shadows


def test_a_shadow_is_asked_the_same_and_changes_nothing(tmp_path: Path) -> None:
    """Two runs that are alike but for the shadow, one that would write all over what it is shown."""

    class Meddling(RandomPolicy):
        name = "meddling"

        def decide(self, view: View) -> np.ndarray:
            seen.append((view.now_s, view.requests().tobytes()))
            for array in view.arrays:
                with pytest.raises(ValueError, match="read-only"):
                    array[...] = 0
            given.append(random_decision(self._rng, 16))
            return given[-1]

    class Watched(RandomPolicy):
        def decide(self, view: View) -> np.ndarray:
            shown.append((view.now_s, view.requests().tobytes()))
            decisions.append(super().decide(view))
            return decisions[-1]

    seen: list[Any] = []
    given: list[np.ndarray] = []
    ended = []
    for shadowed in (False, True):
        shown: list[Any] = []
        decisions: list[np.ndarray] = []
        with Shadow(Meddling(9, 16), tmp_path / "shadow.csv") as shadow:
            run = live_run(Watched(4, 16), shadow=shadow if shadowed else None)
            for i in range(12):
                run.engine.add_request(plain(str(i), [i, 1], 20, i % 2))
            run.drain()
        ended.append({name: completion.e2e_s for name, completion in run.completions.items()})
    assert ended[0] == ended[1] and seen == shown
    with open(tmp_path / "shadow.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [
        (now_s, name, mine[name].item(), other[name].item())
        for (now_s, _), mine, other in zip(shown, decisions, given, strict=True)
        for name in mine.dtype.names or ()
        if mine[name].shape == () and mine[name] != other[name]
    ]
    assert len(rows) == len(expected) > 20
    for row, (now_s, name, mine_value, other_value) in zip(rows, expected, strict=True):
        assert float(row["time_s"]) == now_s and row["field"] == name
        assert (float(row["decided"]), float(row["shadow"])) == (mine_value, other_value)
    differing = len({now_s for now_s, *_ in expected})
    assert run.engine.metrics()["shadow_differences"] == shadow.differences == differing <= shadow.asked == len(shown)


def test_a_shadow_that_fails_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Constant):
        name = "broken"

        def decide(self, view: View) -> np.ndarray:
            raise RuntimeError("no idea")

    with Shadow(Broken(), tmp_path / "shadow.csv") as shadow:
        run = live_run(shadow=shadow)
        run.engine.add_request(plain("a", [1], 9))
        run.drain()
    assert run.completions["a"].token_ids == alone([1], 9, ()) and (shadow.asked, shadow.differences) == (0, 0)
    assert caplog.text.count("shadow broken failed (no idea)") == 1


# ------------------------------------------------------------------------------------------------ clocks


def test_a_virtual_clock_skips_idle_time() -> None:
    run = live_run(clock=VirtualClock())
    run.engine.add_request(plain("a", [1], 3, arrival_s=1000.0))
    run.engine.add_request(plain("b", [2], 3, arrival_s=5000.0))
    run.engine.drain()
    assert run.engine.now_s > 5000 and set(run.completions) == {"a", "b"}
    for completion in run.completions.values():
        assert completion.ttft_s is not None and 0 < completion.ttft_s < 10 and completion.e2e_s < 10
    now_s = run.engine.clock.now_s()
    assert run.engine.clock.now_s() == now_s, "time passes while the engine does nothing"


def test_requests_come_from_other_threads() -> None:
    run = live_run(clock=WallClock(), max_requests=200)
    engine = run.engine
    loop = threading.Thread(target=engine.run)
    loop.start()

    def client(first: int) -> None:
        for i in range(first, first + 40):
            engine.add_request(plain(f"r{i}", [i % VOCAB, 7], 8, i % 2))
            if i % 10 == 0:
                engine.cancel(f"r{i}")
                engine.swap_policy(Constant())

    clients = [threading.Thread(target=client, args=(first,)) for first in (0, 100, 200)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(timeout=60)
    ended = threading.Event()
    engine.add_request(
        plain("last", [1], 30, DEFERRED, listener=lambda update: ended.set() if update.completion else None)
    )
    assert ended.wait(timeout=60)
    while engine.unfinished:
        ended.wait(0.01)
    engine.stop()
    loop.join(timeout=60)
    assert not loop.is_alive() and len(run.completions) == 121 and engine.metrics()["policy_swaps"] >= 1
    for name, completion in run.completions.items():
        if name != "last" and completion.finish_reason == "length":
            assert completion.token_ids == alone([int(name[1:]) % VOCAB, 7], 8, ())
    everything_is_given_back(run)


def test_every_iteration_can_be_recorded() -> None:
    steps: list[Step] = []
    run = live_run(on_step=steps.append, max_tokens_per_step=4)
    run.engine.add_request(plain("a", list(range(10)), 3))
    run.drain()
    assert [step.tokens for step in steps] == [[4], [4], [2], [1], [1]]
    assert all(step.requests == ["a"] and step.elapsed_s > 0 for step in steps)
    assert [int(step.features["prefill_tokens"]) for step in steps] == [4, 4, 2, 0, 0]
    assert all(earlier.began_s + earlier.elapsed_s <= later.began_s for earlier, later in pairwise(steps))


def test_a_completion_without_a_tokenizer_has_no_text() -> None:
    assert Completion("a", [1, 2], "stop").text == ""
