"""Program: how fast the live engine is: `python -m flexirl.bench live [--quick] [--output outputs/bench_live.json]`.

On a CPU with the tiny model, PyTorch on one thread; see `flexirl.benches.speed` for the form of a measurement.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from flexirl.benches.figures import Row, report
from flexirl.policies.registry import PRETRAINED, make_policy
from flexirl.runtime.live.engine import LiveEngine
from flexirl.runtime.live.executor import Batch, Outcome
from flexirl.runtime.live.options import Options
from flexirl.runtime.live.requests import Completion, Request
from flexirl.runtime.live.sampling import Sampling
from flexirl.runtime.models.executor import ModelExecutor, fit_profile
from flexirl.runtime.models.loading import load_model
from flexirl.runtime.models.tiny import tiny_model
from flexirl.runtime.profile.engine import load_profile
from flexirl.workloads.slo import SLO
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

SEATS = 128
TOKENS_PER_STEP = 512
TOKEN_BY_TOKEN = Sampling(ignore_eos=True)  # all of max_tokens are made


class TimedExecutor(ModelExecutor):
    """The executor of the tiny model, which sums up the seconds in the model's forward."""

    def __init__(self) -> None:
        model = load_model("tiny")
        profile = load_profile("cpu-tiny").replace(max_running=SEATS, max_tokens_per_step=TOKENS_PER_STEP)
        super().__init__(model, fit_profile(model, profile))
        self.forward_s = 0.0

    def execute(self, batch: Batch, sampling: np.ndarray | None, interrupted: Callable[[], bool] | None) -> Outcome:
        """See `Executor`."""
        outcome = super().execute(batch, sampling, interrupted)
        self.forward_s += outcome.forward_s
        return outcome


def _prompts(count: int, shortest: int, longest: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, rng.integers(shortest, longest + 1)).tolist() for _ in range(count)]


def overhead(repeats: int) -> Iterator[Row]:
    """Seconds per iteration outside the model's forward, 128 requests running, all of them decoding.

    Everything is in it: decisions (of a policy that, like a learned one, is asked every 0.2 s), the plan, the block
    table, the flattened batch, attention's planning, choosing tokens and booking them. Half the requests are
    immediate; contexts grow from 64 tokens. The median over decision intervals, each of several iterations: the
    forward leaves the processor's caches full of weights and keys, so this is more than the same work takes in a loop.
    """
    executor = TimedExecutor()
    engine = LiveEngine(executor, make_policy("vllm_priority"), SLO(1.0, 0.05), Options(interval_s=0.2))
    for i, prompt in enumerate(_prompts(SEATS, 64, 64)):
        kind = DEFERRED if i % 2 else IMMEDIATE
        engine.add_request(Request(str(i), prompt, 1000, kind, TOKEN_BY_TOKEN, ttft_s=1e9, tpot_s=1e9))
    while engine.metrics()["running"] < SEATS:
        engine.run(engine.clock.now_s())
    outside_s = []
    for _ in range(20 * repeats):
        began_s, forward_s, iterations = time.perf_counter(), executor.forward_s, engine.iterations
        engine.run(engine.clock.now_s() + 0.2)
        passed_s = time.perf_counter() - began_s - (executor.forward_s - forward_s)
        outside_s.append(passed_s / (engine.iterations - iterations))
    yield Row("live_overhead_per_iteration_s", float(np.median(outside_s)), "s")


def decisions(repeats: int) -> Iterator[Row]:
    """Seconds of the packaged policy's decisions between iterations of such an engine, whose forwards empty the caches.

    It is asked four times as often as usual, to have enough of them for a 99th percentile.
    """
    engine = LiveEngine(TimedExecutor(), make_policy(PRETRAINED), SLO(1.0, 0.05), Options(interval_s=0.05))
    for i, prompt in enumerate(_prompts(SEATS, 64, 64)):
        engine.add_request(Request(str(i), prompt, 1000, DEFERRED if i % 2 else IMMEDIATE, TOKEN_BY_TOKEN))
    engine.run(5.0 * repeats)
    metrics = engine.metrics()
    if metrics["fallback_decisions"]:
        raise RuntimeError(f"the policy failed {metrics['fallback_decisions']} times")
    yield Row("live_decision_median_s", metrics["decision_median_s"], "s")
    yield Row("live_decision_p99_s", metrics["decision_p99_s"], "s")


def throughput(repeats: int) -> Iterator[Row]:
    """Tokens generated per second, beside Transformers' own continuous batching on the same model and requests.

    128 requests of 16 to 128 prompt tokens and 64 more to generate, greedy, all there at the start; at most 512 tokens
    an iteration on both sides, cache enough for all. Both are run in turns, and must give the same tokens.
    """
    prompts, new_tokens = _prompts(SEATS, 16, 128), 64
    ours, theirs = OurGeneration(), TheirGeneration(new_tokens)
    if ours(prompts, new_tokens) != theirs(prompts):
        raise RuntimeError("the two engines do not give the same tokens")
    seconds = np.array([[_seconds(lambda: ours(prompts, new_tokens)), _seconds(lambda: theirs(prompts))]
                        for _ in range(repeats)])  # fmt: skip
    ours_s, theirs_s = np.median(seconds, axis=0).tolist()
    tokens = SEATS * new_tokens
    yield Row("live_tokens_per_s", tokens / ours_s, "tokens/s")
    yield Row("transformers_tokens_per_s", tokens / theirs_s, "tokens/s")
    yield Row("live_over_transformers", theirs_s / ours_s, "ratio")


def _seconds(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


class OurGeneration:
    """Runs prompts on a live engine under vLLM's rule."""

    def __init__(self) -> None:
        self._ended: dict[str, Completion] = {}
        self._engine = LiveEngine(TimedExecutor(), make_policy("vllm_fcfs"), SLO(1.0, 0.05), Options(on_end=self._end))

    def _end(self, completion: Completion) -> None:
        self._ended[completion.id] = completion

    def __call__(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """The tokens generated for each prompt."""
        for i, prompt in enumerate(prompts):
            self._engine.add_request(Request(str(i), prompt, new_tokens, sampling=TOKEN_BY_TOKEN))
        self._engine.drain()
        return [self._ended[str(i)].token_ids for i in range(len(prompts))]


class TheirGeneration:
    """Runs prompts with Transformers' `generate_batch`, the manager kept from call to call."""

    def __init__(self, new_tokens: int) -> None:
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
        self._model = AutoModelForCausalLM.from_pretrained(tiny_model("tiny"), dtype=torch.float32).eval()
        self._generation = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        self._batching = ContinuousBatchingConfig(num_blocks=256, max_batch_tokens=TOKENS_PER_STEP)

    def __call__(self, prompts: list[list[int]]) -> list[list[int]]:
        """The tokens generated for each prompt."""
        results = self._model.generate_batch(prompts, self._generation, self._batching, warmup=False)
        return [list(result.generated_tokens) for result in results.values()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m flexirl.bench live", description="Measures the live engine.")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench_live.json"), help="where the figures go")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    repeats = 1 if options.quick else 5
    report((row for measure in (overhead, decisions, throughput) for row in measure(repeats)), options.output)
