"""The prefix cache: which full blocks hold what, shared by all sequences that begin alike.

A radix tree, as SGLang's (Zheng et al., arXiv 2312.07104): a node is a run of blocks of one stretch of content (see
`CONTENT`), and on the way down to it stands all that comes before. Running requests use nodes; what none uses is idle
and stays until its space is needed. Idle nodes are given up in the order in which they became idle, each from its last
block, which for single blocks is the order of vLLM's block manager: so what stands before a cached block is cached,
too. The cost of all this goes with the stretches of a sequence, not with its blocks, and not with the cache's size.

Idle nodes are in lanes, so that a decision can take deferred work's blocks first, and of immediate work those that are
least likely asked for again soon: see `returns`. What is given up may go on in host memory: see `host_tier`.
"""

from __future__ import annotations

import numba as nb
import numpy as np

from flexirl.compiled import compiled
from flexirl.policies.interface.view import NONE
from flexirl.runtime.scheduler.host_tier import empty_tier, has_tier, keep, tier_block
from flexirl.runtime.scheduler.returns import (
    forget_returns,
    kind_of,
    note_given_up,
    note_left,
    note_miss,
    note_return,
    rank,
    worth_keeping,
)
from flexirl.runtime.scheduler.state import DEFERRED_LANE, KINDS, LANES, UNSORTED_LANE, State
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

_OWN = np.uint64(1 << 63)  # origins of what a request shares with nobody; no origin of content has this bit
_UNBOUNDED = 1 << 40
_CHOSEN_FOR_S = 0.5  # seconds until somebody else may have become the first to give way


@nb.njit(cache=True, inline="always")
def caches(state: State) -> bool:
    """True if the engine caches prefixes and this state is where."""
    return state.engine[0].prefix_caching > 0 and len(state.nodes) > 0


@compiled
def empty_cache(state: State) -> None:
    """Nothing is cached, all blocks are empty."""
    scheduler, blocks = state.scheduler[0], state.engine[0].kv_blocks
    scheduler.free_blocks = blocks
    scheduler.empty_blocks = blocks
    if scheduler.nodes > 0 or scheduler.uses == 0:  # else nobody has touched them
        state.buckets[:] = NONE
    scheduler.nodes = 0
    scheduler.spare_node = NONE
    scheduler.uses = 1
    scheduler.own_origins = 0
    if caches(state):
        for lane in range(LANES):
            state.nodes[blocks + lane].next = blocks + lane
            state.nodes[blocks + lane].previous = blocks + lane
        forget_returns(state)
    scheduler.idle_lanes = 0
    scheduler.victim = NONE
    scheduler.victim_s = -np.inf
    scheduler.spare_blocks = len(state.spare_blocks)
    for i in range(len(state.spare_blocks)):
        state.spare_blocks[i] = len(state.spare_blocks) - 1 - i
    empty_tier(state)
    scheduler.spare_row = 0
    scheduler.rows_out = 0
    for i in range(len(state.spare_rows)):
        state.spare_rows[i] = i


@compiled
def new_own_origin(state: State, r: int) -> None:
    """Request r, just submitted, says what nobody said before, except for its contents."""
    request = state.requests[r]
    request.own_origin = _OWN | np.uint64(state.scheduler[0].own_origins)
    state.scheduler[0].own_origins += 1
    request.node = NONE
    request.cached = 0


@compiled
def find(state: State, r: int) -> tuple[int, int]:
    """Blocks of waiting request r that the cache has from its first one on, and how many of them are in use.

    At most all but the block with its last token, which is always computed: it yields the next one.
    """
    request = state.requests[r]
    if not caches(state) or (request.content_count == 0 and request.preemptions == 0):
        return 0, 0
    most = (request.prompt_tokens + request.generated - 1) // state.engine[0].block_size
    found, used = 0, 0
    while found < most:
        origin, end = stretch(state, request, found)
        n = _node_at(state, origin, found)
        if n == NONE:
            break
        taken = min(state.nodes[n].blocks, min(end, most) - found)
        found += taken
        if state.nodes[n].users > state.nodes[n].marks:
            used += taken
    return found, used


