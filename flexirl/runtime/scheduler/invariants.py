"""What must hold of a scheduler state between any two calls, whatever a policy decides."""

from __future__ import annotations

import numpy as np

from flexirl.policies.interface.decision import FAIR
from flexirl.policies.interface.view import NONE
from flexirl.runtime.scheduler.host_tier import has_tier
from flexirl.runtime.scheduler.kv_cache import blocks_for
from flexirl.runtime.scheduler.prefix_cache import caches
from flexirl.runtime.scheduler.state import (
    CANCELLED,
    DEFERRED_LANE,
    EXPIRED,
    FINISHED,
    LANES,
    REJECTED,
    RUNNING,
    WAITING,
    State,
)
from flexirl.workloads.trace import DEFERRED, IMMEDIATE


def check_invariants(state: State, reused: bool = False) -> None:
    """Walks the whole state; raises AssertionError with what is wrong. Slow: for tests and idle moments.

    `state` is one member's State (no leading axis). reused: places of ended requests are given to others, as in a live
    engine, so that not all that ended can still be counted.
    """
    scheduler, engine, requests = state.scheduler[0], state.engine[0], state.requests
    status = requests["status"]
    running = state.running[: scheduler["running"]]
    assert len(set(running.tolist())) == len(running), "a request is in the running batch twice"
    assert set(running.tolist()) == set(np.flatnonzero(status == RUNNING).tolist()), "running list and status disagree"
    assert len(running) <= engine["max_running"], "more running requests than seats"

    waiting: set[int] = set()
    for request_class in range(len(state.classes)):
        for lane, root in enumerate(state.lanes[request_class]):
            members = _walk(state, int(root))
            for r in members:
                assert requests[r]["request_class"] == request_class, "a request waits in the other class's queue"
                assert state.classes[request_class]["order"] != FAIR or requests[r]["tenant"] == lane, "wrong lane"
            assert not waiting & set(members), "a request waits twice"
            waiting |= set(members)
    assert waiting == set(np.flatnonzero(status == WAITING).tolist()), "queues and status disagree"

    for request_class, group in enumerate(state.classes):
        mine = requests["request_class"] == request_class
        queued = requests[mine & (status == WAITING)]
        assert group["waiting"] == len(queued), "miscounted waiting requests"
        owed = queued["prompt_tokens"] + queued["generated"] - queued["computed"]
        assert group["waiting_tokens"] == owed.sum(), "miscounted waiting tokens"
        assert group["relegated"] == (queued["relegated"] != 0).sum(), "miscounted relegated requests"
        assert group["relegated_tokens"] == owed[queued["relegated"] != 0].sum(), "miscounted relegated tokens"
        assert group["running"] == (mine & (status == RUNNING)).sum(), "miscounted running requests"
        assert group["kv_blocks"] == requests["kv_blocks"][mine & (status == RUNNING)].sum(), "miscounted blocks"
        ended = group["finished"] + group["ended_otherwise"]
        assert group["arrived"] == ended + group["waiting"] + group["running"], "a request was lost"
        still_there = (mine & np.isin(status, (FINISHED, EXPIRED, REJECTED, CANCELLED))).sum()
        assert ended == still_there or (reused and ended > still_there), "miscounted ended requests"

    assert scheduler["free_blocks"] >= 0 and scheduler["host_free_blocks"] >= 0, "over-committed memory"
    assert not requests["kv_blocks"][(status != RUNNING) & (status != 0)].any(), "an idle request holds blocks"
    check_cache(state)
    check_tier(state)
    swapped = requests["host_blocks"][status == WAITING].sum()
    assert swapped + scheduler["host_free_blocks"] == engine["host_kv_blocks"], "leaked host blocks"
    for r in running:
        request = requests[r]
        tokens = request["computed"] + request["scheduled"]
        assert blocks_for(int(tokens), int(engine["block_size"])) == request["kv_blocks"], "blocks do not match tokens"
        assert tokens <= request["prompt_tokens"] + request["generated"], "computed more than there is"
        assert request["generated"] < request["output_tokens"], "runs on after its last token"


