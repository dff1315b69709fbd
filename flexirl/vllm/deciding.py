"""The policy in charge of a vLLM scheduler; where it fails, vLLM's own order holds for that step."""

from __future__ import annotations

import logging
import time

import numpy as np

from flexirl.policies.interface.decision import unsound
from flexirl.policies.interface.policy import Policy, interval_of
from flexirl.policies.interface.view import View
from flexirl.runtime.scheduler.looking import Lookout

_LOG = logging.getLogger("vllm.flexirl")


class Failures:
    """Counts what went wrong, by kind; the first of a kind is logged."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def count(self, kind: str, sentence: str, error: BaseException | None = None) -> None:
        """Something of this kind went wrong."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if self.counts[kind] == 1:
            _LOG.warning("%s (further ones are only counted)", sentence, exc_info=error)


class Deciding:
    """Asks the policy when it is time. interval_s, time_limit_s: see `Settings`."""

    def __init__(
        self, policy: Policy, interval_s: float | None, time_limit_s: float | None, failures: Failures
    ) -> None:
        self.policy = policy
        self._interval_s = interval_of(policy, interval_s)
        self._time_limit_s = time_limit_s
        self._failures = failures
        self._next_s = -np.inf

    def start(self, view: View) -> None:
        """Begins anew. The first decision, which compiles, is made here; raises what the policy raises at its reset."""
        self.policy.reset(view)
        try:
            self.policy.decide(view)
        except Exception:
            pass  # it is told of when it is asked in earnest
        self.policy.reset(view)
        self._next_s = -np.inf

    def due(self, now_s: float) -> bool:
        """True if the policy is to be asked."""
        return self.policy.every_iteration or now_s >= self._next_s

    def ask(self, lookout: Lookout, now_s: float) -> np.ndarray | None:
        """A decision that can be carried out, or None."""
        name = self.policy.name
        try:
            view = lookout.look()
            began_s = time.perf_counter()
            decision = self.policy.decide(view)
            took_s = time.perf_counter() - began_s
            fault = unsound(decision)
        except Exception as error:
            self._failures.count(
                type(error).__name__, f"{name} cannot decide ({error}); vLLM's own order holds for the step"
            )
            return None
        if fault is not None:
            self._failures.count("unsound", f"{name} decides {fault}; vLLM's own order holds for the step")
            return None
        if self._time_limit_s is not None and took_s > self._time_limit_s:
            self._failures.count(
                "too late", f"{name} took {took_s:.3f} s to decide; vLLM's own order holds for the step"
            )
            return None
        self._next_s = now_s + self._interval_s
        return decision
