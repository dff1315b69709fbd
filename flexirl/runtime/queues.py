"""Waiting queues: skew heaps threaded through the requests themselves.

Push, pop and removal of any request cost O(log n) amortised, so a million queued requests slow nothing down, and no
memory is needed beyond three links a request. Sleator and Tarjan, "Self-adjusting heaps", SIAM J. Computing 15 (1986).
A class has one lane, or one per tenant in the FAIR order.
"""

from __future__ import annotations

import numba as nb

from flexirl.runtime.state import ARRIVAL, DEADLINE, FAIR, SCORE, SHORTEST, WAITING, State
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

NONE = -1


@nb.njit(cache=True, inline="always")
def owed_tokens(request) -> int:
    """Tokens to compute before the next output token: the prompt, or after preemption all that was lost."""
    return request.prompt_tokens + request.generated - request.computed


@nb.njit(cache=True)
def _before(requests, a: int, b: int) -> bool:
    key_a, key_b = requests[a].key, requests[b].key
    return key_a < key_b or (key_a == key_b and a < b)


@nb.njit(cache=True)
def _meld(requests, a: int, b: int) -> int:
    """One heap of two; returns its root, whose parent link the caller sets."""
    if a == NONE:
        return b
    if b == NONE:
        return a
    if _before(requests, b, a):
        a, b = b, a
    root = a
    while True:
        right = requests[a].right
        requests[a].right = requests[a].left
        if right == NONE:
            requests[a].left = b
            requests[b].parent = a
            return root
        if _before(requests, b, right):
            right, b = b, right
        requests[a].left = right
        requests[right].parent = a
        a = right


@nb.njit(cache=True)
def _key(state: State, r: int) -> float:
    request = state.requests[r]
    group = state.classes[request.request_class]
    if group.order == ARRIVAL or group.order == FAIR:
        return request.arrival_s
    if group.order == SHORTEST:
        return float(owed_tokens(request))
    if group.order == SCORE:
        return -request.score
    remaining = float(owed_tokens(request))
    if request.request_class == DEFERRED:
        remaining += max(group.order_expected - request.generated, 0.0)
        due = request.deadline_s
    else:
        due = request.ttft_deadline_s
    return due + group.order_weight_s * remaining


# Relegated requests keep their order among themselves, behind all others.
_RELEGATED_OFFSET = 1e12


@nb.njit(cache=True)
def push(state: State, r: int) -> None:
    """Puts request r, not in any queue, into the queue of its class and marks it waiting."""
    requests = state.requests
    request = requests[r]
    group = state.classes[request.request_class]
    request.key = _key(state, r) + (_RELEGATED_OFFSET if request.relegated else 0.0)
    request.left = NONE
    request.right = NONE
    request.status = WAITING
    lane = request.tenant if group.order == FAIR else 0
    root = _meld(requests, state.lanes[request.request_class, lane], r)
    requests[root].parent = NONE
    state.lanes[request.request_class, lane] = root
    group.waiting += 1
    group.waiting_tokens += owed_tokens(request)


@nb.njit(cache=True)
def remove(state: State, r: int) -> None:
    """Takes waiting request r out of its queue; the caller gives it its next status."""
    requests = state.requests
    request = requests[r]
    group = state.classes[request.request_class]
    rest = _meld(requests, request.left, request.right)
    if rest != NONE:
        requests[rest].parent = request.parent
    if request.parent == NONE:
        lane = request.tenant if group.order == FAIR else 0
        state.lanes[request.request_class, lane] = rest
    elif requests[request.parent].left == r:
        requests[request.parent].left = rest
    else:
        requests[request.parent].right = rest
    group.waiting -= 1
    group.waiting_tokens -= owed_tokens(request)


@nb.njit(cache=True)
def head(state: State, request_class: int) -> int:
    """The next request of a class in its order, or NONE. FAIR: of the tenant with the least service so far."""
    lanes = state.lanes[request_class]
    if state.classes[request_class].order != FAIR:
        return lanes[0]
    best = NONE
    least = 0.0
    for tenant in range(len(lanes)):
        if lanes[tenant] != NONE and (best == NONE or state.tenants[tenant].service < least):
            best = lanes[tenant]
            least = state.tenants[tenant].service
    return best


@nb.njit(cache=True)
def merged_head(state: State) -> int:
    """The next request of both classes when they share one queue: the head with the smaller key.

    In the FAIR order the tenant with the least service goes first, then the earlier arrival.
    """
    immediate, deferred = head(state, IMMEDIATE), head(state, DEFERRED)
    if immediate == NONE:
        return deferred
    if deferred == NONE:
        return immediate
    if state.classes[IMMEDIATE].order == FAIR:
        of_immediate = state.tenants[state.requests[immediate].tenant].service
        of_deferred = state.tenants[state.requests[deferred].tenant].service
        if of_immediate != of_deferred:
            return immediate if of_immediate < of_deferred else deferred
    return immediate if _before(state.requests, immediate, deferred) else deferred


@nb.njit(cache=True)
def reorder(state: State, request_class: int, order: int, weight_s: float, expected: float) -> None:
    """Sorts the queue of a class anew if its order changes. O(n log n) for n requests, so orders change rarely."""
    group = state.classes[request_class]
    same_weights = order != DEADLINE or (weight_s == group.order_weight_s and expected == group.order_expected)
    if order == group.order and same_weights:
        return
    group.order = order
    group.order_weight_s = weight_s
    group.order_expected = expected
    state.lanes[request_class, :] = NONE
    group.waiting = 0
    group.waiting_tokens = 0
    for r in range(len(state.requests)):
        if state.requests[r].status == WAITING and state.requests[r].request_class == request_class:
            push(state, r)
