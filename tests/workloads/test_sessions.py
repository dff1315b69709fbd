"""Sessions and files: what is said again is marked as such, waits for its answer, and costs what the load says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from flexirl.errors import UserError
from flexirl.workloads.arrivals import Poisson
from flexirl.workloads.config import from_config
from flexirl.workloads.files import Files, Kind
from flexirl.workloads.lengths import Fixed, Lognormal, Uniform
from flexirl.workloads.scenario import RANDOM_STREAMS, Rngs, Tenants
from flexirl.workloads.sessions import Pause, Sessions, Several
from flexirl.workloads.trace import Trace, check

DURATION_S = 2000.0


def service_s(rows: np.ndarray) -> NDArray[np.float64]:
    """Seconds of an engine that computes 1,000 tokens a second, of a prompt those that are not cached."""
    return (rows["prompt_tokens"] - rows["prefix_tokens"] + rows["output_tokens"]) / 1000.0


def rngs(seed: int) -> Rngs:
    """The random streams of an episode."""
    return {name: np.random.default_rng([seed, number]) for number, name in enumerate(RANDOM_STREAMS)}


def sessions(**changes: object) -> Sessions:
    """Conversations of about five turns."""
    return replace(
        Sessions(
            Poisson(), Uniform(1, 9), Uniform(10, 200), Uniform(5, 100), Lognormal((3.0,), (0.5,)), Pause(20.0, 0.5),
            load=0.5, system=Uniform(50, 150), most_tokens=4000, tenants=Tenants(3, 1.0),
        ),
        **changes,
    )  # fmt: skip


def words(trace: Trace, number: int) -> list[tuple[int, int]]:
    """What a prompt says, token by token: of each the stretch that it belongs to; its own ones are like no other's."""
    row = trace.rows[number]
    first, count = int(row["content_first"]), int(row["content_count"])
    said: list[tuple[int, int]] = []
    for content in trace.contents[first : first + count]:
        said += [(int(content["origin"]), position) for position in range(len(said), int(content["end"]))]
    said += [(-number - 1, position) for position in range(len(said), int(row["prompt_tokens"]))]
    return said[: int(row["prompt_tokens"])]


def endless(trace: Trace) -> list[int]:
    """Tokens of each prompt that a cache without end has when nobody waits for an answer: a set of all beginnings."""
    seen: set[tuple[int, int]] = set()
    found = []
    for number, row in enumerate(trace.rows):
        said = words(trace, number)
        known = 0
        while known < len(said) and said[known] in seen:
            known += 1
        found.append(known)
        first, count = int(row["content_first"]), int(row["content_count"])
        longest = int(row["prompt_tokens"] + row["output_tokens"])
        for content in trace.contents[first : first + count]:
            said += [(int(content["origin"]), p) for p in range(len(said), min(int(content["end"]), longest))]
        seen.update(said)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_a_turn_says_all_that_was_said_and_waits_for_the_answer(seed: int) -> None:
    trace = sessions().draw(DURATION_S, service_s, rngs(seed))
    check(trace.rows, "sessions")
    assert (np.diff(trace.rows["arrival_s"]) >= 0).all() and 0 <= trace.rows["arrival_s"][0] < DURATION_S
    follows = np.flatnonzero(trace.rows["follows"])
    assert len(follows) > len(trace) / 2
    for r in follows.tolist():
        before, row = trace.rows[r - trace.rows["follows"][r]], trace.rows[r]
        said = before["prompt_tokens"] + before["output_tokens"]
        assert row["prefix_tokens"] == said < row["prompt_tokens"] and row["tenant"] == before["tenant"]
        assert words(trace, r)[: before["prompt_tokens"]] == words(trace, r - int(row["follows"]))
        answered_s = before["arrival_s"] + 0.02 * before["output_tokens"]
        assert row["arrival_s"] == pytest.approx(answered_s + row["delay_s"]) and row["delay_s"] > 0


def test_prefix_tokens_are_what_a_cache_without_end_has() -> None:
    trace = sessions().draw(DURATION_S, service_s, rngs(4))
    found = np.array(endless(trace))
    wrong = np.flatnonzero(found != trace.rows["prefix_tokens"])
    # The first of each tenant finds no system prompt yet.
    assert set(wrong.tolist()) <= {int(np.argmax(trace.rows["tenant"] == tenant)) for tenant in range(3)}


