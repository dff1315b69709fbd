"""Who decides: the policy in charge, whoever stands in where it fails, and a shadow that is asked but not obeyed."""

from __future__ import annotations

import logging
import time

import numpy as np

from flexirl.errors import UserError
from flexirl.policies.interface.decision import default_decision, unsound
from flexirl.policies.interface.policy import Policy, interval_of
from flexirl.policies.interface.view import View
from flexirl.runtime.live.guarded import Guard, words
from flexirl.runtime.live.options import Options
from flexirl.runtime.scheduler.accounts import histogram_percentile
from flexirl.runtime.scheduler.books import itl_bin
from flexirl.runtime.scheduler.looking import Lookout
from flexirl.runtime.scheduler.state import ITL_BINS, State
from flexirl.workloads.slo import SLO

_LOG = logging.getLogger(__name__)


class Deciding:
    """Puts decisions in force in `state`. Whatever a policy raises or says, there is one that can be carried out."""

    def __init__(self, policy: Policy, state: State, slo: SLO, options: Options) -> None:
        self.policy = policy
        self._decision = state.decision
        self._lookout = Lookout(state, slo)
        self._asked_s = options.interval_s
        if self._asked_s is not None and not 0 < self._asked_s < float("inf"):
            raise UserError(f"interval_s={self._asked_s} is out of range; decisions are some seconds apart.")
        self._fallback = options.fallback
        self._shadow = options.shadow
        self._swaps = 0
        self._guard = Guard()  # counts by reason
        self._durations = np.zeros(ITL_BINS, np.int64)
        view = self._lookout.look()
        policy.reset(view)
        if self._fallback is not None:
            self._fallback.reset(view)
        if self._shadow is not None:
            self._shadow.reset(view)

    @property
    def interval_s(self) -> float:
        """Seconds between decisions of the policy in charge."""
        return interval_of(self.policy, self._asked_s)

    def decide(self) -> None:
        """Asks the policy and puts its decision in force."""
        view = self._lookout.look()
        began_s = time.perf_counter()
        self._decision[0] = self._ask(self.policy, view)
        self._durations[itl_bin(time.perf_counter() - began_s)] += 1
        if self._shadow is not None:
            self._shadow.compare(view, self._decision[0])

    def _ask(self, policy: Policy, view: View) -> np.ndarray:
        try:
            decision = policy.decide(view)
            trouble = unsound(decision)
            if trouble is None:
                return decision
            reason = "unsound"
        except Exception as error:
            reason, trouble = type(error).__name__, words(error)
        if policy is self._fallback:
            return default_decision()
        other = "the default decision" if self._fallback is None else self._fallback.name
        self._guard.count(reason, f"{policy.name} cannot decide ({trouble}); {other} is in force instead")
        return default_decision() if self._fallback is None else self._ask(self._fallback, view)

    def swap(self, policy: Policy) -> bool:
        """Hands over to another policy; False if that cannot start, which is logged."""
        try:
            policy.reset(self._lookout.look())
        except Exception as error:  # requests must not suffer for it
            _LOG.warning("%s cannot take over (%s); %s goes on", policy.name, error, self.policy.name)
            return False
        self.policy = policy
        self._swaps += 1
        return True

    def metrics(self) -> dict[str, float]:
        """Counts since the start, and how long decisions took (seconds; 0 before the first)."""
        # A learned policy has a fallback of its own, and counts what that decides.
        failures = (self._guard.failures, getattr(self.policy, "failures", {}))
        return {
            "policy_swaps": self._swaps,
            "fallback_decisions": sum(count for counts in failures for count in counts.values()),
            "shadow_differences": 0 if self._shadow is None else self._shadow.differences,
            "decisions": int(self._durations.sum()),
            "decision_median_s": histogram_percentile(self._durations, 50) or 0.0,
            "decision_p99_s": histogram_percentile(self._durations, 99) or 0.0,
        }
