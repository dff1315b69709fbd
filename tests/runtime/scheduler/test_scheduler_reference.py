"""The compiled scheduler does what the plain one does, and fast-forwarding changes nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Reference
from toys import TICK_S, ToyRun, decision_with, deferred, immediate, toy_engine, toy_trace

from flexirl.runtime.profile.engine import EngineProfile
from flexirl.runtime.scheduler.invariants import cache_nodes, check_invariants, tier_blocks
from flexirl.runtime.scheduler.queues import rescore
from flexirl.runtime.scheduler.state import (
    FUTURE,
    RUNNING,
    WAITING,
    State,
    itl_bin_edges,
)
from flexirl.workloads.trace import CONTENT, DEFERRED, IMMEDIATE, Trace

PROMISES = ("ttft_slo_s", "tpot_slo_s", "window_s")
PER_REQUEST = (
    "status", "generated", "computed", "kv_blocks", "host_blocks", "furthest", "preemptions", "relegated", "missed",
    "score", "first_token_s", "last_token_s", "finish_s",
)  # fmt: skip
PER_CLASS = (
    "arrived", "finished", "ended_otherwise", "preemptions", "prompt_done", "output_done", "kept", "lost",
    "kept_prompt", "kept_output", "lost_prompt", "lost_output", "void_prompt", "void_output",
)  # fmt: skip


def ticks(low: int, high: int) -> st.SearchStrategy[float]:
    """Seconds in whole ticks."""
    return st.integers(low, high).map(lambda count: count * TICK_S)


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """A request that the toy engines can nearly always hold."""
    prompt, output = draw(st.integers(1, 24)), draw(st.integers(1, 12))
    some = {promise: draw(ticks(1, 400)) for promise in draw(st.sets(st.sampled_from(PROMISES)))}
    if draw(st.booleans()):
        some = {name: value for name, value in some.items() if name == "window_s"}
        kind = deferred
    else:
        kind = immediate
    images = draw(st.integers(0, 3))
    of_image = images * draw(st.integers(0, prompt // images)) if images else 0
    more = {
        "tenant": draw(st.integers(0, 2)),
        "max_tokens": output + draw(st.integers(0, 4)),
        "num_images": images if of_image else 0,
        "image_tokens": of_image,
        "predicted_output_tokens": draw(st.sampled_from((0, 0, 1, 7, 20))),
        "prefix_tokens": draw(st.sampled_from((0, 0, prompt // 2, prompt))),
    }
    return kind(draw(ticks(0, 300)), prompt, output, **some, **more)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Up to ten requests; some begin alike, since what they say is a path down one of a few trees."""
    trace = toy_trace(*draw(st.lists(requests(), min_size=1, max_size=10)))
    contents = []
    for row in trace.rows:
        row["content_first"] = len(contents)
        path, end = 1, 0
        for _ in range(draw(st.integers(0, 4))):
            # An origin is the whole path down to it: the turns taken and the lengths of what was said on the way.
            turn, length = draw(st.integers(0, 1)), draw(st.sampled_from((2, 5, 12)))
            path, end = (path * 2 + turn) * 16 + length, end + length
            if end > row["prompt_tokens"] + row["output_tokens"]:
                break
            contents.append((path, end))
        row["content_count"] = len(contents) - row["content_first"]
    for i, row in enumerate(trace.rows):
        row["follows"] = draw(st.integers(0, min(i, 3)))
        row["delay_s"] = draw(st.one_of(st.just(0.0), ticks(0, 100)))
    return replace(trace, contents=np.array(contents, CONTENT))