@compiled
def find_in_tier(state: State, r: int, found: int) -> int:
    """How many more blocks of waiting request r the host tier has behind the `found` ones that the cache has."""
    request = state.requests[r]
    if not has_tier(state) or (request.content_count == 0 and request.preemptions == 0):
        return 0
    most = (request.prompt_tokens + request.generated - 1) // state.engine[0].block_size
    behind = found
    while behind < most:
        origin, end = stretch(state, request, behind)
        end = min(end, most)
        while behind < end:
            if tier_block(state, origin, behind) == NONE:
                return behind - found
            behind += 1
    return behind - found


@compiled
def take(state: State, r: int, blocks: int) -> None:
    """Lets request r, which holds none, use the first `blocks` that `find` found, and gives them to its block table."""
    request = state.requests[r]
    leaf, kind, idle_s = False, 0, 0.0
    while request.cached < blocks:
        origin, end = stretch(state, request, request.cached)
        n = _node_at(state, origin, request.cached)
        node = state.nodes[n]
        leaf = node.users == 0 and node.children == 0 and node.lane < KINDS
        kind, idle_s = node.lane, node.idle_s
        _use(state, r, _cut(state, n, min(end, blocks) - request.cached))
    if caches(state) and request.request_class == IMMEDIATE and request.preemptions == 0:
        # Of what others may still come back to, this says nothing.
        if not note_miss(state, stretch(state, request, blocks)[0]) and leaf:
            note_return(state, kind, state.scheduler[0].now_s - idle_s)
    request.kv_blocks += blocks
    state.classes[request.request_class].kv_blocks += blocks


@compiled
def remember(state: State, r: int, blocks: int) -> None:
    """Makes the first `blocks` of running request r, all computed, known to the cache.

    Those that it knows already, since another request computed the same meanwhile, become empty: r uses the others.
    """
    request, scheduler = state.requests[r], state.scheduler[0]
    while request.cached < blocks:
        first = request.cached
        origin, end = stretch(state, request, first)
        count = min(end, blocks) - first
        n = _node_at(state, origin, first)
        if n != NONE:
            n = _cut(state, n, count)
            count = state.nodes[n].blocks
            empty_row(state, r, first, first + count)
            _use(state, r, n)
            scheduler.free_blocks += count
            scheduler.empty_blocks += count
            continue
        n = request.node
        grows = n != NONE and state.nodes[n].origin == origin and state.nodes[n].owner == request.request_class
        if grows and state.nodes[n].users == 1 and state.nodes[n].children == 0:
            state.nodes[n].blocks += count
        else:
            n = _new_node(state, origin, first, count)
            node = state.nodes[n]
            node.parent = request.node
            node.users = 1
            node.owner = request.request_class
            if request.node != NONE:
                state.nodes[request.node].children += 1
            request.node = n
        request.cached += count
        _link_row(state, r, n, first, first + count)


@compiled
def leave(state: State, r: int) -> None:
    """Request r uses its cached blocks no longer: those that nobody else uses become idle, the last ones first."""
    scheduler, request = state.scheduler[0], state.requests[r]
    n = request.node
    lane = UNSORTED_LANE
    if state.decision[0].by_return:
        lane = kind_of(state, r)
        note_left(state, r, lane)
    while n != NONE:
        node = state.nodes[n]
        node.users -= 1
        if node.users == 0:
            node.lane = lane if node.owner == IMMEDIATE else DEFERRED_LANE
            _list_last(state, n)
            state.classes[node.owner].idle_blocks += node.blocks
            scheduler.free_blocks += node.blocks
        n = node.parent
    request.node = NONE
    request.cached = 0


