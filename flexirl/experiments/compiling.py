"""What a run says while functions are compiled, which takes long after an installation and is silent by itself."""

from __future__ import annotations

import sys
import time
from functools import cache

from numba.core import event
from tqdm import tqdm

from flexirl.compile_cache import folder
from flexirl.progress import LINE_EVERY_S


class _Lines(event.Listener):
    """A line after every few seconds spent on compiling."""

    def __init__(self) -> None:
        self._functions = 0
        self._nested = 0  # functions begun: one calls for another
        self._silent_s = 0.0  # of earlier compiling, since the last line
        self._began_s = 0.0  # by this clock: the outermost function, or the last line since then

    def on_start(self, event: event.Event) -> None:
        """Numba begins to compile a function."""
        if self._nested == 0:
            self._began_s = time.monotonic()
        self._nested += 1

    def on_end(self, event: event.Event) -> None:
        """Numba has compiled a function."""
        self._functions += 1
        self._nested -= 1
        now_s = time.monotonic()
        silent_s = self._silent_s + now_s - self._began_s
        if silent_s >= LINE_EVERY_S:
            tqdm.write(f"compiling, {self._functions} functions so far; kept in {folder()}", file=sys.stderr)
            silent_s = 0.0
        if silent_s == 0.0 or self._nested == 0:
            self._silent_s, self._began_s = silent_s, now_s


@cache
def tell() -> None:
    """From now on, once in a process."""
    event.register("numba:compile", _Lines())
