"""What must hold of a scheduler state between any two calls, whatever a policy decides."""

from __future__ import annotations

import numpy as np

from flexirl.policies.interface.decision import FAIR
from flexirl.policies.interface.view import NONE
from flexirl.runtime.scheduler.kv_cache import blocks_for
from flexirl.runtime.scheduler.state import (
    CANCELLED,
    EXPIRED,
    FINISHED,
    REJECTED,
    RUNNING,
    WAITING,
    State,
)


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

    held = requests["kv_blocks"][status == RUNNING].sum()
    assert scheduler["free_blocks"] >= 0 and scheduler["host_free_blocks"] >= 0, "over-committed memory"
    assert held + scheduler["free_blocks"] == engine["kv_blocks"], "leaked blocks"
    assert not requests["kv_blocks"][(status != RUNNING) & (status != 0)].any(), "an idle request holds blocks"
    swapped = requests["host_blocks"][status == WAITING].sum()
    assert swapped + scheduler["host_free_blocks"] == engine["host_kv_blocks"], "leaked host blocks"
    assert requests["cached_blocks"][status == WAITING].sum() == scheduler["cached_blocks"], "miscounted cached blocks"
    assert scheduler["cached_blocks"] <= scheduler["free_blocks"], "cached blocks are not free"
    for r in running:
        request = requests[r]
        tokens = request["computed"] + request["scheduled"]
        assert blocks_for(int(tokens), int(engine["block_size"])) == request["kv_blocks"], "blocks do not match tokens"
        assert tokens <= request["prompt_tokens"] + request["generated"], "computed more than there is"
        assert request["generated"] < request["output_tokens"], "runs on after its last token"


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