@compiled
def evict(state: State, blocks: int, sound: bool) -> None:
    """Empties `blocks` idle blocks: the longest idle, but deferred work's first while it has more than its share.

    sound: what they hold can be relied on, and may go on in the host tier.
    """
    engine, share = state.engine[0], state.decision[0].deferred_cache_share
    kept = int(share * engine.kv_blocks) if share < 1.0 else engine.kv_blocks
    state.scheduler[0].empty_blocks += blocks
    while blocks > 0:
        of_immediate = _first_to_go(state)
        of_deferred = state.nodes[engine.kv_blocks + DEFERRED_LANE].next
        surplus = state.classes[DEFERRED].idle_blocks - kept
        most = blocks
        if surplus > 0:
            n, most = of_deferred, min(blocks, surplus)
        elif of_deferred >= engine.kv_blocks:
            n = of_immediate
        elif of_immediate == NONE:
            n = of_deferred
        else:
            n = of_deferred if state.nodes[of_deferred].age < state.nodes[of_immediate].age else of_immediate
        node = state.nodes[n]
        count = min(most, node.blocks)
        if node.lane < KINDS:
            note_given_up(state, node.origin, node.lane, node.idle_s)
        for number in range(node.first + node.blocks - 1, node.first + node.blocks - 1 - count, -1):
            if sound:
                keep(state, node.origin, number, node.owner, node.last_block)
            if len(state.spare_blocks) > 0:
                _push_spare_block(state, node.last_block)
                node.last_block = state.block_before[node.last_block]
        node.blocks -= count
        state.classes[node.owner].idle_blocks -= count
        state.classes[node.owner].evicted_blocks += count
        blocks -= count
        if node.blocks == 0:
            _drop(state, n)


@compiled
def forget_idle(state: State) -> None:
    """Empties all idle blocks, those in host memory, too: what they hold cannot be relied on any more."""
    evict(state, state.scheduler[0].free_blocks - state.scheduler[0].empty_blocks, False)
    empty_tier(state)


@compiled
def _first_to_go(state: State) -> int:
    """The idle node of immediate work that gives way first, or NONE: the one that has been idle longest.

    If the decision goes by returns, of those that have been idle longest in their lanes the one least worth keeping;
    what others stand behind then stays for now, as if it had been left just now.
    """
    scheduler, first = state.scheduler[0], state.engine[0].kv_blocks
    by_return = state.decision[0].by_return == 1
    if by_return:
        if scheduler.victim != NONE and scheduler.now_s < scheduler.victim_s + _CHOSEN_FOR_S:
            return int(scheduler.victim)
        rank(state)
    uses = scheduler.uses
    while True:
        victim, least = NONE, np.inf
        for lane in range(DEFERRED_LANE):
            if not _has_idle(state, lane):
                continue
            n = state.nodes[first + lane].next
            if state.nodes[n].age > uses:
                continue  # others stand behind every one in this lane
            worth = worth_keeping(state, lane, state.nodes[n].idle_s) if by_return and lane < KINDS else 0.0
            if worth < least or (worth == least and state.nodes[n].age < state.nodes[victim].age):
                victim, least = n, worth
        if victim == NONE or state.nodes[victim].children == 0:
            break
        _unlink(state, victim)
        _list_last(state, victim)
    if by_return:
        scheduler.victim = victim
        scheduler.victim_s = scheduler.now_s
    return victim


@compiled
def mark(state: State, r: int) -> int:
    """Blocks that leaving them all would free, of running request r and those marked before it: call `unmark` after."""
    request = state.requests[r]
    freed = request.kv_blocks - request.cached
    n = request.node
    while n != NONE:
        node = state.nodes[n]
        node.marks += 1
        if node.marks == node.users:
            freed += node.blocks
        n = node.parent
    return freed


@compiled
def unmark(state: State, r: int) -> None:
    """Undoes `mark`."""
    n = state.requests[r].node
    while n != NONE:
        state.nodes[n].marks = 0
        n = state.nodes[n].parent


# ------------------------------------------------------------------------------------------------------ nodes


