"""What is learned about lengths, against a plain account of the same and against what was drawn."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import ToyRun, deferred, toy_engine, toy_trace

from flexirl.policies.interface.decision import SHORTEST
from flexirl.runtime.scheduler.lengths import forget_lengths, learn_length, predicted_tokens
from flexirl.runtime.scheduler.state import State, new_states
from flexirl.workloads.trace import CONTENT, DEFERRED

QUANTILES = (0.1, 0.5, 0.9)


def empty_state(contents: int = 0) -> State:
    return State(*(array[0] for array in new_states(1, toy_engine(), 4, 1, contents)))


class Plain:
    """The same by the book: every kind a list of all it has seen, fading aside."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, ...], list[int]] = defaultdict(list)

    @staticmethod
    def kinds(key: tuple[int, int, int, int, int]) -> list[tuple[int, ...]]:
        request_class, tenant, limit, beginning, prompt = key
        octave = math.floor(math.log2(prompt))
        return [
            (request_class,), (request_class, tenant, limit), (request_class, tenant, limit, beginning),
            (request_class, tenant, limit, beginning, octave),
        ]  # fmt: skip

    def learn(self, key: tuple[int, int, int, int, int], output: int) -> None:
        for kind in self.kinds(key):
            self.seen[kind].append(output)

    def below(self, key: tuple[int, int, int, int, int], generated: int, tokens: float) -> float:
        """The probability of an output of fewer than `tokens` tokens, if it is of more than `generated`."""
        return (self._below(key, tokens) - self._below(key, generated + 1)) / (1 - self._below(key, generated + 1))

    def _below(self, key: tuple[int, int, int, int, int], tokens: float) -> float:
        def in_bin(at: int) -> float:  # the share of a bin that lies below
            return min(max(4 * math.log2(tokens) - at, 0.0), 1.0)

        bins = math.floor(4 * math.log2(key[2])) + 1
        share = sum(in_bin(at) for at in range(bins)) / bins
        for kind in self.kinds(key):
            mine = [in_bin(math.floor(4 * math.log2(output))) for output in self.seen[kind]]
            share = (sum(mine) + 4 * share) / (len(mine) + 4)
        return share


keys = st.tuples(
    st.integers(0, 1),
    st.integers(0, 1),
    st.sampled_from((8, 9, 10, 11, 100, 3000)),
    st.integers(0, 2),
    st.integers(1, 5000),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(keys, st.floats(0, 1)), max_size=60), keys, st.floats(0, 1), st.sampled_from(QUANTILES))
def test_predictions_are_what_a_plain_account_says(
    ended: list[tuple[tuple[int, int, int, int, int], float]],
    asked: tuple[int, int, int, int, int],
    made: float,
    quantile: float,
) -> None:
    state, plain = empty_state(contents=3), Plain()
    state.contents[:] = np.array([(0, 64), (101, 64), (202, 64)], CONTENT)
    request = state.requests[:1]

    def fill(key: tuple[int, int, int, int, int], generated: int) -> None:
        request["request_class"], request["tenant"], request["max_tokens"], beginning, request["prompt_tokens"] = key
        request["content_first"], request["content_count"] = beginning, int(beginning > 0)
        request["generated"] = generated

    for key, share in ended:
        output = max(1, round(share * key[2]))
        fill(key, output)
        learn_length(state, 0)
        plain.learn(key, output)
    generated = round(made * (asked[2] - 1))
    fill(asked, generated)
    predicted = predicted_tokens(state, 0, quantile)
    assert generated < predicted <= asked[2]
    # It is cut to whole tokens, to one more than there are, and to the limit.
    if predicted < asked[2]:
        assert plain.below(asked, generated, predicted + 1) >= quantile - 1e-6
    if predicted > generated + 1:
        assert plain.below(asked, generated, predicted) <= quantile + 1e-6


def test_quantiles_of_many_outputs() -> None:
    """Within a bin, a factor of 1.19; also of those that have made 100 tokens already."""
    state, rng = empty_state(), np.random.default_rng(0)
    state.requests["max_tokens"], state.requests["prompt_tokens"] = 2000, 100
    outputs = np.clip(rng.lognormal(4.5, 0.8, 500).astype(int), 1, 2000)
    for output in outputs:
        state.requests["generated"][0] = output
        learn_length(state, 0)
    for generated in (0, 100):
        state.requests["generated"][0] = generated
        for quantile in QUANTILES:
            expected = np.quantile(outputs[outputs > generated], quantile)
            assert predicted_tokens(state, 0, quantile) == pytest.approx(expected, rel=0.19)
    # What was thought beforehand happened as often as it should: each tenth in 50 cases, 6.7 the standard deviation.
    assert state.length_tenths[0].sum() == pytest.approx(500)
    assert (np.abs(state.length_tenths[0] - 50) < 25).all()
    forget_lengths(state)
    assert not state.lengths["total"].any() and not state.length_tenths.any()


def test_what_changes_is_followed_and_shows_in_the_tenths() -> None:
    state = empty_state()
    state.requests["max_tokens"], state.requests["prompt_tokens"] = 4000, 100
    tenths = state.length_tenths[0]
    for output in (10, 1000):
        for _ in range(2000):
            state.requests["generated"][0] = output
            learn_length(state, 0)
        if output == 10:
            assert tenths == pytest.approx(np.full(10, 200), abs=10)
    state.requests["generated"][0] = 0
    assert predicted_tokens(state, 0, 0.5) == pytest.approx(1000, rel=0.19)
    assert tenths.sum() == pytest.approx(4000)
    assert tenths[9] > 500 and (np.diff(tenths) > 0).all()  # too many lay high


def test_more_kinds_than_there_is_room_for() -> None:
    """Those used least are forgotten; what is common stays known."""
    state = empty_state()
    state.requests["max_tokens"], state.requests["prompt_tokens"] = 500, 100
    for i in range(20_000):
        state.requests["tenant"][0] = 0 if i % 4 == 0 else i
        state.requests["generated"][0] = 7 if i % 4 == 0 else 300
        learn_length(state, 0)
    state.requests["tenant"][0] = state.requests["generated"][0] = 0
    assert predicted_tokens(state, 0, 0.5) == 7


@pytest.mark.parametrize("quantile", [0.0, 0.5])
def test_a_queue_is_sorted_by_what_is_learned(quantile: float) -> None:
    """Of two files whose prompts are alike, the one with short answers comes to go first, though it came last."""
    long = [deferred(0, 4, 12, max_tokens=14) for _ in range(40)]
    short = [deferred(0, 4, 2, max_tokens=13) for _ in range(40)]
    run = ToyRun(toy_engine(max_running=2), toy_trace(*long, *short))
    run.decide(deferred_order=SHORTEST, length_quantile=quantile)
    run.drain()
    began_s = run.state.requests["first_token_s"]
    first_half = np.argsort(began_s[: len(long) + len(short)], kind="stable")[:40]
    assert (first_half >= 40).sum() == (0 if quantile == 0 else pytest.approx(36, abs=4))
    assert run.state.classes["finished"][DEFERRED] == 80


def test_where_nothing_is_known_all_octaves_are_alike() -> None:
    state = empty_state()
    state.requests["max_tokens"] = 64
    assert predicted_tokens(state, 0, 0.5) == pytest.approx(math.sqrt(64 * 1.19), rel=0.2)  # half of the octaves