@st.composite
def engines(draw: st.DrawFn) -> EngineProfile:
    """Engines that are short of blocks, seats and tokens; coefficients are whole ticks."""
    coefficients = {
        name: draw(st.integers(0, 3)) * TICK_S
        for name in (
            "host_s", "per_sequence_s", "over_16_s", "per_context_s", "mixed_s", "per_mixed_context_s",
            "per_swap_token_s", "per_image_token_s", "per_chunk_context_s",
        )
    }  # fmt: skip
    return toy_engine(
        **coefficients,
        kv_blocks=draw(st.integers(6, 14)),
        host_kv_blocks=draw(st.sampled_from((0, 4, 20))),
        host_cache_blocks=draw(st.sampled_from((0, 2, 7, 40))),
        block_size=draw(st.sampled_from((1, 3, 4, 8))),
        max_tokens_per_step=draw(st.sampled_from((3, 16, 64))),
        max_running=draw(st.integers(1, 6)),
        max_model_len=64,
        prefix_caching=draw(st.integers(0, 1)),
    )


@st.composite
def decisions(draw: st.DrawFn, preempt: bool = True, by_return: bool = False) -> dict[str, float]:
    """Any decision; preempt: it may carry preemptions, which are made anew each time it is put in force; by_return:
    it may go by returns, which the reference does not learn."""
    target_s = st.one_of(st.just(np.inf), ticks(0, 120))
    share = st.sampled_from((0.0, 0.25, 1.0))
    immediate_order = draw(st.integers(0, 4))
    return {
        "discipline": draw(st.integers(0, 2)),
        "decodes_first": draw(st.integers(0, 1)),
        "immediate_order": immediate_order,
        "deferred_order": draw(st.one_of(st.just(immediate_order), st.integers(0, 4))),
        "victim": draw(st.integers(0, 4)),
        "preemption": draw(st.integers(0, 2)),
        "to_host": draw(st.integers(0, 2)),
        "by_return": draw(st.integers(0, 1)) if by_return else 0,
        "preempt_for_immediate": draw(st.integers(0, 1)),
        "relegated_last": draw(st.integers(0, 1)),
        "relegate": draw(st.sampled_from((0.0, 0.0, 1.0, 2.5))),
        "token_budget": draw(st.sampled_from((1, 5, 1000))),
        "preempt_count": draw(st.sampled_from((0, 0, 0, 1, 2))) if preempt else 0,
        "deferred_token_floor": draw(st.sampled_from((0, 0, 1, 4))),
        "immediate_step_s": draw(target_s),
        "deferred_step_s": draw(target_s),
        "immediate_slack": draw(st.sampled_from((0.0, 0.0, 0.5, 1.0))),
        "deferred_slack": draw(st.sampled_from((0.0, 0.0, 0.5, 1.0))),
        "deferred_decodes": draw(st.sampled_from((1.0, 0.5, 0.0))),
        "deferred_margin_s": draw(st.one_of(st.just(0.0), ticks(0, 200))),
        "deferred_kv_share": draw(st.sampled_from((1.0, 1.0, 0.5, 0.0))),
        "deferred_cache_share": draw(st.sampled_from((1.0, 0.4, 0.0))),
        "immediate_cache_share": draw(st.sampled_from((0.0, 0.0, 0.3, 1.0))),
        "reserve_ratio": draw(share),
        "reserve_new_ratio": draw(share),
        "reserve_clip": draw(st.sampled_from((np.inf, 4.0))),
        "order_weight_s": draw(st.sampled_from((-2, -1, 0, 1, 1.5, 2, 3))) * TICK_S,
        "deferred_weight_s": draw(st.sampled_from((-2, -1, 0, 1, 1.5, 2, 3))) * TICK_S,
        "expected_output": draw(st.sampled_from((0.0, 8.0))),
    }


spans = st.lists(st.tuples(decisions(), st.integers(1, 12), ticks(1, 200)), min_size=1, max_size=6)