@compiled
def stretch(state: State, request, block: int) -> tuple[np.uint64, int]:
    """The origin of block number `block` of a request's sequence, and the first block beyond the same stretch.

    A block is of the stretch that its last token lies in: what stands before that goes without saying.
    """
    size = state.engine[0].block_size
    low, high = request.content_first, request.content_first + request.content_count
    behind = high
    while low < high:
        middle = (low + high) // 2
        if state.contents[middle].end >= (block + 1) * size:
            high = middle
        else:
            low = middle + 1
    if low == behind:
        return request.own_origin, _UNBOUNDED
    return state.contents[low].origin & ~_OWN, int(state.contents[low].end // size)


@nb.njit(cache=True, inline="always")
def _bucket(state: State, origin: np.uint64, first: int) -> int:
    mixed = (origin ^ (np.uint64(first) * np.uint64(0xC2B2AE3D27D4EB4F))) * np.uint64(0x9E3779B97F4A7C15)
    return int((mixed >> np.uint64(32)) & np.uint64(len(state.buckets) - 1))


@compiled
def _node_at(state: State, origin: np.uint64, first: int) -> int:
    """The node of this origin that begins with block number `first`, or NONE."""
    n = state.buckets[_bucket(state, origin, first)]
    while n != NONE and (state.nodes[n].origin != origin or state.nodes[n].first != first):
        n = state.nodes[n].chained
    return n


@compiled
def _new_node(state: State, origin: np.uint64, first: int, blocks: int) -> int:
    scheduler = state.scheduler[0]
    n = scheduler.spare_node
    if n == NONE:
        n = scheduler.nodes
        scheduler.nodes += 1
    else:
        scheduler.spare_node = state.nodes[n].next
    node = state.nodes[n]
    node.origin = origin
    node.first = first
    node.blocks = blocks
    node.children = 0
    node.marks = 0
    node.last_block = NONE
    _enter_bucket(state, n)
    return n


@compiled
def _enter_bucket(state: State, n: int) -> None:
    bucket = _bucket(state, state.nodes[n].origin, state.nodes[n].first)
    state.nodes[n].chained = state.buckets[bucket]
    state.buckets[bucket] = n


@compiled
def _leave_bucket(state: State, n: int) -> None:
    bucket = _bucket(state, state.nodes[n].origin, state.nodes[n].first)
    other = state.buckets[bucket]
    if other == n:
        state.buckets[bucket] = state.nodes[n].chained
        return
    while state.nodes[other].chained != n:
        other = state.nodes[other].chained
    state.nodes[other].chained = state.nodes[n].chained


@compiled
def _cut(state: State, n: int, blocks: int) -> int:
    """The node with the first `blocks` of node n, or n itself if it has no more: the rest, if any, becomes its child.

    The rest keeps the number n, by which running requests know where their cached blocks end.
    """
    if state.nodes[n].blocks <= blocks:
        return n
    _leave_bucket(state, n)
    rest = state.nodes[n]
    upper = _new_node(state, rest.origin, rest.first, blocks)
    node = state.nodes[upper]
    node.parent = rest.parent
    node.children = 1
    node.users = rest.users
    node.owner = rest.owner
    node.age = rest.age
    node.idle_s = rest.idle_s
    node.lane = rest.lane
    rest.parent = upper
    rest.first += blocks
    rest.blocks -= blocks
    _enter_bucket(state, n)
    if node.users == 0:
        _insert_before(state, upper, rest.next)
    if len(state.spare_blocks) > 0:
        node.last_block = rest.last_block
        for _ in range(rest.blocks):
            node.last_block = state.block_before[node.last_block]
    return upper


@compiled
def _use(state: State, r: int, n: int) -> None:
    """Running request r uses node n next to those it uses already."""
    request, node = state.requests[r], state.nodes[n]
    if node.users == 0:
        _unlink(state, n)
        state.classes[node.owner].idle_blocks -= node.blocks
        state.scheduler[0].free_blocks -= node.blocks
    node.users += 1
    if request.request_class == IMMEDIATE:
        node.owner = IMMEDIATE
    _write_row(state, r, n)
    request.node = n
    request.cached += node.blocks


@compiled
def _drop(state: State, n: int) -> None:
    """Idle node n has no blocks left."""
    node = state.nodes[n]
    _unlink(state, n)
    _leave_bucket(state, n)
    if node.parent != NONE:
        state.nodes[node.parent].children -= 1
    node.next = state.scheduler[0].spare_node
    state.scheduler[0].spare_node = n


@compiled
def _list_last(state: State, n: int) -> None:
    """Node n becomes idle now: the last in its lane."""
    scheduler, node = state.scheduler[0], state.nodes[n]
    scheduler.uses += 1
    node.age = scheduler.uses
    node.idle_s = scheduler.now_s
    _insert_before(state, n, state.engine[0].kv_blocks + node.lane)


@compiled
def _insert_before(state: State, n: int, other: int) -> None:
    node, previous = state.nodes[n], state.nodes[other].previous
    node.next = other
    node.previous = previous
    state.nodes[previous].next = n
    state.nodes[other].previous = n
    state.scheduler[0].idle_lanes |= np.uint64(1) << np.uint64(node.lane)


@compiled
def _unlink(state: State, n: int) -> None:
    node, scheduler = state.nodes[n], state.scheduler[0]
    state.nodes[node.previous].next = node.next
    state.nodes[node.next].previous = node.previous
    if node.next == node.previous:  # the head of its lane, which is empty now
        scheduler.idle_lanes &= ~(np.uint64(1) << np.uint64(node.lane))
    if scheduler.victim == n:
        scheduler.victim = NONE


@nb.njit(cache=True, inline="always")
def _has_idle(state: State, lane: int) -> bool:
    return (state.scheduler[0].idle_lanes >> np.uint64(lane)) & np.uint64(1) != 0


# ---------------------------------------------------------------------------------------- numbers of blocks


@compiled
def take_row(state: State, r: int) -> None:
    """Gives request r, about to run, a block table. Its last one still stands where it was until the next plan."""
    scheduler = state.scheduler[0]
    if len(state.spare_rows) > 0:
        state.requests[r].row = state.spare_rows[scheduler.spare_row]
        scheduler.spare_row = (scheduler.spare_row + 1) % len(state.spare_rows)
        scheduler.rows_out += 1


@compiled
def return_row(state: State, r: int) -> None:
    """Request r runs no longer."""
    scheduler, rows = state.scheduler[0], len(state.spare_rows)
    if rows > 0:  # behind all the others
        state.spare_rows[(scheduler.spare_row + rows - scheduler.rows_out) % rows] = state.requests[r].row
        scheduler.rows_out -= 1


@compiled
def fill_row(state: State, r: int, start: int, end: int) -> None:
    """Gives blocks `start` to `end` of request r's block table numbers of empty ones."""
    if len(state.spare_blocks) == 0:
        return
    scheduler, row = state.scheduler[0], state.requests[r].row
    for i in range(start, end):
        scheduler.spare_blocks -= 1
        state.block_rows[row, i] = state.spare_blocks[scheduler.spare_blocks]


@compiled
def empty_row(state: State, r: int, start: int, end: int) -> None:
    """Takes the numbers of blocks `start` to `end` of request r, which are its own, back."""
    if len(state.spare_blocks) > 0:
        for i in range(start, end):
            _push_spare_block(state, state.block_rows[state.requests[r].row, i])


@compiled
def _push_spare_block(state: State, block: int) -> None:
    state.spare_blocks[state.scheduler[0].spare_blocks] = block
    state.scheduler[0].spare_blocks += 1


@compiled
def _link_row(state: State, r: int, n: int, start: int, end: int) -> None:
    """Appends the numbers of blocks `start` to `end` of request r to those of node n."""
    if len(state.spare_blocks) > 0:
        for i in range(start, end):
            block = state.block_rows[state.requests[r].row, i]
            state.block_before[block] = state.nodes[n].last_block
            state.nodes[n].last_block = block


@compiled
def _write_row(state: State, r: int, n: int) -> None:
    """Writes the numbers of node n's blocks into request r's block table."""
    if len(state.spare_blocks) > 0:
        node = state.nodes[n]
        block = node.last_block
        for i in range(node.first + node.blocks - 1, node.first - 1, -1):
            state.block_rows[state.requests[r].row, i] = block
            block = state.block_before[block]
