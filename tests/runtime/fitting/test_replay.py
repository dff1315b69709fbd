"""The replay against a port of vLLM's scheduler, and what of a recorded run is left to explain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from vllm_port import BLOCK, Engine, Request

from flexirl.policies.registry import make_policy
from flexirl.programs.validate import statistics
from flexirl.runtime.fitting.operators import fit_profile
from flexirl.runtime.fitting.replay import Record, Served, replay
from flexirl.runtime.profile.engine import EngineProfile, make_profile
from flexirl.runtime.profile.step_time import COEFFICIENTS
from flexirl.workloads.trace import Trace, empty_rows

RECORDED = Path(__file__).parents[4] / "shared" / "real_vllm" / "rtx4090-llama-3.1-8b"

# The prefix hits in the log that LLMServingSim, which has the prompts' tokens, publishes of its own replay of the
# recorded run (bench/examples/RTX4090/Llama-3.1-8B/outputs/sim.log): prompt tokens admitted before and after the
# second in which a hit was counted, and its tokens. They are 1.9% of all prompt tokens.
PUBLISHED_HITS = (
    (40684, 50118, 448),
    (55323, 62860, 624),
    (75284, 81937, 624),
    (111244, 116805, 992),
    (139246, 145534, 448),
    (153093, 155550, 608),
    (174533, 179115, 592),
    (194016, 196735, 512),
)


def profile(**values: float) -> EngineProfile:
    """An engine whose iterations take some milliseconds, with prefix caching."""
    seconds = {"base_s": 5e-3, "per_sequence_s": 1e-5, "per_token_s": 2e-5, "per_context_s": 1e-8, "mixed_s": 1e-3}
    fixed = {"block_size": BLOCK, "max_model_len": 4096, "prefix_caching": 1}
    return make_profile("toy", dict.fromkeys(COEFFICIENTS, 0.0) | seconds | fixed | values, {}, {})


def port(engine: EngineProfile, trace: Trace, asynchronous: bool, shared: dict[int, tuple[int, int]]) -> Engine:
    """The trace served by the port of vLLM, with the engine's step time written out anew."""
    value = engine.values

    def step_s(chunks: list[tuple[int, int]], contexts: list[int], samples: int) -> float:
        tokens, attended = sum(chunk for chunk, _ in chunks) + len(contexts), sum(contexts)
        seconds = value["base_s"] + value["per_sequence_s"] * samples + value["per_token_s"] * tokens
        seconds += sum(value[f"per_token_{knee}_s"] * max(tokens - knee, 0) for knee in (64, 128, 256))
        seconds += sum(value[f"over_{knee}_s"] for knee in (16, 256) if tokens > knee)
        seconds += value["per_context_s"] * attended
        seconds += value["per_chunk_context_s"] * sum(chunk * done + chunk**2 / 2 for chunk, done in chunks)
        return seconds + (value["mixed_s"] + value["per_mixed_context_s"] * attended if chunks else 0.0)

    requests = [
        Request(number, float(row["arrival_s"]), int(row["prompt_tokens"]), int(row["output_tokens"]))
        for number, row in enumerate(trace.rows)
    ]
    blocks, budget, seats = (int(value[name]) for name in ("kv_blocks", "max_tokens_per_step", "max_running"))
    return Engine(requests, step_s, blocks, budget, seats, asynchronous, shared).run()


def served(engine: Engine) -> Served:
    """What the port's requests got."""
    times = [(r.queued_s, r.first_token_s, r.last_token_s) for r in engine.requests]
    return Served(*np.array(times).T, np.array([r.output for r in engine.requests]))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("asynchronous", [False, True])
def test_replay_serves_as_vllm_does(seed: int, asynchronous: bool) -> None:
    random = np.random.default_rng(seed)
    rows = empty_rows(60)
    rows["arrival_s"] = np.cumsum(random.exponential(0.03, len(rows)))
    rows["prompt_tokens"] = random.integers(20, 1200, len(rows))
    rows["output_tokens"] = rows["max_tokens"] = random.integers(2, 300, len(rows))
    rows["arrival_s"] -= rows["arrival_s"][0]
    trace = Trace(rows, "random", 1)
    engine = profile(
        kv_blocks=random.integers(100, 400), max_tokens_per_step=random.choice([256, 2048]), max_running=8 + 4 * seed
    )
    ours, _ = replay(make_policy("vllm_fcfs"), engine, trace, asynchronous)
    vllm = port(engine, trace, asynchronous, {})
    theirs = served(vllm)
    assert sum(request.preemptions for request in vllm.requests) > 3
    # One step ahead, vLLM may evict a request that is about to end: one request's order differs then.
    tolerance_s = 2e-3 if asynchronous else 1e-9
    for name in ("queued_s", "first_token_s", "last_token_s"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=tolerance_s, rel=0)


@pytest.mark.skipif(not RECORDED.is_dir(), reason="the recorded run is not beside the repository")
def test_shared_prefixes_explain_what_the_replay_of_the_recorded_run_misses() -> None:
    record, engine = Record.read(RECORDED), fit_profile(RECORDED)
    ours, _ = replay(make_policy("vllm_fcfs"), engine, record.trace, record.asynchronous)
    alone = served(port(engine, record.trace, record.asynchronous, {}))
    # One step ahead, vLLM may give up a block of a preempted request more or less, for an iteration 16 tokens longer.
    assert ours.last_token_s == pytest.approx(alone.last_token_s, rel=1e-3)

    prompts = record.trace.rows["prompt_tokens"]
    admitted = np.cumsum(prompts)
    shared = {}
    for before, after, tokens in PUBLISHED_HITS:
        # A conversation goes on: the earlier prompt has as many full blocks, the later one is longer.
        first, last = np.searchsorted(admitted, (before, after))
        earlier = max(i for i in range(first + 1) if prompts[i] // BLOCK * BLOCK == tokens)
        later = max(i for i in range(first + 1, last + 1) if prompts[i] > prompts[earlier] + BLOCK)
        shared[later] = (earlier, tokens)
    together = port(engine, record.trace, record.asynchronous, shared)
    assert together.prefix_hits == sum(tokens for *_, tokens in PUBLISHED_HITS)
    real, figures = statistics(record.served), statistics(served(together))
    differences = {key: figures[key] / real[key] - 1 for key in real}
    assert max(map(abs, differences.values())) < 0.02
