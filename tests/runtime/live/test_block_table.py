"""Blocks after a million random steps: none held twice, none lost, and each still holds what it is taken to hold."""

from __future__ import annotations

import numba as nb
import numpy as np
import pytest
from toys import toy_engine

from flexirl.runtime.live.block_table import check_blocks, new_block_table
from flexirl.runtime.live.iteration import LiveState, finish, new_flat_batch, new_request_arrays, prepare
from flexirl.runtime.live.request_table import enter, leave
from flexirl.runtime.scheduler.commit import abandon, settle
from flexirl.runtime.scheduler.intake import cancel
from flexirl.runtime.scheduler.invariants import check_invariants
from flexirl.runtime.scheduler.plan import apply
from flexirl.runtime.scheduler.state import RUNNING, WAITING, State, new_states
from flexirl.runtime.simulator import surrogate
from flexirl.workloads.trace import DEFERRED, IMMEDIATE, empty_rows

PLACES, BLOCKS, BLOCK_SIZE, LONGEST = 24, 20, 4, 48


@nb.njit(cache=True)
def decide_anything(state: State) -> None:
    """A random decision, put in force."""
    decision = state.decision[0]
    decision.discipline = np.random.randint(3)
    decision.decodes_first = np.random.randint(2)
    decision.immediate_order = np.random.randint(3)
    decision.deferred_order = np.random.randint(3)
    decision.victim = np.random.randint(4)
    decision.preemption = np.random.randint(3)
    decision.preempt_for_immediate = np.random.randint(2)
    decision.token_budget = 1 + np.random.randint(16)
    decision.preempt_count = max(np.random.randint(6) - 3, 0)
    decision.deferred_kv_share = 0.5 + 0.5 * np.random.randint(2)
    apply(state)


@nb.njit(cache=True)
def storm(live: LiveState, rows: np.ndarray) -> np.ndarray:
    """Runs a million random steps with a cache whose slots say whose token they hold; returns counts.

    Counts: swapped out, swapped in, preempted, abandoned, cancelled, iterations; then errors: stale or foreign slots,
    blocks held twice, blocks lost.
    """
    np.random.seed(0)
    state, table, flat = live.state, live.table, live.flat
    content = np.full((BLOCKS * BLOCK_SIZE, 2), -1)  # whose token, at which position
    on_host = np.full((PLACES, LONGEST, 2), -1)
    owner = np.full(PLACES, -1)
    is_end = np.zeros(4, np.bool_)
    counts = np.zeros(9, np.int64)
    arrivals = 0
    for step in range(1_000_000):
        if step % 4 == 0:
            decide_anything(state)
        r = np.random.randint(PLACES)
        request = state.requests[r]
        if request.status != WAITING and request.status != RUNNING:
            leave(state, r)
            table.swapped[r] = False
            arrivals += 1
            owner[r] = arrivals
            rows[0].arrival_s = state.scheduler[0].now_s
            rows[0].request_class = np.random.randint(2)
            rows[0].ttft_slo_s = 0.1 if np.random.random() < 0.5 else np.inf
            rows[0].prompt_tokens = 1 + np.random.randint(LONGEST // 2)
            rows[0].output_tokens = 1 + np.random.randint(LONGEST // 2)
            rows[0].max_tokens = rows[0].output_tokens
            enter(state, r, rows)
        elif np.random.random() < 0.05:
            counts[4] += 1
            cancel(state, r)
        before = state.classes[0].preemptions + state.classes[1].preemptions
        n, tokens, widest, sampled, out, back, _, _, _ = prepare(live, 0)
        counts[2] += state.classes[0].preemptions + state.classes[1].preemptions - before
        counts[0] += out
        counts[1] += back
        for i in range(out):
            r = flat.swapped_out[i]
            for position in range(state.requests[r].computed):
                slot = table.blocks[r, position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
                on_host[r, position] = content[slot]
        for i in range(back):
            r = flat.swapped_in[i]
            for position in range(state.requests[r].computed):
                slot = table.blocks[r, position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
                content[slot] = on_host[r, position]
        holders = np.zeros(BLOCKS, np.int64)
        for r in range(PLACES):
            for b in range(table.held[r]):
                holders[table.blocks[r, b]] += 1
        for i in range(table.counts[1]):
            holders[table.free[i]] += 1
        counts[7] += (holders > 1).sum()
        counts[8] += (holders == 0).sum()
        row = 0
        for i in range(n):
            r = flat.requests[i]
            for j in range(flat.query_lens[i]):
                content[flat.slots[row + j], 0] = owner[r]
                content[flat.slots[row + j], 1] = flat.positions[row + j]
            row += flat.query_lens[i]
            for position in range(flat.context_lens[i]):
                slot = flat.blocks[i * widest + position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
                counts[6] += content[slot, 0] != owner[r] or content[slot, 1] != position
        if tokens == 0:
            state.scheduler[0].now_s += 0.01
            settle(state)
        elif np.random.random() < 0.1:
            counts[3] += 1
            abandon(state, 0.005)
        else:
            counts[5] += 1
            for i in range(sampled):
                flat.stops[i] = np.random.random() < 0.02
            finish(live, np.zeros(sampled, np.int64), is_end, 0.01)
    return counts


@pytest.mark.parametrize("caching", [0, 1])
def test_blocks_are_exact_after_a_million_steps(caching: int) -> None:
    engine = toy_engine(
        kv_blocks=BLOCKS, block_size=BLOCK_SIZE, host_kv_blocks=12, max_running=6, max_tokens_per_step=16,
        max_model_len=LONGEST, prefix_caching=caching,
    )  # fmt: skip
    state = State(*(array[0] for array in new_states(1, engine, PLACES, 1)))
    surrogate.start(state, empty_rows(0), np.zeros(0, np.int32), 0)
    longest = LONGEST // BLOCK_SIZE
    table, arrays = new_block_table(PLACES, BLOCKS, longest), new_request_arrays(PLACES, LONGEST)
    live = LiveState(state, table, arrays, new_flat_batch(engine, longest))
    counts = storm(live, empty_rows(1))
    swapped_out, swapped_in, preempted, abandoned, cancelled, iterations, *errors = counts.tolist()
    assert errors == [0, 0, 0], "a block is stale, held twice or lost"
    assert min(swapped_out, swapped_in, preempted, abandoned, cancelled) > 5_000 and iterations > 500_000
    check_invariants(state, reused=True)
    for r in range(PLACES):
        cancel(state, r)
    table.swapped[:] = False
    prepare(live, 0)
    check_blocks(state, table)
    assert table.counts.tolist() == [0, BLOCKS] and state.scheduler["free_blocks"][0] == BLOCKS
    assert not np.isin(state.requests["status"], (WAITING, RUNNING)).any()
    assert state.classes["arrived"][IMMEDIATE] > 1000 and state.classes["arrived"][DEFERRED] > 1000
