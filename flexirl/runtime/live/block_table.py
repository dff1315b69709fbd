"""Which blocks of the cache hold a request's keys and values: the scheduler's counts, made physical.

The scheduler counts blocks. After it has planned, `reconcile` hands out block numbers that agree with its counts: a
request keeps the blocks it had as far as the counts go, and what it gained comes from those that nobody needs. Going by
the outcome of a plan and not by its steps keeps numbers out of the scheduler, where the surrogate would pay for them,
and is no less exact: what the scheduler counts as cached is kept here as well, so it really is still there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flexirl.compiled import compiled
from flexirl.runtime.scheduler.state import RUNNING, WAITING, State


class BlockTable(NamedTuple):
    """R requests, B blocks, W blocks of the longest sequence."""

    blocks: np.ndarray  # int32, (R, W): the blocks of each request in order; pages never used take no memory
    held: np.ndarray  # int32, (R,): how many of them it holds
    holders: np.ndarray  # int32, (R,): the requests that hold any
    free: np.ndarray  # int32, (B,): blocks that nobody holds, as a stack
    counts: np.ndarray  # int64, (2,): holders, free blocks
    swapped: np.ndarray  # bool, (R,): keys and values are in host memory


def new_block_table(max_requests: int, num_blocks: int, longest: int) -> BlockTable:
    """A table in which all blocks are free; longest: blocks of the longest sequence."""
    return BlockTable(
        blocks=np.zeros((max_requests, longest), np.int32),
        held=np.zeros(max_requests, np.int32),
        holders=np.zeros(max_requests, np.int32),
        free=np.arange(num_blocks - 1, -1, -1, dtype=np.int32),
        counts=np.array([0, num_blocks]),
        swapped=np.zeros(max_requests, np.bool_),
    )


@compiled
def reconcile(state: State, table: BlockTable, swapped_out: np.ndarray, swapped_in: np.ndarray) -> tuple[int, int]:
    """Makes the table agree with the counts of the scheduler; call it after each `plan`, before anything is computed.

    Lists in `swapped_out` and `swapped_in` (int32, as long as the running list) the requests whose keys and values have
    to move, and returns how many there are of each. The blocks of a request swapped out are still named by its row, but
    may have been given to another, so they have to be copied before any other change to the cache.
    """
    requests = state.requests
    holders, free, out = 0, table.counts[1], 0
    for i in range(table.counts[0]):
        r = table.holders[i]
        request = requests[r]
        kept = 0
        if request.status == RUNNING:
            kept = request.kv_blocks
        elif request.status == WAITING:
            kept = request.cached_blocks
            if request.host_blocks > 0 and not table.swapped[r]:
                table.swapped[r] = True
                swapped_out[out] = r
                out += 1
        for b in range(kept, table.held[r]):
            table.free[free] = table.blocks[r, b]
            free += 1
        table.held[r] = min(table.held[r], kept)
        if table.held[r] > 0:
            table.holders[holders] = r
            holders += 1
    back = 0
    for i in range(state.scheduler[0].running):
        r = state.running[i]
        needed = requests[r].kv_blocks
        if table.held[r] == 0 and needed > 0:
            table.holders[holders] = r
            holders += 1
        for b in range(table.held[r], needed):
            free -= 1
            table.blocks[r, b] = table.free[free]
        table.held[r] = max(table.held[r], needed)
        if table.swapped[r]:
            table.swapped[r] = False
            swapped_in[back] = r
            back += 1
    table.counts[0] = holders
    table.counts[1] = free
    return out, back


def check_blocks(state: State, table: BlockTable) -> None:
    """Raises AssertionError unless every block is held once or free once and every request holds what it should.

    For tests, right after `reconcile`.
    """
    holders, free = (int(count) for count in table.counts)
    listed = table.holders[:holders].tolist()
    assert sorted(listed) == np.flatnonzero(table.held).tolist(), "holders and held blocks disagree"
    owned = [table.blocks[r, : table.held[r]] for r in listed]
    everything = np.concatenate([*owned, table.free[:free]])
    assert sorted(everything.tolist()) == list(range(len(table.free))), "a block is held twice or lost"
    requests = state.requests
    running = requests["status"] == RUNNING
    assert (table.held[running] == requests["kv_blocks"][running]).all(), "a running request holds too few blocks"
    waiting = requests["status"] == WAITING
    assert (table.held[waiting] == requests["cached_blocks"][waiting]).all(), "cached blocks were given away"
    assert not table.held[~running & ~waiting].any(), "an ended request holds blocks"
    assert (table.swapped[waiting] == (requests["host_blocks"][waiting] > 0)).all(), "swapped requests are miscounted"
    assert not table.swapped[~waiting].any(), "a request that does not wait is swapped out"
