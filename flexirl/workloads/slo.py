"""The promise to an immediate request."""

from __future__ import annotations

from dataclasses import dataclass

from flexirl.errors import UserError


@dataclass(frozen=True)
class SLO:
    """Time to the first token and mean time per output token after it, in seconds."""

    ttft_s: float
    tpot_s: float

    def __post_init__(self) -> None:
        for name, promised_s in (("ttft_s", self.ttft_s), ("tpot_s", self.tpot_s)):
            if not promised_s > 0:
                what = "time to first token" if name == "ttft_s" else "time per output token"
                raise UserError(f"slo.{name}={promised_s!r} is out of range; a {what} is positive.")
