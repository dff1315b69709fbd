"""Blocks after a million random steps, shared, swapped and given up: each still holds what it is taken to hold."""

from __future__ import annotations

import numba as nb
import numpy as np
import pytest
from toys import toy_engine

from flexirl.runtime.live.iteration import LiveState, finish, new_flat_batch, new_request_arrays, prepare, take_in
from flexirl.runtime.live.request_table import leave
from flexirl.runtime.live.swaps import new_swaps, note_swaps
from flexirl.runtime.scheduler.commit import abandon, settle
from flexirl.runtime.scheduler.intake import cancel
from flexirl.runtime.scheduler.invariants import check_invariants
from flexirl.runtime.scheduler.plan import apply
from flexirl.runtime.scheduler.state import RUNNING, WAITING, State, new_states
from flexirl.runtime.simulator import surrogate
from flexirl.workloads.trace import DEFERRED, IMMEDIATE, empty_rows

PLACES, BLOCKS, BLOCK_SIZE, LONGEST = 24, 20, 4, 48


@nb.njit
def decide_anything(state: State) -> None:
    """A random decision, put in force."""
    decision = state.decision[0]
    decision.discipline = np.random.randint(3)
    decision.decodes_first = np.random.randint(2)
    decision.immediate_order = np.random.randint(3)
    decision.deferred_order = np.random.randint(3)
    decision.victim = np.random.randint(5)
    decision.preemption = np.random.randint(3)
    decision.to_host = np.random.randint(3)
    decision.by_return = np.random.randint(2)
    decision.preempt_for_immediate = np.random.randint(2)
    decision.token_budget = 1 + np.random.randint(16)
    decision.preempt_count = max(np.random.randint(6) - 3, 0)
    decision.deferred_kv_share = 0.5 + 0.5 * np.random.randint(2)
    decision.deferred_cache_share = 0.5 * np.random.randint(3)
    decision.immediate_cache_share = 0.25 * np.random.randint(2)
    apply(state)


@nb.njit
def seed_storm(seed: int) -> None:
    """Seeds the generator of compiled code."""
    np.random.seed(seed)


