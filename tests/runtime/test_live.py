"""The live engine on a toy device: no schedule loses, repeats or alters a token, and everything is given back."""

from __future__ import annotations

import numpy as np
import pytest
from live_toys import END, TICK_S, VOCAB, LiveRun, RandomPolicy, ToyExecutor, alone
from toys import toy_engine

from flexirl.runtime.requests import Request
from flexirl.runtime.sampling import Sampling
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

ENGINE: dict[str, float] = {
    "kv_blocks": 24, "host_kv_blocks": 16, "block_size": 4, "max_running": 8, "max_tokens_per_step": 16,
    "max_model_len": 64, "prefix_caching": 1, "per_swap_token_s": TICK_S / 8,
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
            request = random_request(rng, len(requests), run.engine.view.now_s)
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
    assert scheduler["free_blocks"] == profile["kv_blocks"] == run.engine._table.counts[1]
    assert scheduler["host_free_blocks"] == profile["host_kv_blocks"] == run.executor.free_host_blocks
    assert scheduler["promises_length"] == scheduler["promises_next"] and scheduler["cached_blocks"] == 0
    assert not run.engine._place_of and len(run.engine._places) == len(run.engine.state.requests)
