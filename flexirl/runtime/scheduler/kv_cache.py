"""Exact accounting of the paged KV cache, in blocks: who holds how many, and what is left.

A running request's block table begins with blocks of the prefix cache, which others may use, too; behind these come
blocks of its own. Free blocks are the empty ones and the idle ones of the prefix cache, which give way.
"""

from __future__ import annotations

import numba as nb

from flexirl.compiled import compiled
from flexirl.policies.interface.view import NONE
from flexirl.runtime.scheduler.host_tier import copy_back, has_tier, hold
from flexirl.runtime.scheduler.prefix_cache import (
    caches,
    empty_row,
    evict,
    fill_row,
    leave,
    remember,
    return_row,
    stretch,
)
from flexirl.runtime.scheduler.state import State


@nb.njit(cache=True, inline="always")
def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return (tokens + block_size - 1) // block_size


@compiled
def allocate(state: State, r: int, blocks: int) -> None:
    """Gives request r `blocks` free blocks; the caller has made sure that there are as many."""
    scheduler, request = state.scheduler[0], state.requests[r]
    if blocks > scheduler.empty_blocks:
        evict(state, blocks - scheduler.empty_blocks, True)
    scheduler.empty_blocks -= blocks
    scheduler.free_blocks -= blocks
    fill_row(state, r, request.kv_blocks, request.kv_blocks + blocks)
    request.kv_blocks += blocks
    state.classes[request.request_class].kv_blocks += blocks


@compiled
def bring_back(state: State, r: int, blocks: int) -> None:
    """Copies what the host tier has of request r behind its cached blocks, up to `blocks` in all, to the device.

    It goes into blocks of the request's own; the caller has made sure that there are as many free.
    """
    request = state.requests[r]
    if not has_tier(state):
        return
    first = last = request.kv_blocks
    while last < blocks:
        origin, _ = stretch(state, request, last)
        if not hold(state, origin, last):
            break
        last += 1
    allocate(state, r, last - first)
    numbered = len(state.spare_blocks) > 0
    for block in range(first, last):
        origin, _ = stretch(state, request, block)
        copy_back(state, origin, block, state.block_rows[request.row, block] if numbered else NONE)


@compiled
def share(state: State, r: int) -> None:
    """Lets others find what running request r has computed of its contents."""
    request, engine = state.requests[r], state.engine[0]
    if caches(state):
        last = state.contents[request.content_first + request.content_count - 1].end
        remember(state, r, min(request.computed, last) // engine.block_size)


@compiled
def release(state: State, r: int, keep: bool) -> None:
    """Takes all blocks of request r, which no longer runs; keep: what it computed stays cached."""
    request, engine = state.requests[r], state.engine[0]
    if caches(state):
        if keep:
            remember(state, r, (request.computed - request.unknown) // engine.block_size)
        trim(state, r, request.cached)
        leave(state, r)
    else:
        trim(state, r, 0)
    state.classes[request.request_class].kv_blocks -= request.kv_blocks
    request.kv_blocks = 0
    return_row(state, r)


@compiled
def trim(state: State, r: int, blocks: int) -> None:
    """Empties the blocks of request r beyond its first `blocks`; the cache has none of them."""
    scheduler, request = state.scheduler[0], state.requests[r]
    surplus = request.kv_blocks - blocks
    if surplus <= 0:
        return
    scheduler.empty_blocks += surplus
    scheduler.free_blocks += surplus
    empty_row(state, r, blocks, request.kv_blocks)
    state.classes[request.request_class].kv_blocks -= surplus
    request.kv_blocks = blocks
