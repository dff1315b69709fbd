"""The upper bound: never below what an exhaustive search or any rule earns, and close to closed forms."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import TICK_S, deferred, immediate, toy_engine, toy_trace

from flexirl.benchmarks.bound import revenue_bound, token_cost_hull
from flexirl.policies.interface.action import NUM_DIALS
from flexirl.policies.registry import make_policy
from flexirl.policies.rules import rule_names
from flexirl.runtime.profile.engine import EngineProfile, load_profile, profile_names
from flexirl.runtime.profile.step_time import BATCH, step_time
from flexirl.runtime.scheduler.accounts import Prices
from flexirl.runtime.simulator.simulation import simulate
from flexirl.workloads.slo import SLO
from flexirl.workloads.trace import DEFERRED, Trace

PRICES = Prices()


def best_schedule(engine: EngineProfile, trace: Trace, duration_s: float, warmup_s: float) -> float:
    """The most revenue of all schedules: at each step, every choice of tokens for every request that has arrived.

    Caches are large enough for all requests at once, so that nobody is ever preempted.
    """
    figures = engine.values
    rows = trace.rows
    pays = PRICES.of(rows)
    known: dict[tuple[object, ...], float] = {}

    def kept(r: int, first_s: float, now_s: float) -> bool:
        row = rows[r]
        if row["request_class"] == DEFERRED:
            return bool(now_s <= row["arrival_s"] + row["window_s"])
        due_s = first_s + row["tpot_slo_s"] * (row["output_tokens"] - 1) if row["output_tokens"] > 1 else now_s
        return bool(first_s <= row["arrival_s"] + row["ttft_slo_s"] and now_s <= due_s)

    def search(now_s: float, done: tuple[tuple[int, int, float], ...]) -> float:
        """done: prompt tokens, output tokens, time of the first one."""
        if now_s >= duration_s:
            return 0.0
        if (now_s, done) in known:
            return known[now_s, done]
        choices = []
        for row, (prompt, output, _) in zip(rows, done, strict=True):
            if row["arrival_s"] > now_s or output == row["output_tokens"]:
                choices.append([0])
            else:
                choices.append(list(range(max(int(row["prompt_tokens"]) - prompt, 1) + 1)))
        later = [float(row["arrival_s"]) for row in rows if row["arrival_s"] > now_s]
        best = search(min(later), done) if later else 0.0
        for chosen in product(*choices):
            if not any(chosen):
                continue
            decodes = prefill = sampled = 0
            context = pairs = 0.0
            for tokens, row, (prompt, output, _) in zip(chosen, rows, done, strict=True):
                if tokens and prompt == row["prompt_tokens"]:
                    decodes, context = decodes + 1, context + prompt + output
                    sampled += 1
                elif tokens:
                    prefill, pairs = prefill + tokens, pairs + tokens * (prompt + tokens / 2)
                    sampled += prompt + tokens == row["prompt_tokens"]
            if (
                decodes + prefill > figures["max_tokens_per_step"]
                or sum(t > 0 for t in chosen) > figures["max_running"]
            ):
                continue
            seconds = figures["base_s"] + figures["per_token_s"] * (decodes + prefill)
            seconds += figures["per_sequence_s"] * sampled + figures["per_context_s"] * context
            seconds += figures["per_chunk_context_s"] * pairs + figures["over_16_s"] * (decodes + prefill > 16)
            seconds += figures["mixed_s"] * (prefill > 0)
            after_s, earned, after = now_s + seconds, 0.0, []
            for r, (tokens, (prompt, output, first_s)) in enumerate(zip(chosen, done, strict=True)):
                if tokens and prompt < rows["prompt_tokens"][r]:
                    prompt += tokens
                    produced = prompt == rows["prompt_tokens"][r]
                else:
                    produced = tokens > 0
                output += produced
                first_s = after_s if produced and output == 1 else first_s
                if (
                    produced
                    and output == rows["output_tokens"][r]
                    and after_s >= warmup_s
                    and kept(r, first_s, after_s)
                ):
                    earned += pays[r]
                after.append((prompt, output, first_s))
            best = max(best, earned + search(after_s, tuple(after)))
        known[now_s, done] = best
        return best

    return search(0.0, ((0, 0, 0.0),) * len(rows))


@pytest.mark.parametrize("seed", range(12))
def test_no_schedule_of_a_tiny_case_earns_more(seed: int) -> None:
    rng = np.random.default_rng(seed)
    engine = toy_engine(
        max_tokens_per_step=int(rng.integers(2, 6)), max_running=int(rng.integers(1, 4)), over_16_s=2 * TICK_S,
        mixed_s=4 * TICK_S * rng.integers(2), per_sequence_s=TICK_S, per_context_s=TICK_S / 4,
        per_chunk_context_s=TICK_S / 8, host_kv_blocks=8,
    )  # fmt: skip
    requests = []
    for _ in range(3):
        arrival_s, prompt, output = TICK_S * rng.integers(40), int(rng.integers(1, 4)), int(rng.integers(1, 4))
        if rng.random() < 0.6:
            promise = {"ttft_slo_s": TICK_S * rng.integers(20, 60), "tpot_slo_s": TICK_S * rng.integers(18, 40)}
            requests.append(immediate(arrival_s, prompt, output, **promise))
        else:
            requests.append(deferred(arrival_s, prompt, output, window_s=TICK_S * rng.integers(40, 150)))
    trace = toy_trace(*requests)
    duration_s, warmup_s = 120 * TICK_S, 30 * TICK_S * rng.integers(2)
    best = best_schedule(engine, trace, duration_s, warmup_s)
    for bins in (1, 7, 40):
        bound = revenue_bound(engine, trace, PRICES, duration_s, warmup_s, bins) * (duration_s - warmup_s)
        assert best <= bound <= PRICES.of(trace.rows).sum() * (1 + 1e-5)


def test_the_search_itself_finds_what_is_best() -> None:
    """One seat, two requests, time for one of them: the dearer; with two seats both."""
    trace = toy_trace(deferred(0, 1, 2, window_s=40 * TICK_S), deferred(0, 2, 2, window_s=40 * TICK_S))
    assert best_schedule(toy_engine(max_running=1), trace, 1.0, 0.0) == pytest.approx(5.0)
    assert best_schedule(toy_engine(max_running=2), trace, 1.0, 0.0) == pytest.approx(4.5 + 5.0)


def test_a_promise_that_cannot_be_kept_earns_nothing() -> None:
    """One iteration takes 17 ticks, a request alone 17 and 17."""
    late = toy_trace(immediate(0, 1, 2, ttft_slo_s=16 * TICK_S, tpot_slo_s=1.0))
    slow = toy_trace(immediate(0, 1, 2, ttft_slo_s=17 * TICK_S, tpot_slo_s=16 * TICK_S))
    both = toy_trace(immediate(0, 1, 2, ttft_slo_s=17 * TICK_S, tpot_slo_s=17 * TICK_S))
    too_long = toy_trace(deferred(0, 30, 3))
    bounds = [revenue_bound(toy_engine(), trace, PRICES, 1.0) for trace in (late, slow, both, too_long)]
    assert bounds == pytest.approx([0.0, 0.0, 9.0, 0.0], rel=1e-5)


@pytest.mark.parametrize(("output", "per_iteration", "ticks"), [(1, 64, 16 + 64), (9, 4, 16 + 4)])
def test_a_long_backlog_is_served_at_the_rate_of_full_iterations(output: int, per_iteration: int, ticks: int) -> None:
    """Prompts of 8 tokens: alone they fill iterations of 64; with outputs, 4 seats decode 8 of 9 tokens' time."""
    trace = toy_trace(*(deferred(0, 8, output) for _ in range(3000)))
    engine = toy_engine(kv_blocks=10_000, max_model_len=64)
    duration_s = 4.0
    bound = revenue_bound(engine, trace, PRICES, duration_s)
    if output == 1:
        assert bound == pytest.approx(0.5 * (8 + 4) / 8 * per_iteration / (ticks * TICK_S), rel=0.05)
    else:
        # A request costs 8 of 4 seats' iterations and 16 tokens, its prefill riding along.
        seconds = (8 / per_iteration * 16 + 16) * TICK_S
        assert bound == pytest.approx(0.5 * (8 + 36) / seconds, rel=0.05)