def check_cache(state: State) -> None:
    """Raises AssertionError unless every block is empty, cached once or one request's own."""
    scheduler, engine, requests, nodes = state.scheduler[0], state.engine[0], state.requests, state.nodes
    running = state.running[: scheduler["running"]]
    known = cache_nodes(state)
    users = dict.fromkeys(known, 0)
    own_blocks = 0
    for r in running:
        request = requests[r]
        own_blocks += request["kv_blocks"] - request["cached"]
        n, behind = int(request["node"]), int(request["cached"])
        while n != NONE:
            assert n in users, "a request uses a node that nobody can find"
            users[n] += 1
            assert nodes["first"][n] + nodes["blocks"][n] == behind, "a request's cached blocks are not in line"
            behind = int(nodes["first"][n])
            for block in range(behind, behind + int(nodes["blocks"][n])):
                assert nodes["origin"][n] == _origin(state, request, block), "a cached block says something else"
            n = int(nodes["parent"][n])
        assert behind == 0, "a request's cached blocks have no beginning"
    idle = [n for n in known if users[n] == 0]
    heads = int(engine["kv_blocks"])
    listed = [_members(nodes, heads + lane) for lane in range(LANES)] if caches(state) else []
    assert sorted(idle) == sorted(n for some in listed for n in some), "the lists of idle nodes are not right"
    for n in known:
        assert nodes["users"][n] == users[n], "miscounted users"
        assert nodes["blocks"][n] > 0 and nodes["marks"][n] == 0, "a node is empty or marked"
        children = [other for other in known if nodes["parent"][other] == n] if len(known) < 200 else None
        assert children is None or nodes["children"][n] == len(children), "miscounted children"
        parent = int(nodes["parent"][n])
        if parent != NONE:
            assert parent in users, "a node outlived what stands before it"
            assert nodes["first"][parent] + nodes["blocks"][parent] == nodes["first"][n], "a gap between nodes"
            assert nodes["owner"][parent] <= nodes["owner"][n], "kept for deferred work, and what follows it is not"
    for lane, some in enumerate(listed):
        owner = DEFERRED if lane == DEFERRED_LANE else IMMEDIATE
        assert (nodes["owner"][some] == owner).all() and (nodes["lane"][some] == lane).all(), "in a lane of others"
        assert (np.diff(nodes["age"][some]) >= 0).all(), "idle in no order"
        assert (int(scheduler["idle_lanes"]) >> lane & 1) == (len(some) > 0), "a lane is empty or not"
    for owner in range(2):
        mine = [n for n in idle if nodes["owner"][n] == owner]
        assert state.classes["idle_blocks"][owner] == nodes["blocks"][mine].sum(), "miscounted idle blocks"
    idle_blocks = nodes["blocks"][idle].sum()
    assert scheduler["free_blocks"] == scheduler["empty_blocks"] + idle_blocks, "miscounted free blocks"
    in_nodes = nodes["blocks"][known].sum()
    assert scheduler["empty_blocks"] + in_nodes + own_blocks == engine["kv_blocks"], "leaked blocks"
    if len(state.spare_blocks):
        _check_numbers(state, known)