@nb.njit
def new_request(state: State, tokens: np.ndarray, row: np.void, number: int) -> None:
    """A request that begins like others of its family and goes on like none."""
    row.arrival_s = state.scheduler[0].now_s
    row.request_class = np.random.randint(2)
    row.ttft_slo_s = 0.1 if np.random.random() < 0.5 else np.inf
    row.prompt_tokens = 1 + np.random.randint(LONGEST // 2)
    row.output_tokens = 1 + np.random.randint(LONGEST // 2)
    row.max_tokens = row.output_tokens
    family, alike = np.random.randint(3), np.random.randint(LONGEST // 2)
    for i in range(row.prompt_tokens):
        tokens[i] = family if i < alike else number


@nb.njit
def storm(
    live: LiveState,
    rows: np.ndarray,
    content: np.ndarray,
    on_host: np.ndarray,
    in_tier: np.ndarray,
    counts: np.ndarray,
    steps: int,
) -> None:
    """Runs random steps with a cache whose slots say what they hold: a checksum of all tokens up to there.

    Adds to counts: swapped out, swapped in, preempted, abandoned, cancelled, iterations, stale or foreign slots, blocks
    copied to the host tier and back.
    """
    state, arrays, flat = live.state, live.arrays, live.flat
    is_end = np.zeros(4, np.bool_)
    sums = np.zeros(LONGEST + 1, np.int64)
    for step in range(steps):
        for _ in range(1 + np.random.randint(2) if step % 4 == 0 else 0):
            decide_anything(state)
            note_swaps(state, live.swaps)
        r = np.random.randint(PLACES)
        request = state.requests[r]
        if request.status != WAITING and request.status != RUNNING:
            leave(state, r)
            live.swaps.swapped[r] = False
            new_request(state, arrays.tokens[r], rows[0], 100 + counts.sum())
            take_in(live, r, rows)
        elif np.random.random() < 0.05:
            counts[4] += 1
            cancel(state, r)
        before = state.classes[0].preemptions + state.classes[1].preemptions
        n, tokens, widest, sampled, out, back, _, copies, _, _ = prepare(live, 0)
        counts[2] += state.classes[0].preemptions + state.classes[1].preemptions - before
        counts[0] += out
        counts[1] += back
        for i in range(out):
            r = flat.swapped_out[i]
            blocks = state.block_rows[live.swaps.rows[r]]
            for position in range(state.requests[r].computed):
                on_host[r, position] = content[blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE]
        for copy in state.copies[:copies]:
            slots = content[copy.device * BLOCK_SIZE : (copy.device + 1) * BLOCK_SIZE]
            if copy.to_tier:
                in_tier[copy.tier] = slots
            else:
                slots[:] = in_tier[copy.tier]
            counts[8 - copy.to_tier] += 1
        for i in range(back):
            r = flat.swapped_in[i]
            blocks = state.block_rows[state.requests[r].row]
            for position in range(state.requests[r].computed):
                content[blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE] = on_host[r, position]
        row = 0
        for i in range(n):
            r = flat.requests[i]
            for position in range(flat.context_lens[i]):
                sums[position + 1] = sums[position] * 6364136223846793005 + arrays.tokens[r, position] + 1
            for j in range(flat.query_lens[i]):
                content[flat.slots[row + j]] = sums[flat.positions[row + j] + 1]
            row += flat.query_lens[i]
            for position in range(flat.context_lens[i]):
                slot = flat.blocks[i * widest + position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
                counts[6] += content[slot] != sums[position + 1]
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
            finish(live, np.random.randint(0, 2, sampled), is_end, 0.01)


@pytest.mark.parametrize(("caching", "tier"), [(0, 0), (1, 0), (1, 10)])
def test_blocks_are_exact_after_a_million_steps(caching: int, tier: int) -> None:
    engine = toy_engine(
        kv_blocks=BLOCKS, block_size=BLOCK_SIZE, host_kv_blocks=12, max_running=6, max_tokens_per_step=16,
        max_model_len=LONGEST, prefix_caching=caching, host_cache_blocks=tier,
    )  # fmt: skip
    longest = LONGEST // BLOCK_SIZE
    state = State(*(array[0] for array in new_states(1, engine, PLACES, 1, PLACES * longest, numbered=True)))
    surrogate.start(state, empty_rows(0), 0, 4.0)
    swaps, arrays = new_swaps(PLACES, len(state.running)), new_request_arrays(PLACES, LONGEST, longest)
    live = LiveState(state, swaps, arrays, new_flat_batch(engine, longest))
    content, on_host = np.full(BLOCKS * BLOCK_SIZE, -1), np.full((PLACES, LONGEST), -1)
    in_tier = np.full((tier, BLOCK_SIZE), -1)
    counts = np.zeros(9, np.int64)
    seed_storm(0)
    for _ in range(100):
        storm(live, empty_rows(1), content, on_host, in_tier, counts, 10_000)
        check_invariants(state, reused=True)
    swapped_out, swapped_in, preempted, abandoned, cancelled, iterations, errors, to_tier, back = counts.tolist()
    assert errors == 0, "a slot is stale or another's"
    assert min(swapped_out, swapped_in, preempted, abandoned, cancelled) > 5_000 and iterations > 500_000
    shared = state.classes["found_prompt"] / state.classes["admitted_prompt"]
    assert (shared > 0.05).all() if caching else not shared.any()
    assert (state.classes["evicted_blocks"] > 1_000 * caching).all() or not caching
    assert min(to_tier, back) > 5_000 if tier else to_tier == back == 0
    for r in range(PLACES):
        cancel(state, r)
    check_invariants(state, reused=True)
    assert state.scheduler["free_blocks"][0] == BLOCKS
    assert not np.isin(state.requests["status"], (WAITING, RUNNING)).any()
    assert state.classes["arrived"][IMMEDIATE] > 1000 and state.classes["arrived"][DEFERRED] > 1000
