"""Whatever the schedule, a request's greedy output is what `model.generate` gives for it alone: fp32 on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
from live_toys import Constant, LiveRun, RandomPolicy
from model_toys import FAMILIES, CheckedExecutor, generate_alone

from flexirl.runtime.live.requests import Request
from flexirl.runtime.live.sampling import Sampling
from flexirl.runtime.models.loading import LoadedModel, load_model
from flexirl.runtime.models.tiny import build
from flexirl.workloads.trace import DEFERRED, IMMEDIATE


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A small model of each family."""
    folder = tmp_path_factory.mktemp(request.param)
    build(FAMILIES[request.param], folder, seed=1)
    return load_model(folder)


def test_no_schedule_changes_a_token(model: LoadedModel) -> None:
    rng = np.random.default_rng(3)
    executor = CheckedExecutor(model)
    run = LiveRun(executor, RandomPolicy(5, 24), save_blocks=2)
    requests: dict[str, Request] = {}

    def add(deferred_share: float) -> None:
        if len(requests) < 60:
            earlier = list(run.completions.values())
            said = rng.integers(0, 256, rng.integers(1, 20)).tolist()
            if earlier and rng.random() < 0.5:  # the next turn of a conversation
                before = earlier[rng.integers(len(earlier))]
                said = [*requests[before.id].prompt, *before.token_ids, *said]
            request = Request(
                id=f"r{len(requests)}",
                prompt=[*range(rng.integers(0, 20)), *said][:60],
                max_tokens=int(rng.integers(1, 40)),
                request_class=DEFERRED if rng.random() < deferred_share else IMMEDIATE,
                sampling=Sampling(ignore_eos=bool(rng.random() < 0.5)),
                window_s=np.inf,
            )
            requests[request.id] = request
            run.engine.add_request(request)

    executor.between_layers = lambda: add(0.0) if rng.random() < 0.015 else None  # these may interrupt
    step = 0
    while len(requests) < 60 or run.engine.unfinished:
        if run.engine.unfinished < 6:
            add(0.9)
        if step % 20 == 5:
            run.engine.cancel(f"r{rng.integers(len(requests))}")
        if step % 30 == 0:
            run.engine.swap_policy(RandomPolicy(step, 24))
        run.step(int(rng.integers(1, 7)))
        step += 1
    metrics = run.engine.metrics()
    assert metrics["preemptions"] > 10 and metrics["swapped_tokens"] > 200 and metrics["recomputed_tokens"] > 10
    assert (
        run.engine.state.classes["found_prompt"].sum() > 100 and run.engine.state.classes["evicted_blocks"].sum() > 100
    )
    assert executor.from_tier > 5
    assert metrics["abandoned_iterations"] > 0 and metrics["policy_swaps"] > 2
    whole = 0
    for name, completion in run.completions.items():
        expected = generate_alone(model, requests[name])
        whole += completion.finish_reason in ("stop", "length")
        if completion.finish_reason in ("stop", "length"):
            assert completion.token_ids == expected
        else:
            assert completion.token_ids == expected[: len(completion.token_ids)]
    assert whole > 25 and len({token for c in run.completions.values() for token in c.token_ids}) > 100


def test_the_seed_and_not_the_schedule_decides_what_is_drawn(model: LoadedModel) -> None:
    """The same requests under three schedules: tokens and log-probabilities are the same, seeds given or not."""
    rng = np.random.default_rng(8)
    requests = [
        Request(
            id=f"r{i}",
            prompt=rng.integers(0, 256, rng.integers(1, 40)).tolist(),
            max_tokens=int(rng.integers(5, 25)),
            request_class=i % 2,
            sampling=Sampling(
                temperature=float(rng.choice([0.0, 0.8, 1.5])),
                top_k=int(rng.choice([0, 10])),
                top_p=float(rng.choice([1.0, 0.8])),
                seed=int(rng.integers(1000)) if i % 3 else None,
                logprobs=2 if i % 4 == 0 else None,
            ),
        )
        for i in range(12)
    ]
    runs = []
    for seed in range(3):
        run = LiveRun(CheckedExecutor(model), RandomPolicy(seed, 24), seed=5)
        for request in requests:
            run.engine.add_request(request)
        run.drain()
        runs.append(run.completions)
    for request in requests:
        first, *others = (completions[request.id] for completions in runs)
        for other in others:
            assert other.token_ids == first.token_ids
        asked = request.sampling.logprobs is not None
        assert len(first.logprobs) == (len(first.token_ids) if asked else 0)
        for logprobs in first.logprobs:
            assert len(logprobs.likeliest) == 2 and logprobs.token <= logprobs.likeliest[0][1] + 1e-6 < 1e-5
    # Those without a seed draw by the engine's and their own id.
    other_seed = LiveRun(CheckedExecutor(model), RandomPolicy(0, 24), seed=6)
    for request in requests:
        other_seed.engine.add_request(request)
    other_seed.drain()
    differ = {
        name for name, completion in other_seed.completions.items() if completion.token_ids != runs[0][name].token_ids
    }
    assert differ and all(requests[int(name[1:])].sampling.seed is None for name in differ)


@pytest.mark.parametrize("block", [0, 6])
def test_the_comparison_can_fail(model: LoadedModel, block: int) -> None:
    """One block of keys and values lost changes what is generated, unless it lies before the sliding window."""
    request = Request("a", list(range(40, 70)), 30, sampling=Sampling(ignore_eos=True))
    expected = generate_alone(model, request)
    executor = CheckedExecutor(model)
    run = LiveRun(executor, Constant())
    run.engine.add_request(request)
    while run.engine.metrics()["tokens"] < 3:
        run.step()
    executor._cache[:, run.engine.state.block_rows[run.engine.state.requests["row"][0], block]] = 0.0
    run.drain()
    generated = run.completions["a"].token_ids
    before_window = block == 0 and model.model.config.model_type == "mistral"
    assert generated[:3] == expected[:3] and (generated == expected) == before_window
