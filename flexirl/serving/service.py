"""The parts of one running service, and what it was told at its start."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from flexirl.errors import UserError
from flexirl.serving.backend import Backend, Terms
from flexirl.serving.batch_runner import BatchRunner
from flexirl.serving.errors import ApiError
from flexirl.serving.metrics import Metrics
from flexirl.serving.store import Store
from flexirl.serving.tenants import Tenant, Tenants
from flexirl.workloads.trace import DEFERRED, IMMEDIATE


@dataclass(frozen=True)
class Tier:
    """What a request of a service tier is promised; with a window it is deferred."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    window_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s", "window_s"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 0 < value < float("inf")):
                raise UserError(f"A tier has {name}={value!r}; give a positive number of seconds, or null.")


@dataclass
class Service:
    """folder: for policies that are sent; most_bytes: of a file."""

    backend: Backend
    store: Store
    runner: BatchRunner
    metrics: Metrics
    tenants: Tenants
    folder: Path
    tiers: dict[str, Tier] = field(default_factory=lambda: {"default": Tier()})
    most_bytes: int = 200_000_000

    def terms(self, tier: object, tenant: Tenant) -> Terms:
        """What is asked for with `service_tier`; raises ApiError for a tier that there is not."""
        name = "default" if tier is None or tier == "auto" else tier
        if not isinstance(name, str) or name not in self.tiers:
            known = ", ".join(["auto", *self.tiers])
            raise ApiError(400, f"service_tier={str(name)[:40]!r} is none of {known}.", param="service_tier")
        promise = self.tiers[name]
        deferred = promise.window_s is not None
        return Terms(
            DEFERRED if deferred else IMMEDIATE, promise.ttft_s, promise.tpot_s, promise.window_s or float("inf"),
            tenant.name, name,
        )  # fmt: skip
