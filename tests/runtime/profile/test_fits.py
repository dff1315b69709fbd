"""One rule of what an engine can hold: what admission refuses is what load leaves out and what the tables report."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import ToyRun, immediate, toy_engine, toy_trace

from flexirl.runtime.profile.capacity import ServiceTime, in_words, shares_lost
from flexirl.runtime.profile.fits import fits, longest_sequence
from flexirl.runtime.scheduler.state import REJECTED


@pytest.mark.parametrize(
    ("limit", "blocks", "longest"), [(32, 8, 32), (24, 8, 24), (32, 5, 20), (2**31 - 1, 2**20, 2**22)]
)
def test_the_longest_sequence_is_the_models_or_a_whole_cache(limit: int, blocks: int, longest: int) -> None:
    assert longest_sequence(toy_engine(max_model_len=limit, kv_blocks=blocks).values) == longest


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=6),
    limit=st.integers(1, 40),
    blocks=st.integers(1, 12),
)
def test_admission_and_load_go_by_the_same_rule(lengths: list[tuple[int, int]], limit: int, blocks: int) -> None:
    engine = toy_engine(max_model_len=limit, kv_blocks=blocks)
    trace = toy_trace(*(immediate(0, prompt, output) for prompt, output in lengths))
    for asked in (trace, trace.within(longest_sequence(engine.values))):
        run = ToyRun(engine, asked)
        run.advance(iterations=1)
        refused = [status == REJECTED for status in run["status"]]
        assert (~fits(engine.values, asked.rows)).tolist() == refused
    # Of clients that ask for what is left, only prompts that leave no token are refused, and those are no load.
    assert (ServiceTime(engine)(trace.rows) == 0).tolist() == refused
    assert shares_lost(engine, trace.rows)["unservable"] == pytest.approx(np.mean(refused))


def test_a_cache_that_is_shorter_than_the_longest_output_of_a_file_refuses_nobody_who_fits() -> None:
    """`max_tokens` of a recorded request is the longest output in the file."""
    trace = toy_trace(immediate(0, 4, 2), immediate(0, 4, 28))
    trace.rows["max_tokens"] = 28
    engine = toy_engine(kv_blocks=5)  # 20 tokens
    run = ToyRun(engine, trace.within(longest_sequence(engine.values)))
    run.drain()
    assert run["generated"] == [2, 16]


def test_what_is_cut_costs_what_is_left_of_it() -> None:
    engine = toy_engine()  # 32 tokens
    whole, cut, never = (
        ServiceTime(engine)(toy_trace(immediate(0, *of)).rows)[0] for of in ((20, 12), (20, 50), (32, 1))
    )
    assert whole == cut > 0 == never


def test_shares_of_what_is_lost() -> None:
    engine = toy_engine()
    rows = toy_trace(immediate(0, 8, 8), immediate(0, 8, 8), immediate(0, 20, 50), immediate(0, 40, 8)).rows
    lost = shares_lost(engine, rows)
    seconds = ServiceTime(engine).if_held(rows)
    assert lost == {
        "unservable": 0.25,
        "unservable_work": pytest.approx(seconds[3] / seconds.sum()),
        "cut_short": 0.25,
    }
    said = in_words(lost, "the immediate requests")
    assert said[0].startswith("25.00% of the immediate requests (") and "never fit" in said[0]
    assert said[1].startswith("25.00% of the immediate requests end where")
    assert set(shares_lost(engine, rows[:0]).values()) == {0.0} and in_words(shares_lost(engine, rows[:2]), "x") == []
