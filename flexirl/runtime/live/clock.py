"""The clock a live engine runs by: the wall's, or one that skips idle time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol


class Clock(Protocol):
    """Seconds since the engine was made."""

    def now_s(self) -> float:
        """The time now; never less than before."""
        ...

    def resume(self) -> None:
        """The engine goes to work: time passes."""
        ...

    def pause(self) -> None:
        """The engine hands over to whoever decides."""
        ...

    def wait(self, until_s: float, wake: threading.Event) -> bool:
        """Lets time pass to `until_s` at the latest, or until `wake` is set; False if nothing can ever come."""
        ...


class WallClock:
    """Real time, which passes whatever the engine does."""

    def __init__(self) -> None:
        self._began_s = time.perf_counter()

    def now_s(self) -> float:
        """See `Clock`."""
        return time.perf_counter() - self._began_s

    def resume(self) -> None:
        """Nothing: it never stood still."""

    def pause(self) -> None:
        """Nothing: it does not stop."""

    def wait(self, until_s: float, wake: threading.Event) -> bool:
        """Sleeps; somebody may always come."""
        seconds = until_s - self.now_s()
        wake.wait(min(max(seconds, 0.0), threading.TIMEOUT_MAX))
        return True


class VirtualClock:
    """Time at work counts as measured; idle time is skipped, and while the engine is paused none passes."""

    def __init__(self, measured_s: Callable[[], float] = time.perf_counter) -> None:
        """measured_s: the seconds that work is measured in."""
        self._measured_s = measured_s
        self._passed_s = 0.0
        self._resumed_s: float | None = None

    def now_s(self) -> float:
        """See `Clock`."""
        return self._passed_s + (0.0 if self._resumed_s is None else self._measured_s() - self._resumed_s)

    def resume(self) -> None:
        """See `Clock`."""
        if self._resumed_s is None:
            self._resumed_s = self._measured_s()

    def pause(self) -> None:
        """See `Clock`."""
        self._passed_s, self._resumed_s = self.now_s(), None

    def wait(self, until_s: float, wake: threading.Event) -> bool:
        """Jumps to `until_s`; nobody comes who is not expected."""
        if until_s == float("inf"):
            return False
        if until_s > self.now_s():
            self._passed_s = until_s
            self._resumed_s = None if self._resumed_s is None else self._measured_s()
        return True
