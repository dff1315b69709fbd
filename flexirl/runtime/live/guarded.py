"""Calls to what is not the engine's own: whatever they raise is counted and logged, and the engine goes on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

_LOG = logging.getLogger(__name__)
_LOGGED = 3  # failures of one kind


def words(error: BaseException) -> str:
    """An exception in a sentence's brackets."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


class Guard:
    """Counts failures by kind; safe to use from several threads."""

    def __init__(self) -> None:
        self.failures: dict[str, int] = {}
        self._lock = threading.Lock()

    def call(self, what: str, function: Callable[..., object], *arguments: Any) -> None:
        """Calls a function whose result nobody needs; `what` it is, is the kind of a failure."""
        try:
            function(*arguments)
        except Exception as error:
            self.count(what, f"{what} failed ({words(error)})")

    def count(self, kind: str, trouble: str) -> None:
        """Something of this kind has failed; `trouble` says it in a sentence."""
        with self._lock:
            self.failures[kind] = count = self.failures.get(kind, 0) + 1
        if count <= _LOGGED:
            _LOG.warning("%s", trouble)
