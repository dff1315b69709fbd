"""Waiting queues: skew heaps threaded through the requests themselves.

Push, pop and removal of any request cost O(log n) amortised, so a million queued requests slow nothing down, and no
memory is needed beyond three links a request. Sleator and Tarjan, "Self-adjusting heaps", SIAM J. Computing 15 (1986).
A class has one lane, or one per tenant in the FAIR order.
"""

from __future__ import annotations

import numba as nb
import numpy as np

from flexirl.compiled import compiled
from flexirl.policies.interface.decision import (
    ARRIVAL,
    DEADLINE,
    FAIR,
    SCORE,
    SHORTEST,
)
from flexirl.policies.interface.view import NONE
from flexirl.runtime.profile.step_time import decodes_cost, prefill_slope
from flexirl.runtime.scheduler.lengths import predicted_tokens
from flexirl.runtime.scheduler.state import WAITING, State
from flexirl.workloads.trace import DEFERRED, IMMEDIATE


@nb.njit(cache=True, inline="always")
def owed_tokens(request) -> int:
    """Tokens to compute before the next output token: the prompt, or after preemption all that was lost."""
    return request.prompt_tokens + request.generated - request.computed


@compiled
def _before(requests, a: int, b: int) -> bool:
    key_a, key_b = requests[a].key, requests[b].key
    return key_a < key_b or (key_a == key_b and a < b)


@compiled
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


@compiled
def _key(state: State, r: int) -> float:
    request = state.requests[r]
    group = state.classes[request.request_class]
    if group.order == ARRIVAL or group.order == FAIR:
        return request.arrival_s
    if group.order == SCORE:
        return -request.score
    remaining = float(owed_tokens(request))
    if request.request_class == DEFERRED:
        if request.predicted_output_tokens > 0:
            remaining += _work_to_come(state.engine[0], request, request.predicted_output_tokens)
        elif group.order_quantile > 0:
            remaining += _work_to_come(state.engine[0], request, predicted_tokens(state, r, group.order_quantile))
        elif group.order == DEADLINE:
            remaining += max(group.order_expected - request.generated, 0.0)
    if group.order == SHORTEST:
        return remaining
    due_s = request.deadline_s if request.request_class == DEFERRED else request.ttft_deadline_s
    return min(due_s, _NEVER_DUE_S) + group.order_weight_s * remaining


@compiled
def _work_to_come(engine, request, output_tokens: float) -> float:
    """What is left of an output of so many tokens, in tokens of prefill that take as long."""
    tokens = max(output_tokens - request.generated, 0.0)
    slope_s = prefill_slope(engine)
    if slope_s <= 0:
        return float(tokens)
    return tokens * (decodes_cost(engine, 1, float(request.prompt_tokens + request.generated)) / slope_s)


# What is due at no time counts as due at one common time, so that the weight alone sorts it, behind all else.
_NEVER_DUE_S = 1e9
# Relegated requests keep their order among themselves, behind all others, even those that are due at no time at all.
_RELEGATED_OFFSET = 1e12
_LATEST_KEY = 5e11


@nb.njit(cache=True, inline="always")
def _count(group, request, sign: int) -> None:
    group.waiting += sign
    group.waiting_tokens += sign * owed_tokens(request)
    group.windowed += sign * (request.deadline_s < np.inf)
    if request.relegated:
        group.relegated += sign
        group.relegated_tokens += sign * owed_tokens(request)


@compiled
def push(state: State, r: int) -> None:
    """Puts request r, not in any queue, into the queue of its class and marks it waiting."""
    requests = state.requests
    request = requests[r]
    group = state.classes[request.request_class]
    request.key = min(_key(state, r), _LATEST_KEY) + (_RELEGATED_OFFSET if request.relegated else 0.0)
    request.left = NONE
    request.right = NONE
    request.status = WAITING
    lane = request.tenant if group.order == FAIR else 0
    root = _meld(requests, state.lanes[request.request_class, lane], r)
    requests[root].parent = NONE
    state.lanes[request.request_class, lane] = root
    _count(group, request, 1)