def compare(state: State, reference: Reference) -> None:
    """Asserts that both stand at the same point, to the last bit."""
    scheduler = state.scheduler[0]
    assert scheduler["now_s"] == reference.now_s
    assert scheduler["iterations"] == reference.iterations
    mine = state.requests[: len(reference.requests)]
    known = mine["status"] != FUTURE
    for name in PER_REQUEST:
        theirs = np.array([getattr(request, name) for request in reference.requests])
        assert mine[name][known].tolist() == theirs[known].tolist(), name
    assert (mine["status"] == FUTURE).tolist() == [request.status == FUTURE for request in reference.requests]
    assert mine["cached"][known].tolist() == [r.cached for r, k in zip(reference.requests, known, strict=True) if k]
    numbers = state.running[: scheduler["running"]].tolist()
    assert numbers == [request.number for request in reference.running]
    batch = state.batch[0]
    if reference.batch.chunks:
        assert batch["prefill_tokens"] + batch["decode_sequences"] == sum(n for _, n in reference.batch.chunks)
    assert (scheduler["free_blocks"], scheduler["empty_blocks"]) == (reference.cache.free, reference.cache.empty)
    assert scheduler["host_free_blocks"] == reference.host_free
    totals = (scheduler["busy_s"], scheduler["kv_block_s"], scheduler["recomputed_tokens"])
    assert totals == (reference.busy_s, reference.kv_block_s, reference.recomputed)
    assert scheduler["swapped_tokens"] == reference.swapped
    assert state.classes["found_prompt"].tolist() == reference.found_prompt
    assert state.classes["admitted_prompt"].tolist() == reference.admitted_prompt
    assert state.classes["evicted_blocks"].tolist() == reference.cache.evicted
    assert known_blocks(state) == {
        (key if key[0] >= 0 else (own_origin(state, -1 - key[0]), key[1])): block.deferred
        for key, block in reference.cache.known.items()
    }
    assert tier_blocks(state) == {
        (key if key[0] >= 0 else (own_origin(state, -1 - key[0]), key[1])): kept.deferred
        for key, kept in reference.cache.tier.kept.items()
    }
    assert state.tenants["service"].tolist() == reference.service
    for group, totals_of_class in zip(state.classes, reference.totals, strict=True):
        for name in PER_CLASS:
            assert group[name] == getattr(totals_of_class, name), name
    bins = np.searchsorted(itl_bin_edges(), reference.itls_s, side="right") - 1
    assert np.array_equal(state.itl_histogram, np.bincount(bins, minlength=len(state.itl_histogram)))


def known_blocks(state: State) -> dict[tuple[int, int], bool]:
    """All blocks of the prefix cache, and whether they are kept for deferred work."""
    blocks = {}
    for n in cache_nodes(state):
        node = state.nodes[n]
        for b in range(node["first"], node["first"] + node["blocks"]):
            blocks[int(node["origin"]), int(b)] = bool(node["owner"] == DEFERRED)
    return blocks


def own_origin(state: State, r: int) -> int:
    """What the part of request r is known by that it shares with nobody."""
    return int(state.requests["own_origin"][r])


def rescore_some(run: ToyRun, reference: Reference, data: st.DataObject) -> None:
    """Gives some requests new scores, the same to both."""
    for request in reference.requests:
        if request.status in (WAITING, RUNNING) and data.draw(st.booleans()):
            request.score = float(data.draw(st.integers(0, 3)))
            rescore(run.state, request.number, request.score)


@settings(deadline=None, max_examples=120)
@given(engines(), traces(), spans, st.data())
def test_every_iteration_is_the_one_the_rules_give(
    engine: EngineProfile, trace: Trace, steps: list[tuple[dict[str, float], int, float]], data: st.DataObject
) -> None:
    run = ToyRun(engine, trace)
    reference = Reference(engine.values, trace.rows, trace.num_tenants, trace.contents)
    compare(run.state, reference)
    for changes, iterations, until in steps:
        rescore_some(run, reference, data)
        for i in range(iterations):
            changes = {**changes, "preempt_count": changes["preempt_count"] if i == 0 else 0}
            horizon = run.now_s + until
            run.decide(**changes)
            run.advance(horizon, 1)
            reference.advance(decision_with(**changes), horizon, 1)
            compare(run.state, reference)
            check_invariants(run.state)


