"""Exact accounting of the paged KV cache, in blocks.

The scheduler counts blocks; which physical block a request gets is the executor's concern. With prefix caching on,
blocks of a preempted request stay readable until somebody else is given them, as in vLLM v1: free blocks form a queue,
oldest first, a request's last blocks ahead of its first ones, and a request that comes back takes up again what is
left of it. The queue is kept as a ring of segments (owner, blocks), and only while some waiting request could use it.
"""

from __future__ import annotations

import numba as nb

from flexirl.compiled import compiled
from flexirl.runtime.scheduler.state import State

NOBODY = -1


@nb.njit(cache=True, inline="always")
def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return (tokens + block_size - 1) // block_size


@compiled
def allocate(state: State, r: int, blocks: int) -> None:
    """Gives request r `blocks` free blocks; the caller has made sure that there are as many."""
    scheduler = state.scheduler[0]
    request = state.requests[r]
    scheduler.free_blocks -= blocks
    request.kv_blocks += blocks
    state.classes[request.request_class].kv_blocks += blocks
    if scheduler.cached_blocks > 0:
        _reallocate_oldest(state, blocks)


@compiled
def release(state: State, r: int, reusable_tokens: int) -> None:
    """Frees all blocks of request r; `reusable_tokens` of its sequence may be taken up again if it returns."""
    scheduler = state.scheduler[0]
    request = state.requests[r]
    blocks = request.kv_blocks
    reusable = reusable_tokens // state.engine[0].block_size if state.engine[0].prefix_caching else 0
    if reusable > 0 and scheduler.ring_count == 0 and scheduler.free_blocks > 0:
        _append(state, NOBODY, scheduler.free_blocks)
    if reusable > 0:
        request.cached_segment = _append(state, r, blocks)
        request.cached_blocks = reusable
        scheduler.cached_blocks += reusable
    elif scheduler.ring_count > 0 and blocks > 0:
        _append(state, NOBODY, blocks)
    scheduler.free_blocks += blocks
    state.classes[request.request_class].kv_blocks -= blocks
    request.kv_blocks = 0


@compiled
def trim(state: State, r: int, blocks: int) -> None:
    """Frees the blocks of request r beyond its first `blocks`, which hold nothing yet."""
    request = state.requests[r]
    surplus = request.kv_blocks - blocks
    if surplus <= 0:
        return
    if state.scheduler[0].ring_count > 0:
        _append(state, NOBODY, surplus)
    state.scheduler[0].free_blocks += surplus
    state.classes[request.request_class].kv_blocks -= surplus
    request.kv_blocks = blocks


@compiled
def reclaim(state: State, r: int) -> None:
    """Gives request r back the blocks of its own that nobody else was given."""
    request = state.requests[r]
    blocks = request.cached_blocks
    if blocks == 0:
        return
    # What it does not take up again, a partly filled last block, stays free.
    state.ring[request.cached_segment].blocks -= blocks
    forget(state, r)
    state.scheduler[0].free_blocks -= blocks
    request.kv_blocks += blocks
    state.classes[request.request_class].kv_blocks += blocks


@compiled
def forget(state: State, r: int) -> None:
    """Request r will not use its freed blocks again: they become anyone's."""
    scheduler = state.scheduler[0]
    request = state.requests[r]
    if request.cached_blocks > 0:
        state.ring[request.cached_segment].owner = NOBODY
        scheduler.cached_blocks -= request.cached_blocks
        request.cached_blocks = 0
        if scheduler.cached_blocks == 0:
            scheduler.ring_count = 0


@compiled
def _append(state: State, owner: int, blocks: int) -> int:
    scheduler = state.scheduler[0]
    capacity = len(state.ring)
    if scheduler.ring_count == capacity:
        _drop_empty_segments(state)
    at = (scheduler.ring_first + scheduler.ring_count) % capacity
    state.ring[at].owner = owner
    state.ring[at].blocks = blocks
    scheduler.ring_count += 1
    return at


@compiled
def _drop_empty_segments(state: State) -> None:
    scheduler = state.scheduler[0]
    capacity = len(state.ring)
    kept = 0
    for i in range(scheduler.ring_count):
        source = (scheduler.ring_first + i) % capacity
        if state.ring[source].blocks == 0:
            continue
        target = (scheduler.ring_first + kept) % capacity
        owner = state.ring[source].owner
        state.ring[target].blocks = state.ring[source].blocks
        state.ring[target].owner = owner
        if owner != NOBODY:
            state.requests[owner].cached_segment = target
        kept += 1
    scheduler.ring_count = kept


@compiled
def _reallocate_oldest(state: State, blocks: int) -> None:
    scheduler = state.scheduler[0]
    while blocks > 0 and scheduler.cached_blocks > 0:
        segment = state.ring[scheduler.ring_first]
        taken = min(blocks, segment.blocks)
        segment.blocks -= taken
        blocks -= taken
        if segment.owner != NOBODY:
            owner = state.requests[segment.owner]
            lost = max(owner.cached_blocks - segment.blocks, 0)
            owner.cached_blocks -= lost
            scheduler.cached_blocks -= lost
        if segment.blocks == 0:
            scheduler.ring_first = (scheduler.ring_first + 1) % len(state.ring)
            scheduler.ring_count -= 1
    if scheduler.cached_blocks == 0:
        scheduler.ring_count = 0
