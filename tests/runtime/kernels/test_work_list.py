"""The plan covers every query token's context exactly once and spreads it evenly."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexirl.runtime.kernels.work_list import (
    LONG_POSITION,
    LONG_START,
    MIN_SPLIT,
    SHORT_START,
    SPLIT_ALIGN,
    WorkList,
    pad_decodes,
    plan_work,
    tile_rows,
)

sequences = st.lists(
    st.tuples(st.one_of(st.just(1), st.integers(1, 300)), st.integers(0, 3000)).map(lambda s: (s[0], s[0] + s[1])),
    min_size=1,
    max_size=12,
)
groups = st.sampled_from([1, 3, 4, 7, 8, 32])
slots = st.integers(1, 200)


def plan(batch: list[tuple[int, int]], group: int, at_once: float) -> WorkList:
    query_lens, context_lens = np.array(batch).T
    return plan_work(query_lens, context_lens, group, at_once)


def item_costs(work: WorkList, group: int) -> list[float]:
    """Costs as the file defines them, from the items alone."""
    costs = []
    for _, _, tokens, _, begin, end, *_ in work.items.tolist():
        short = tokens * group <= tile_rows(group)[0]
        costs.append(SHORT_START + end - begin if short else LONG_START + LONG_POSITION * (end - begin))
    return costs


def makespan(costs: list[float], programs: int) -> float:
    """When the last program ends if each takes the next item of the list as soon as it is free."""
    free = [0.0] * programs
    for cost in costs:
        heapq.heapreplace(free, free[0] + cost)
    return max(free)


@settings(deadline=None, max_examples=60)
@given(sequences, groups, slots)
def test_every_context_is_covered_exactly_once(batch: list[tuple[int, int]], group: int, at_once: int) -> None:
    work = plan(batch, group, at_once)
    first = np.cumsum([0] + [query for query, _ in batch])
    seen = [np.zeros((query, context), int) for query, context in batch]
    for sequence, token, tokens, position, begin, end, _, _ in work.items.tolist():
        query, context = batch[sequence]
        row = token - first[sequence]
        assert 0 <= row < query and tokens >= 1 and position == context - query + row
        assert begin % SPLIT_ALIGN == 0 and begin < end <= position + tokens
        seen[sequence][row : row + tokens, begin:end] += 1
    for (query, context), counts in zip(batch, seen, strict=True):
        visible = np.arange(context) <= np.arange(context - query, context)[:, None]
        assert (counts[visible] == 1).all() and counts.max() == 1


@settings(deadline=None, max_examples=60)
@given(sequences, groups, slots)
def test_every_split_token_is_merged_from_its_own_rows(batch: list[tuple[int, int]], group: int, at_once: int) -> None:
    work = plan(batch, group, at_once)
    token_of_row: dict[int, int] = {}
    direct: list[int] = []
    for _, token, tokens, _, _, _, partial, _ in work.items.tolist():
        for i in range(tokens):
            if partial < 0:
                direct.append(token + i)
            else:
                assert partial + i not in token_of_row
                token_of_row[partial + i] = token + i
    assert sorted(token_of_row) == list(range(work.partial_rows))
    merged = []
    for token, first, stride, splits in work.merges.tolist():
        rows = [first + k * stride for k in range(splits)]
        assert splits > 1 and rows == sorted(row for row, of in token_of_row.items() if of == token)
        merged.append(token)
    assert sorted(direct + merged) == list(range(sum(query for query, _ in batch)))


@settings(deadline=None, max_examples=100)
@given(sequences, groups, slots)
def test_no_program_is_left_with_much_more_than_its_share(
    batch: list[tuple[int, int]], group: int, at_once: int
) -> None:
    whole = plan(batch, group, 1e-9)
    assert len(whole.merges) == 0
    ideal = sum(item_costs(whole, group)) / at_once
    costs = item_costs(plan(batch, group, at_once), group)
    starts = (0.5 * LONG_START * ideal) ** 0.5
    largest = LONG_START + max(MIN_SPLIT, (2.0 * LONG_START * ideal) ** 0.5) + 2 * SPLIT_ALIGN * LONG_POSITION
    assert makespan(costs, at_once) <= ideal + starts + largest


@pytest.mark.parametrize("beside", [[], [(512, 512)], [(2048, 4096)]])
def test_a_long_decode_is_spread_whatever_is_beside_it(beside: list[tuple[int, int]]) -> None:
    programs = 33
    batch = [(1, 32_768), (1, 100), *beside]
    costs = item_costs(plan(batch, 4, programs), 4)
    unsplit = item_costs(plan(batch, 4, 1e-9), 4)
    ideal = sum(unsplit) / programs
    assert makespan(costs, programs) < 1.6 * ideal < makespan(unsplit, programs)


def test_kinds_are_in_step() -> None:
    """After any share of the list, about that share of the cost of each kind is done."""
    work = plan([(1, 2000)] * 60 + [(1024, 1024)], 4, 33)
    costs = np.array(item_costs(work, 4))
    long = work.items[:, 2].numpy() * 4 > 16
    assert work.short and work.long and 20 < long.sum() < len(long)
    progress = [np.cumsum(np.where(kind, costs, 0)) / costs[kind].sum() for kind in (long, ~long)]
    assert np.abs(progress[0] - progress[1]).max() < 0.1


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=20), groups, st.integers(1, 300))
def test_padded_decodes_have_one_shape(contexts: list[int], group: int, at_once: int) -> None:
    shapes = set()
    for lens in (contexts, [1] * len(contexts), [5000] * len(contexts)):
        work = plan([(1, context) for context in lens], group, at_once)
        padded = pad_decodes(work, len(lens), 5000, at_once)
        assert padded.items[: len(work.items)].equal(work.items) and not padded.items[len(work.items) :].any()
        assert padded.merges[: len(work.merges)].equal(work.merges) and not padded.merges[len(work.merges) :].any()
        assert padded.partial_rows >= work.partial_rows
        shapes.add((padded.items.shape, padded.merges.shape, padded.partial_rows))
    assert len(shapes) == 1