@settings(deadline=None, max_examples=120)
@given(engines(), traces(), spans)
def test_whole_stretches_end_where_the_rules_lead(
    engine: EngineProfile, trace: Trace, steps: list[tuple[dict[str, float], int, float]]
) -> None:
    run = ToyRun(engine, trace)
    reference = Reference(engine.values, trace.rows, trace.num_tenants, trace.contents)
    for changes, _, until in steps:
        horizon = run.now_s + until
        run.decide(**changes)
        run.advance(horizon)
        reference.advance(decision_with(**changes), horizon, 10**9)
        compare(run.state, reference)
        check_invariants(run.state)


@st.composite
def long_traces(draw: st.DrawFn) -> Trace:
    """Requests with outputs long enough to fast-forward through."""
    several = []
    for _ in range(draw(st.integers(1, 8))):
        kind = draw(st.sampled_from((immediate, deferred)))
        promise = draw(st.sampled_from(PROMISES if kind is immediate else ("window_s",)))
        promised_s = draw(st.floats(0.01, 5.0))
        prompt, output = draw(st.integers(1, 60)), draw(st.integers(1, 90))
        several.append(kind(draw(st.floats(0, 2)), prompt, output, **{promise: promised_s}))
    return toy_trace(*several)


# What the last plan took stock of: the next plan sets it anew, and an iteration fast-forwarded has no plan.
OF_ONE_PLAN = ("work", "work_totals", "immediate_target_s", "deferred_target_s", "deferred_floor")


def assert_equal_states(one: State, other: State) -> None:
    """Asserts that all arrays agree in every bit."""
    for name, mine, theirs in zip(State._fields, one, other, strict=True):
        for column in mine.dtype.names or (None,):
            if name in OF_ONE_PLAN or column in OF_ONE_PLAN:
                continue
            a, b = (mine, theirs) if column is None else (mine[column], theirs[column])
            assert np.array_equal(a, b), f"{name}.{column}"


@settings(deadline=None, max_examples=150)
@given(
    long_traces(),
    st.lists(st.tuples(decisions(preempt=False, by_return=True), st.floats(0.01, 3.0)), min_size=1, max_size=4),
    st.sampled_from((0.0, 0.1)),
    st.integers(3, 8),
    st.integers(12, 60),
    st.integers(0, 1),
    st.sampled_from((0, 10)),
)
def test_fast_forward_changes_no_bit(
    trace: Trace,
    steps: list[tuple[dict[str, float], float]],
    noise: float,
    seats: int,
    blocks: int,
    caching: int,
    tier: int,
) -> None:
    engine = toy_engine(
        base_s=0.0071, per_token_s=0.00013, per_context_s=1.7e-6, per_sequence_s=3e-6, mixed_s=0.0003, noise=noise,
        kv_blocks=blocks, block_size=8, max_running=seats, max_model_len=200, prefix_caching=caching,
        host_cache_blocks=tier, per_swap_token_s=3e-5,
    )  # fmt: skip
    at_once, one_by_one = ToyRun(engine, trace, seed=7), ToyRun(engine, trace, seed=7)
    for changes, span_s in steps:
        horizon = at_once.now_s + span_s
        at_once.decide(**changes)
        at_once.advance(horizon)
        one_by_one.decide(**changes)
        while one_by_one.now_s < horizon:
            one_by_one.advance(horizon, 1)
        assert_equal_states(at_once.state, one_by_one.state)


def test_fast_forward_is_taken() -> None:
    """The comparison above compares something: most iterations of a long decode are not planned one by one."""
    run = ToyRun(toy_engine(), toy_trace(immediate(0, 4, 24)))
    run.advance(1.0)
    planned_s = run.state.requests["first_token_s"][0]
    assert run.iterations == 24 and run["last_token_s"][0] > planned_s
    assert run.total("output_done") == 24
    assert (run.state.classes["arrived"][IMMEDIATE], run.state.classes["arrived"][DEFERRED]) == (1, 0)
