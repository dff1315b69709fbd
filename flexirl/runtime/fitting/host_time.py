"""What measured operators cannot tell: the host's time per iteration, from a part of a recorded run.

Python, scheduling, copies and launches take time beside the operators. On the first third of a record's requests it is
set such that their mean end-to-end latency is the recorded one; the rest is left to judge it by.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from flexirl.policies.interface.policy import Policy
from flexirl.runtime.fitting.replay import Record, Served, replay
from flexirl.runtime.profile.engine import EngineProfile

LEAST_REQUESTS = 30  # of a record, or its first third says nothing
ENOUGH = 1e-4  # of the latency: less is not missing
_LONGEST_S = 0.1
_HALVINGS = 14  # of the range: to some microseconds


def first_third(count: int) -> slice:
    """The requests of a record, in order of arrival, that host time is fitted to."""
    return slice(0, count // 3) if count >= LEAST_REQUESTS else slice(0, 0)


def with_host_time(engine: EngineProfile, record: Record, policy: Policy) -> EngineProfile:
    """The engine with the host time that fits; as it is for a short record, or where no time is missing."""
    part = first_third(len(record.trace))
    if part.stop == 0:
        return engine

    def too_slow(host_s: float) -> bool:
        served = replay(policy, engine.replace(host_s=host_s), record.trace, record.asynchronous)[0]
        return _mean_e2e_s(served, part) >= (1 - ENOUGH) * _mean_e2e_s(record.served, part)

    if too_slow(0.0):
        return engine
    least, most = 0.0, 0.001
    while not too_slow(most) and most < _LONGEST_S:
        least, most = most, 2 * most
    for _ in range(_HALVINGS):
        middle = (least + most) / 2
        least, most = (least, middle) if too_slow(middle) else (middle, most)
    origin = f"fitted to the latency of the first {part.stop} requests of the recorded run"
    return replace(engine.replace(host_s=most), origin={**engine.origin, "host_s": origin})


def _mean_e2e_s(served: Served, part: slice) -> float:
    return float(np.mean(served.e2e_s[part]))
