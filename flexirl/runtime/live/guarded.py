"""Calls to what is not the engine's own, a client's callback or a policy: whatever they do, the engine goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from flexirl.policies.interface.decision import default_decision, unsound
from flexirl.policies.interface.policy import Policy
from flexirl.policies.interface.view import View

_LOG = logging.getLogger(__name__)
_LOGGED = 3  # failures of one kind


class Guard:
    """Calls out, and counts what failed, by what it was: a callback's name, or the policy."""

    def __init__(self) -> None:
        self.failures: dict[str, int] = {}

    def call(self, what: str, function: Callable[..., object] | None, *arguments: Any) -> None:
        """Calls a callback, if there is one."""
        if function is None:
            return
        try:
            function(*arguments)
        except Exception as error:
            self._count(what, f"{type(error).__name__}: {error}")

    def ask(self, policy: Policy, view: View) -> np.ndarray:
        """The policy's decision, a 0-d array of `DECISION`; the default one where it raises or says what cannot be."""
        try:
            decision = policy.decide(view)
            trouble = unsound(decision)
        except Exception as error:
            trouble = f"{type(error).__name__}: {error}"
        if trouble is None:
            return decision
        self._count("policy", f"{policy.name}: {trouble}; the default decision is in force")
        return default_decision()

    def _count(self, what: str, trouble: str) -> None:
        self.failures[what] = self.failures.get(what, 0) + 1
        if self.failures[what] <= _LOGGED:
            _LOG.warning("%s failed (%s)", what, trouble)