@compiled
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
    _count(group, request, -1)


@compiled
def head(state: State, request_class: int) -> int:
    """The next request of a class in its order, or NONE.

    FAIR: of the tenant with the least service so far, among those whose next request is not relegated if there are any.
    """
    lanes = state.lanes[request_class]
    if state.classes[request_class].order != FAIR:
        return lanes[0]
    best = NONE
    least = (0, 0.0)
    for tenant in range(len(lanes)):
        if lanes[tenant] != NONE:
            standing = (state.requests[lanes[tenant]].relegated, state.tenants[tenant].service)
            if best == NONE or standing < least:
                best = lanes[tenant]
                least = standing
    return best


@compiled
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


@compiled
def reorder(
    state: State, request_class: int, order: int, weight_s: float, expected: float, length_quantile: float
) -> None:
    """Sorts the queue of a class anew if its order changes. O(n log n) for n requests, so orders change rarely.

    A network gives another weight with every decision; one that is less than twice the weight in force, and more than
    half of it, changes nothing.
    """
    group = state.classes[request_class]
    alike = weight_s == group.order_weight_s or 0.5 < weight_s / (group.order_weight_s or np.inf) < 2.0
    same_weights = order != DEADLINE or (alike and expected == group.order_expected)
    same_lengths = (order != DEADLINE and order != SHORTEST) or length_quantile == group.order_quantile
    if order == group.order and same_weights and same_lengths:
        return
    group.order = order
    group.order_weight_s = weight_s
    group.order_expected = expected
    group.order_quantile = length_quantile
    _sort(state, request_class)


@compiled
def follow_lengths(state: State) -> None:
    """Sorts the deferred queue anew when enough has been learned of lengths since, if its order counts them.

    For every 16 that wait one must have finished, so the cost for each that finishes is bounded.
    """
    group = state.classes[DEFERRED]
    if group.order_quantile > 0 and (group.order == DEADLINE or group.order == SHORTEST):
        if group.finished - group.order_finished >= max(group.waiting // 16, 4):
            _sort(state, DEFERRED)


@compiled
def _sort(state: State, request_class: int) -> None:
    group = state.classes[request_class]
    group.order_finished = group.finished
    state.lanes[request_class, :] = NONE
    waiting = group.waiting
    group.waiting = group.waiting_tokens = group.windowed = 0
    group.relegated = group.relegated_tokens = 0
    r = 0
    while group.waiting < waiting:
        if state.requests[r].status == WAITING and state.requests[r].request_class == request_class:
            push(state, r)
        r += 1


@compiled
def rescore(state: State, r: int, score: float) -> None:
    """Gives request r, waiting or running, a new score; a waiting one moves to its place in the SCORE order."""
    if state.requests[r].status == WAITING:
        remove(state, r)
        state.requests[r].score = score
        push(state, r)
    else:
        state.requests[r].score = score


@compiled
def first_waiting(state: State, request_class: int, out: np.ndarray) -> int:
    """Writes the first len(out) requests of a class, in its order, into `out` (int32); returns how many there are.

    Walks the heap from its root, always to the foremost of the requests bordering on those already found. In the FAIR
    order, whose lanes are per tenant, only the first lane is read.
    """
    border = np.empty(len(out) + 1, np.int32)
    border[0] = state.lanes[request_class, 0]
    size = 0 if border[0] == NONE else 1
    found = 0
    while size > 0 and found < len(out):
        best = 0
        for i in range(1, size):
            if _before(state.requests, border[i], border[best]):
                best = i
        r = border[best]
        out[found] = r
        found += 1
        size -= 1
        border[best] = border[size]
        for child in (state.requests[r].left, state.requests[r].right):
            if child != NONE and size < len(border):
                border[size] = child
                size += 1
    return found
