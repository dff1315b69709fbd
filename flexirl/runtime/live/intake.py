"""The door of a live engine: what comes from any thread is checked here and waits until the engine looks.

It looks between two iterations, so nothing that comes changes what is being computed.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from flexirl.errors import UserError
from flexirl.policies.interface.policy import Policy
from flexirl.runtime.live.clock import Clock
from flexirl.runtime.live.executor import Executor
from flexirl.runtime.live.options import Options
from flexirl.runtime.live.requests import EngineClosed, EngineFull, Request

_NEVER_S = float("inf")


class Arrival(NamedTuple):
    """A request that was let in. Sorted by its first two fields."""

    arrival_s: float  # on the engine's clock
    number: int
    request: Request
    prompt: np.ndarray  # int64


class Intake:
    """`add`, `cancel`, `swap` and `close` are for any thread, everything else for the engine's.

    wake: set when something has come.
    """

    def __init__(self, executor: Executor, options: Options) -> None:
        self.wake = threading.Event()
        self._executor = executor
        self._options = options
        self._lock = threading.Lock()
        self._open: dict[str, Request] = {}  # let in and not ended
        self._closed: str | None = None  # why nobody is let in any more
        self._inbox: list[tuple[Request, np.ndarray] | str | Policy] = []
        self._expected: list[Arrival] = []  # a heap of those that arrive later
        self._added = 0
        self._urgent = False  # an immediate request is in the inbox
        self._urgent_at_s = _NEVER_S  # when the next one is expected

    def add(self, request: Request) -> None:
        """Lets a request in; raises UserError if it can never run, EngineFull or EngineClosed if it cannot now."""
        if not isinstance(request, Request):
            raise UserError(f"{request!r} is no Request; make one of it.")
        executor, options = self._executor, self._options
        longest = int(executor.profile.values["max_model_len"])
        has_tokenizer = options.tokenizer is not None
        prompt = request.check(longest, executor.vocab_size, options.num_tenants, has_tokenizer)
        if request.images:
            executor.check_images(request)
        with self._lock:
            if self._closed is not None:
                raise EngineClosed(self._closed)
            if request.id in self._open:
                raise UserError(f"Request {request.id} is there already; give each request an id of its own.")
            if len(self._open) >= options.max_requests:
                raise EngineFull(f"The engine holds {len(self._open)} requests, as many as it can; try again later.")
            self._open[request.id] = request
            self._inbox.append((request, prompt))
            self._urgent |= request.immediate and request.arrival_s is None
        self.wake.set()

    def cancel(self, request_id: str) -> None:
        """Hands a cancellation in; raises UserError for what is no id."""
        if not isinstance(request_id, str):
            raise UserError(f"{request_id!r} is no request's id; give the text that the request has as its id.")
        self._put(request_id)

    def swap(self, policy: Policy) -> None:
        """Hands another policy in; raises UserError for what is none."""
        missing = [name for name in ("name", "every_iteration", "reset", "decide") if not hasattr(policy, name)]
        if missing:
            raise UserError(f"{policy!r} is no policy: it has no {missing[0]}; see flexirl.policies.interface.policy.")
        self._put(policy)

    def _put(self, item: str | Policy) -> None:
        with self._lock:
            self._inbox.append(item)
        self.wake.set()

    def close(self, why: str) -> None:
        """Lets nobody in any more; why: the sentence that they are refused with."""
        with self._lock:
            self._closed = self._closed or why
        self.wake.set()

    @property
    def open(self) -> list[Request]:
        """The requests that were let in and have not ended."""
        with self._lock:
            return list(self._open.values())

    @property
    def unfinished(self) -> int:
        """How many there are of them."""
        return len(self._open)

    def ended(self, request_id: str) -> None:
        """A request has ended: another may take its room, or its id."""
        with self._lock:
            self._open.pop(request_id, None)

    @property
    def waiting(self) -> bool:
        """True if something has come, or will at some time."""
        return bool(self._inbox or self._expected)

    @property
    def next_s(self) -> float:
        """When the next request is expected."""
        return self._expected[0].arrival_s if self._expected else _NEVER_S

    def take(self, now_s: float) -> Iterator[str | Policy]:
        """Empties the inbox: expects its requests, at `now_s` or later, and gives the rest of it in order."""
        self.wake.clear()
        with self._lock:
            items, self._inbox, self._urgent = self._inbox, [], False
        for item in items:
            if isinstance(item, tuple):
                request, prompt = item
                arrival_s = now_s if request.arrival_s is None else float(request.arrival_s)
                self._added += 1
                heapq.heappush(self._expected, Arrival(arrival_s, self._added, request, prompt))
            else:
                yield item

    def arrivals(self, now_s: float) -> Iterator[Arrival]:
        """Gives the expected requests whose time has come, in order."""
        while self._expected and self._expected[0].arrival_s <= now_s:
            yield heapq.heappop(self._expected)
        if self._options.safepoints:
            immediate = (arrival.arrival_s for arrival in self._expected if arrival.request.immediate)
            self._urgent_at_s = min(immediate, default=_NEVER_S)

    def withdraw(self, request_id: str) -> Request | None:
        """Expects a request no longer; None if it was not expected."""
        for i, arrival in enumerate(self._expected):
            if arrival.request.id == request_id:
                del self._expected[i]
                heapq.heapify(self._expected)
                return arrival.request
        return None

    def urgent(self, clock: Clock) -> bool:
        """True if an immediate request has come since the engine last looked."""
        return self._urgent or self._urgent_at_s <= clock.now_s()