@pytest.mark.parametrize("name", profile_names())
def test_the_hull_lies_below_the_iterations_and_touches_them(name: str) -> None:
    engine = load_profile(name).values
    tokens = np.arange(1, int(engine["max_tokens_per_step"]) + 1)
    batches = np.zeros(len(tokens), BATCH)
    batches["decode_sequences"] = tokens
    seconds = np.array([step_time(engine, batch) for batch in batches])
    hull = np.max([constant_s + slope_s * tokens for constant_s, slope_s in token_cost_hull(engine)], axis=0)
    assert (hull <= seconds * (1 + 1e-12)).all()
    assert hull[0] == pytest.approx(seconds[0]) and hull[-1] == pytest.approx(seconds[-1])


def random_trace(rng: np.random.Generator, count: int, span_s: float) -> Trace:
    """Requests of every kind, with images and cached prefixes."""
    requests = []
    for _ in range(count):
        prompt, output = int(rng.integers(1, 40)), int(rng.integers(1, 20))
        image, more = int(rng.integers(prompt + 1)) if rng.random() < 0.3 else 0, {}
        if image:
            more = {"image_tokens": image, "num_images": int(rng.integers(1, 4))}
        if rng.random() < 0.3:
            more["prefix_tokens"] = int(rng.integers(prompt + 1))
        arrival_s = float(rng.random() * span_s)
        if rng.random() < 0.5:
            promise = {"ttft_slo_s": rng.uniform(0.02, 0.5), "tpot_slo_s": rng.uniform(0.01, 0.1)}
            requests.append(immediate(arrival_s, prompt, output, **promise, **more))
        else:
            window_s = rng.uniform(0.1, 2.0) if rng.random() < 0.5 else np.inf
            requests.append(deferred(arrival_s * (rng.random() < 0.5), prompt, output, window_s=window_s, **more))
    return toy_trace(*requests)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_rule_earns_more(seed: int) -> None:
    """On random engines, short of memory too, with every hand-written rule."""
    rng = np.random.default_rng(seed)
    engine = toy_engine(
        base_s=rng.uniform(1e-3, 2e-2), per_token_s=rng.uniform(0, 1e-3), per_token_64_s=rng.uniform(0, 1e-4),
        over_16_s=rng.uniform(0, 5e-3), mixed_s=rng.uniform(0, 5e-3), per_context_s=rng.uniform(0, 1e-4),
        per_chunk_context_s=rng.uniform(0, 1e-5), per_image_token_s=rng.uniform(0, 1e-3), per_swap_token_s=1e-4,
        noise=rng.choice([0.0, 0.1]), kv_blocks=int(rng.integers(16, 60)), host_kv_blocks=int(rng.integers(20)),
        max_tokens_per_step=int(rng.integers(16, 128)), max_running=int(rng.integers(1, 12)), max_model_len=64,
        prefix_caching=int(rng.integers(2)),
    )  # fmt: skip
    duration_s = 3.0
    trace = random_trace(rng, int(rng.integers(5, 200)), duration_s)
    warmup_s = rng.choice([0.0, 0.7])
    bound = revenue_bound(engine, trace, PRICES, duration_s, warmup_s, int(rng.integers(3, 30)))
    knobs = {
        "hygen": {"latency_budget_s": 0.03},
        "fixed_dials": {"tune": False, "dials": rng.uniform(-1, 1, NUM_DIALS).tolist()},
    }
    for name in rule_names():
        run = simulate(
            make_policy(name, knobs.get(name)), engine, trace, SLO(0.2, 0.05), duration_s, warmup_s, 0.1, seed % 1000,
        )  # fmt: skip
        earned = run.figures["revenue_per_s"]
        assert earned is not None and earned <= bound, name
