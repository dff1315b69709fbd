"""The promise to an immediate request."""

from __future__ import annotations

from dataclasses import dataclass

from flexirl.errors import UserError

PATIENCE = 4.0  # times what was promised


@dataclass(frozen=True)
class SLO:
    """Time to the first token and mean time per output token after it, in seconds.

    patience: a late answer is worth less: its value falls linearly from the moment it was due to nothing at so many
    times the promised time, counted from arrival, for the first token and for the last. Whoever has no first token by
    then has given up.
    """

    ttft_s: float
    tpot_s: float
    patience: float = PATIENCE

    def __post_init__(self) -> None:
        for name, promised_s in (("ttft_s", self.ttft_s), ("tpot_s", self.tpot_s)):
            if not promised_s > 0:
                what = "time to first token" if name == "ttft_s" else "time per output token"
                raise UserError(f"slo.{name}={promised_s!r} is out of range; a {what} is positive.")
        if not 1 < self.patience < float("inf"):
            raise UserError(f"slo.patience={self.patience!r} is out of range; it is above 1, times what was promised.")
