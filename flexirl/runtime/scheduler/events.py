"""What falls due at some time, request by request: a heap, the earliest first, of two at once the lower number."""

from __future__ import annotations

import numpy as np

from flexirl.compiled import compiled

EVENT = np.dtype([("time_s", "f8"), ("request", "i4")], align=True)


@compiled
def add_event(heap: np.ndarray, count: int, time_s: float, r: int) -> int:
    """Adds an event to the `count` that there are; returns how many there are now."""
    _rise(heap, count, time_s, r)
    return count + 1


@compiled
def pop_event(heap: np.ndarray, count: int) -> int:
    """Takes out the first event, `heap[0]`; returns how many are left."""
    return _take_out(heap, count, 0)


@compiled
def drop_event(heap: np.ndarray, count: int, r: int) -> int:
    """Takes out the event of request r, if there is one; returns how many are left."""
    for at in range(count):
        if heap[at].request == r:
            return _take_out(heap, count, at)
    return count


@compiled
def _take_out(heap: np.ndarray, count: int, at: int) -> int:
    last = count - 1
    time_s, r = heap[last].time_s, heap[last].request
    if at == last:
        return last
    while True:  # the last event takes the place, or that of the earliest below it
        below = 2 * at + 1
        if below >= last:
            break
        if below + 1 < last and _before(heap[below + 1].time_s, heap[below + 1].request, heap[below]):
            below += 1
        if _before(time_s, r, heap[below]):
            break
        heap[at] = heap[below]
        at = below
    _rise(heap, at, time_s, r)
    return last


@compiled
def _rise(heap: np.ndarray, at: int, time_s: float, r: int) -> None:
    """Puts an event at `at`, or above it."""
    while at > 0 and _before(time_s, r, heap[(at - 1) // 2]):
        heap[at] = heap[(at - 1) // 2]
        at = (at - 1) // 2
    heap[at].time_s = time_s
    heap[at].request = r


@compiled
def _before(time_s: float, r: int, event) -> bool:
    return time_s < event.time_s or (time_s == event.time_s and r < event.request)