@pytest.mark.parametrize("load", [0.1, 1.0])
def test_load_is_that_of_the_episode(load: float) -> None:
    """Sessions that began earlier go on in it, so that there are as many at its beginning as at its end."""
    stream = sessions(load=load)
    parts = np.zeros(4)
    for seed in range(30):
        trace = stream.draw(DURATION_S, service_s, rngs(seed))
        parts += np.histogram(trace.rows["arrival_s"], 4, (0, DURATION_S), weights=service_s(trace.rows))[0]
    parts /= 30 * DURATION_S / 4
    assert parts[1:] == pytest.approx(load, rel=0.1)
    assert load < parts[0] < 1.25 * load  # what was said before the episode is computed once more


def test_a_session_ends_before_it_is_too_long() -> None:
    trace = sessions(turns=Fixed(60), most_tokens=1000).draw(DURATION_S, service_s, rngs(0))
    assert (trace.rows["prompt_tokens"] + trace.rows["output_tokens"] <= 1000).all()
    assert trace.rows["prompt_tokens"].max() > 900


def test_what_different_streams_say_is_never_the_same() -> None:
    both = Several((sessions(), sessions())).draw(DURATION_S, service_s, rngs(0))
    origins = [
        set(both.contents["origin"][f : f + n].tolist()) for f, n in both.rows[["content_first", "content_count"]]
    ]
    assert len(both) > 100 and max(len(o) for o in origins) > 3
    parts = {origin >> 52 for some in origins for origin in some}
    assert parts == {0, 1} and all(len({origin >> 52 for origin in some}) == 1 for some in origins)


def files(**changes: object) -> Files:
    """Short and long answers."""
    kinds = {
        "classify": Kind(Uniform(50, 100), Uniform(10, 60), Uniform(1, 5), Uniform(10, 40)),
        "reason": Kind(Fixed(20), Uniform(10, 60), Uniform(200, 900), Fixed(5), share=0.5),
    }
    return replace(Files(kinds, 0.4, (100.0, 200.0), at_start=2), **changes)


def test_a_file_shares_its_instruction_and_has_its_own_lengths() -> None:
    trace = files(tenants=Tenants(3, 0.0)).draw(DURATION_S, service_s, rngs(1))
    check(trace.rows, "files")
    numbers = np.unique(trace.rows["content_first"])
    assert len(numbers) == len(trace.contents) > 20
    limits = set()
    for number in numbers:
        mine = trace.rows[trace.rows["content_first"] == number]
        for column in ("arrival_s", "window_s", "tenant", "max_tokens"):
            assert len(np.unique(mine[column])) == 1
        instruction = trace.contents["end"][number]
        assert mine["prefix_tokens"].tolist() == [0] + [instruction] * (len(mine) - 1)
        assert (mine["prompt_tokens"] > instruction).all() and (mine["output_tokens"] <= mine["max_tokens"]).all()
        limits.add(int(mine["max_tokens"][0]))
    assert len(limits) > 10
    assert (trace.rows["arrival_s"][:2] == 0).all()
    assert np.array(endless(trace)).tolist() == trace.rows["prefix_tokens"].tolist()


def test_files_ask_for_their_load() -> None:
    total_s = sum(service_s(files(at_start=0).draw(DURATION_S, service_s, rngs(seed)).rows).sum() for seed in range(60))
    assert total_s / (60 * DURATION_S) == pytest.approx(0.4, rel=0.1)


def test_a_mixture_is_read_from_a_configuration() -> None:
    length = {"kind": "fixed", "tokens": 10}
    stream = {
        "kind": "sessions", "arrivals": {"kind": "poisson"}, "turns": length, "first": length, "later": length,
        "output": length, "pause": {"median_s": 5.0},
    }  # fmt: skip
    node = {
        "name": "mixture", "duration_s": 500.0, "load": 0.6, "deferred": {"kind": "none"},
        "immediate": {"kind": "several", "parts": {"a": {**stream, "share": 2.0}, "b": stream}},
    }  # fmt: skip
    scenario = from_config(node)
    assert [part.load for part in scenario.immediate.parts] == pytest.approx([0.4, 0.2])
    for place, value, said in (
        ("share", -1.0, "positive number"),
        ("pause", {"median_s": 0.0}, "longer than 0 s"),
        ("turns", {"kind": "fixed", "tokens": 0}, "1 token or more"),
    ):
        with pytest.raises(UserError, match=said):
            from_config({**node, "immediate": {"kind": "several", "parts": {"a": {**stream, place: value}}}})
    with pytest.raises(UserError, match=r"workload\.load"):
        from_config({**node, "load": None})
