"""vLLM's waiting queue: in vLLM's own order, or, while a plan is carried out, just those that may join, as planned."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request


class OfferedQueue(RequestQueue):
    """arrived: requests that were put in since it was last emptied, by whoever follows the queue.

    by_priority: the own order is that of priorities, else first come, first served, with what was put back in front.
    What is taken out stays in the heap of the own order until it comes up there: a removal costs nothing.
    """

    def __init__(self, by_priority: bool) -> None:
        self.arrived: list[Request] = []
        self._by_priority = by_priority
        self._keys: dict[Request, Any] = {}  # of those that wait
        self._heap: list[tuple[Any, int, Request]] = []
        self._last = self._first = 0
        self._offered: deque[Request] | None = None

    def offer(self, requests: Iterable[Request]) -> None:
        """From now on only these are seen at the front, until `withdraw`."""
        self._offered = deque(requests)

    def withdraw(self) -> None:
        """Back to vLLM's own order."""
        self._offered = None

    def __contains__(self, request: object) -> bool:
        return request in self._keys

    def add_request(self, request: Request) -> None:
        """See `RequestQueue`."""
        self._last += 1
        self._put(request, self._last)

    def prepend_request(self, request: Request) -> None:
        """See `RequestQueue`."""
        self._first -= 1
        self._put(request, self._first)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """See `RequestQueue`: the last one comes to stand in front."""
        for request in requests:
            self.prepend_request(request)

    def _put(self, request: Request, number: int) -> None:
        key = request if self._by_priority else number
        self._keys[request] = number
        heapq.heappush(self._heap, (key, number, request))
        self.arrived.append(request)

    def peek_request(self) -> Request:
        """See `RequestQueue`."""
        if self._offered is not None:
            return self._offered[0]
        while self._heap and self._keys.get(self._heap[0][2]) != self._heap[0][1]:
            heapq.heappop(self._heap)
        if not self._heap:
            raise IndexError("peek from an empty queue")
        return self._heap[0][2]

    def pop_request(self) -> Request:
        """See `RequestQueue`."""
        request = self.peek_request()
        if self._offered is not None:
            self._offered.popleft()
        self.remove_request(request)
        return request

    def remove_request(self, request: Request) -> None:
        """See `RequestQueue`."""
        del self._keys[request]
        if len(self._heap) > 2 * len(self._keys) + 1024:  # mostly of those that are gone
            self._heap = [entry for entry in self._heap if self._keys.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """See `RequestQueue`: those that are not here do not matter."""
        for request in requests:
            if request in self._keys:
                self.remove_request(request)

    def __bool__(self) -> bool:
        return bool(self._keys if self._offered is None else self._offered)

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Request]:
        entries = sorted(entry for entry in self._heap if self._keys.get(entry[2]) == entry[1])
        return iter([request for _, _, request in entries])
