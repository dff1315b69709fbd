"""Rewards: what the agent is paid each interval, as weights over events that cannot be moved in time.

Revenue is booked when a request completes, but paying it then would reward whoever brings completions forward. So a
deferred request in the batch is credited by its output, its prompt in step with it (crediting prefill at once would
reward whoever starts much and finishes little). The credit is suspended while the request is preempted, so that it
does not pay to start what is evicted again, and lost if its window closes. An immediate request costs its price at the
moment its promise can no longer be kept. The undiscounted sum is then the revenue less a constant. Where value counts,
it costs what lateness takes of its value, when that is known: at the first token, at the end, or when it is given up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexirl.errors import UserError
from flexirl.runtime.scheduler.accounts import Prices

REWARD = np.dtype(
    [
        ("prompt_price", "f8"),
        ("output_price", "f8"),
        ("deferred_discount", "f8"),
        ("deferred", "f8"),  # weight of deferred tokens made
        ("given_up", "f8"),  # price of an immediate request that was given up, as a multiple of what it would have paid
        ("loss", "f8"),  # weight of immediate promises broken
        ("lateness", "f8"),  # weight of what immediate requests lost of their value by being late or given up
        ("waiting", "f8"),  # weight of waiting: per immediate request in the system and TTFT SLO
        ("scale", "f8"),  # price units per second that count as a reward rate of 1
    ],
    align=True,
)


@dataclass(frozen=True)
class Reward:
    """A reward, with what it optimises. Deterministic: simulated quantities only, never the wall clock."""

    name: str
    optimises: str
    deferred: float
    loss: float
    waiting: float
    lateness: float = 0.0

    def __post_init__(self) -> None:
        for name in ("deferred", "loss", "lateness", "waiting"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
                raise UserError(f"reward.{name}={value} is out of range; a weight is a finite number.")

    def record(self, prices: Prices, scale: float) -> np.ndarray:
        """The weights for compiled code: an array of one `REWARD`; scale in price units per second."""
        return np.array(
            [
                (
                    prices.prompt, prices.output, prices.deferred, self.deferred, prices.given_up, self.loss,
                    self.lateness, self.waiting, scale,
                )
            ],
            REWARD,
        )  # fmt: skip