def _check_numbers(state: State, known: list[int]) -> None:
    """Every block has one place, and block tables begin with the blocks of the nodes they use."""
    scheduler, requests = state.scheduler[0], state.requests
    of_node: dict[int, list[int]] = {}
    for n in known:
        numbers, block = [], int(state.nodes["last_block"][n])
        for _ in range(int(state.nodes["blocks"][n])):
            numbers.append(block)
            block = int(state.block_before[block])
        of_node[n] = numbers[::-1]
    everything = [block for numbers in of_node.values() for block in numbers]
    everything += state.spare_blocks[: scheduler["spare_blocks"]].tolist()
    rows = []
    for r in state.running[: scheduler["running"]]:
        row = state.block_rows[requests["row"][r], : requests["kv_blocks"][r]].tolist()
        rows.append(int(requests["row"][r]))
        cached: list[int] = []
        n = int(requests["node"][r])
        while n != NONE:
            cached = of_node[n] + cached
            n = int(state.nodes["parent"][n])
        assert row[: len(cached)] == cached, "a block table does not begin with the cached blocks"
        everything += row[len(cached) :]
    assert sorted(everything) == list(range(state.engine["kv_blocks"][0])), "a block is held twice or lost"
    spare = [
        int(state.spare_rows[(scheduler["spare_row"] + i) % len(state.spare_rows)])
        for i in range(len(state.spare_rows) - scheduler["rows_out"])
    ]
    assert sorted(rows + spare) == list(range(len(state.spare_rows))), "a block table is held twice or lost"


def check_tier(state: State) -> None:
    """Raises AssertionError unless every block of the host tier is listed, found by what it holds, and in order."""
    if not has_tier(state):
        return
    heads, made = int(state.engine["host_cache_blocks"][0]), int(state.scheduler["tier_made"][0])
    listed = [_members(state.tier, heads + owner) for owner in range(2)]
    assert sorted(b for some in listed for b in some) == list(range(made)), "a block of the tier is lost"
    assert len(tier_blocks(state)) == made <= heads, "a block of the tier cannot be found"
    for owner, some in enumerate(listed):
        assert (state.tier["owner"][some] == owner).all(), "a block of the tier is in the other class's list"
        assert state.classes["tier_blocks"][owner] == len(some), "miscounted blocks of the tier"
        assert (np.diff(state.tier["age"][some]) >= 0).all(), "the tier is in no order"


def tier_blocks(state: State) -> dict[tuple[int, int], bool]:
    """What the host tier holds, as origins and numbers, and whether it is kept for deferred work."""
    found = {}
    for bucket in state.tier_buckets if has_tier(state) else ():
        b = int(bucket)
        while b != NONE:
            block = state.tier[b]
            found[int(block["origin"]), int(block["number"])] = bool(block["owner"] == DEFERRED)
            b = int(block["chained"])
    return found


def cache_nodes(state: State) -> list[int]:
    """All nodes of the prefix cache, each found where a search would find it."""
    found = []
    for bucket in state.buckets if caches(state) else ():
        n = int(bucket)
        while n != NONE:
            found.append(n)
            n = int(state.nodes["chained"][n])
    assert len(set(found)) == len(found), "a node is in two buckets"
    keys = {(int(state.nodes["origin"][n]), int(state.nodes["first"][n])) for n in found}
    assert len(keys) == len(found), "two nodes hold the same"
    return found


def _members(records: np.ndarray, head: int) -> list[int]:
    """The records of a list, in its order."""
    found, n = [], int(records["next"][head])
    while n != head:
        found.append(n)
        assert records["previous"][records["next"][n]] == n, "a broken list"
        n = int(records["next"][n])
    return found


def _origin(state: State, request: np.void, block: int) -> int:
    """What the last token of a block of a request's sequence belongs to."""
    first, count = int(request["content_first"]), int(request["content_count"])
    for content in state.contents[first : first + count]:
        if content["end"] >= (block + 1) * state.engine["block_size"][0]:
            return int(content["origin"]) & ~(1 << 63)
    return int(request["own_origin"])


def _walk(state: State, root: int) -> list[int]:
    """All requests of the heap at `root`; checks heap order and parent links."""
    found: list[int] = []
    pending = [root] if root != NONE else []
    assert root == NONE or state.requests[root]["parent"] == NONE, "a root has a parent"
    while pending:
        r = pending.pop()
        found.append(r)
        for child in (int(state.requests[r]["left"]), int(state.requests[r]["right"])):
            if child != NONE:
                assert state.requests[child]["parent"] == r, "broken parent link"
                first, second = (state.requests[r]["key"], r), (state.requests[child]["key"], child)
                assert first <= second, "queue out of order"
                pending.append(child)
    return found
