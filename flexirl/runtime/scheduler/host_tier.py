"""The host tier: full blocks that the prefix cache gave up, kept in host memory until their space there is needed.

What is asked for again is copied back, which takes a small part of the time that computing it takes. Each block is
known by what it holds, as in vLLM's and SGLang's offloading: by the origin of the stretch of content its last token
lies in, and its number in the sequence; no two sequences that differ before it have both. A block that was copied back
stays, as the first of its class to give way: given up on the device once more, it need not be copied again.

Blocks give way in the order in which they came, deferred work's first while it has more than the share of the tier
that it may keep of the cache (`deferred_cache_share`).
"""

from __future__ import annotations

import numba as nb
import numpy as np

from flexirl.compiled import compiled
from flexirl.policies.interface.decision import EVERYBODYS, IMMEDIATES
from flexirl.policies.interface.view import NONE
from flexirl.runtime.scheduler.state import State
from flexirl.workloads.trace import DEFERRED, IMMEDIATE


@nb.njit(cache=True, inline="always")
def has_tier(state: State) -> bool:
    """True if there is host memory for what the prefix cache gives up."""
    return state.engine[0].host_cache_blocks > 0 and len(state.tier) > 0


@compiled
def empty_tier(state: State) -> None:
    """Nothing is in it, and nothing is to be copied."""
    scheduler, total = state.scheduler[0], state.engine[0].host_cache_blocks
    scheduler.copies = 0
    scheduler.tier_made = 0
    scheduler.tier_uses = 0
    state.tier_buckets[:] = NONE
    for owner in range(2):
        state.classes[owner].tier_blocks = 0
        if has_tier(state):
            state.tier[total + owner].next = total + owner
            state.tier[total + owner].previous = total + owner


@compiled
def tier_block(state: State, origin: np.uint64, number: int) -> int:
    """Where block `number` of this origin is, or NONE."""
    b = state.tier_buckets[_bucket(state, origin, number)]
    while b != NONE and (state.tier[b].origin != origin or state.tier[b].number != number):
        b = state.tier[b].chained
    return b


@compiled
def keep(state: State, origin: np.uint64, number: int, owner: int, device_block: int) -> None:
    """The prefix cache gives up a block, kept for class `owner`: it goes to the tier if the decision says so.

    Others give way to it. If all that is there is being copied back, or more is to be copied than can be listed, it is
    gone. device_block: its number, or NONE where blocks have none.
    """
    to_host = state.decision[0].to_host
    if not has_tier(state) or not (to_host == EVERYBODYS or (to_host == IMMEDIATES and owner == IMMEDIATE)):
        return
    b = tier_block(state, origin, number)
    if b != NONE:
        _unlist(state, b)
        _list_last(state, b, owner)
        return
    if len(state.copies) > 0 and state.scheduler[0].copies >= len(state.copies) - state.engine[0].kv_blocks:
        return  # the rest of the list is for what is copied back
    b = _room(state)
    if b == NONE:
        return
    block = state.tier[b]
    block.origin = origin
    block.number = number
    bucket = _bucket(state, origin, number)
    block.chained = state.tier_buckets[bucket]
    state.tier_buckets[bucket] = b
    _list_last(state, b, owner)
    _copy(state, device_block, b, 1)


@compiled
def hold(state: State, origin: np.uint64, number: int) -> bool:
    """Lets a block not give way until it is copied back; False if it is not there."""
    b = tier_block(state, origin, number)
    if b != NONE:
        _unlist(state, b)
    return b != NONE


@compiled
def copy_back(state: State, origin: np.uint64, number: int, device_block: int) -> None:
    """Copies a block that is held to the device; device_block: where to, or NONE where blocks have no numbers."""
    b = tier_block(state, origin, number)
    state.tier[b].age = 0
    _list_before(state, b, state.tier[state.engine[0].host_cache_blocks + state.tier[b].owner].next)
    _copy(state, device_block, b, 0)


@compiled
def _copy(state: State, device_block: int, b: int, to_tier: int) -> None:
    scheduler, size = state.scheduler[0], state.engine[0].block_size
    scheduler.swapped_tokens += size
    state.batch[0].swap_tokens += size
    if len(state.copies) > 0:
        copy = state.copies[scheduler.copies]
        copy.device = device_block
        copy.tier = b
        copy.to_tier = to_tier
        scheduler.copies += 1


@compiled
def _room(state: State) -> int:
    """A block of the tier that holds nothing any more, or NONE."""
    scheduler, engine = state.scheduler[0], state.engine[0]
    total = engine.host_cache_blocks
    if scheduler.tier_made < total:
        scheduler.tier_made += 1
        return int(scheduler.tier_made - 1)
    share = state.decision[0].deferred_cache_share
    kept = int(share * total) if share < 1.0 else total
    b, other = state.tier[total + DEFERRED].next, state.tier[total + IMMEDIATE].next
    if b >= total:
        b = other
    elif state.classes[DEFERRED].tier_blocks <= kept and other < total and state.tier[other].age < state.tier[b].age:
        b = other
    if b >= total:
        return NONE
    _unlist(state, b)
    _leave_bucket(state, b)
    return int(b)


@nb.njit(cache=True, inline="always")
def _bucket(state: State, origin: np.uint64, number: int) -> int:
    mixed = (origin ^ (np.uint64(number) * np.uint64(0xC2B2AE3D27D4EB4F))) * np.uint64(0x9E3779B97F4A7C15)
    return int((mixed >> np.uint64(32)) & np.uint64(len(state.tier_buckets) - 1))


@compiled
def _leave_bucket(state: State, b: int) -> None:
    bucket = _bucket(state, state.tier[b].origin, state.tier[b].number)
    other = state.tier_buckets[bucket]
    if other == b:
        state.tier_buckets[bucket] = state.tier[b].chained
        return
    while state.tier[other].chained != b:
        other = state.tier[other].chained
    state.tier[other].chained = state.tier[b].chained


@compiled
def _list_last(state: State, b: int, owner: int) -> None:
    state.scheduler[0].tier_uses += 1
    state.tier[b].age = state.scheduler[0].tier_uses
    state.tier[b].owner = owner
    _list_before(state, b, state.engine[0].host_cache_blocks + owner)


@compiled
def _list_before(state: State, b: int, other: int) -> None:
    block, previous = state.tier[b], state.tier[other].previous
    block.next = other
    block.previous = previous
    state.tier[previous].next = b
    state.tier[other].previous = b
    state.classes[block.owner].tier_blocks += 1


@compiled
def _unlist(state: State, b: int) -> None:
    block = state.tier[b]
    state.tier[block.previous].next = block.next
    state.tier[block.next].previous = block.previous
    state.classes[block.owner].tier_blocks -= 1
