"""Tells clients what there is to tell them, in threads beside the engine's, which no client can hold up.

One courier calls all clients, in the order in which the engine has something to say. A client that takes long keeps
that courier to itself, and the others get a new one: quick clients share a thread, a slow one has its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from flexirl.runtime.live.guarded import Guard

_LOG = logging.getLogger(__name__)
_LONG_S = 0.005  # for one call
_IDLE_S = 1.0  # without a call, after which a courier goes home
_PATIENCE_S = 10.0  # without any call ending, after which the engine waits for its clients no more
_MOST_COURIERS = 256


class Client:
    """A callback, whose calls come one after the other; what: its kind, for the count of failures."""

    def __init__(self, what: str, function: Callable[..., object]) -> None:
        self.what, self.function = what, function
        self.courier: _Courier | None = None  # that it has to itself


class _Courier:
    """One thread: the calls it has to make, and the client it is with."""

    def __init__(self, lock: threading.Lock) -> None:
        self.calls: deque[tuple[Client, tuple[Any, ...]]] = deque()
        self.come = threading.Condition(lock)
        self.client: Client | None = None
        self.since_s = 0.0


class Delivery:
    """Calls clients, and lets `guard` count what they raise."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._lock = threading.Lock()  # of all that follows, couriers included
        self._ended = threading.Condition(self._lock)
        self._courier: _Courier | None = None  # of all clients that have none to themselves
        self._couriers = 0
        self._open = 0  # calls that have not ended

    def call(self, client: Client, *arguments: Any) -> None:
        """Has a client called, after what it is to be told before; returns at once."""
        with self._lock:
            self._open += 1
            courier = client.courier or self._courier or self._hire()
            courier.calls.append((client, arguments))
            courier.come.notify()

    def tend(self) -> None:
        """Parts a slow client from the others, if there is one; to be called now and then."""
        if self._open:
            with self._lock:
                self._part()

    def wait(self) -> None:
        """Returns when all calls have ended, or none has for so long that none will."""
        with self._lock:
            left, since_s = self._open, time.monotonic()
            while self._open:
                self._ended.wait(_LONG_S)
                self._part()
                if self._open != left:
                    left, since_s = self._open, time.monotonic()
                elif time.monotonic() > since_s + _PATIENCE_S:
                    _LOG.warning("%d calls of clients do not end; the engine waits for them no more", left)
                    return

    def _part(self) -> None:
        courier = self._courier
        if courier is None or courier.client is None or self._couriers >= _MOST_COURIERS:
            return
        if time.monotonic() > courier.since_s + _LONG_S:
            slow, calls = courier.client, courier.calls
            slow.courier, self._courier = courier, None
            courier.calls = deque(call for call in calls if call[0] is slow)
            if len(courier.calls) < len(calls):
                self._hire().calls.extend(call for call in calls if call[0] is not slow)

    def _hire(self) -> _Courier:
        self._courier = courier = _Courier(self._lock)
        self._couriers += 1
        threading.Thread(target=self._carry, args=(courier,), name="flexirl-delivery", daemon=True).start()
        return courier

    def _carry(self, courier: _Courier) -> None:
        """Makes a courier's calls until there has been none for a while."""
        client: Client | None = None
        while True:
            with self._lock:
                if not courier.calls:
                    courier.come.wait(_IDLE_S)
                if not courier.calls:
                    self._couriers -= 1
                    if self._courier is courier:
                        self._courier = None
                    elif client is not None:
                        client.courier = None
                    return
                client, arguments = courier.calls.popleft()
                courier.client, courier.since_s = client, time.monotonic()
            self._guard.call(client.what, client.function, *arguments)
            with self._lock:
                courier.client = None
                self._open -= 1
                self._ended.notify_all()
