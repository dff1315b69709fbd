"""Scenarios: an immediate stream and a deferred stream, drawn together into one `Trace` from a seed.

What a row costs the engine is the engine's business; it is passed in as `service_time_s`, a function from rows of
`TRACE_ROW` to seconds of the whole engine, float64 of the same length. It must depend on each row alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flexirl.errors import UserError
from flexirl.workloads.arrivals import ArrivalProcess, Poisson
from flexirl.workloads.lengths import LengthModel
from flexirl.workloads.readers import read_trace
from flexirl.workloads.slo import SLO
from flexirl.workloads.trace import DEFERRED, IMMEDIATE, Trace, empty_rows, merge, take

ServiceTime = Callable[[np.ndarray], NDArray[np.float64]]

# One independent random stream each, so that changing one part of a scenario leaves the draws of the others alone.
# Append only: a stream's place decides its seed.
RANDOM_STREAMS = (
    "arrivals", "lengths", "tenants", "tiers", "predictor",
    "deferred_arrivals", "deferred_lengths", "deferred_tenants", "deferred_predictor", "deferred_windows",
)  # fmt: skip

MOST_REQUESTS = 10_000_000  # in one episode: a few GB
MEAN_SAMPLE = 20_000  # requests drawn to estimate a length model's mean service time


def require(ok: bool, name: str, value: object, rule: str) -> None:
    """Raises UserError unless ok."""
    if not ok:
        raise UserError(f"{name}={value!r} is out of range; {rule}.")


@dataclass(frozen=True)
class Tier:
    """A promise that a share of the immediate requests has; shares are relative.

    window_s: promised seconds from arrival to the last token; inf where none.
    """

    share: float
    ttft_s: float
    tpot_s: float
    window_s: float = math.inf

    def __post_init__(self) -> None:
        require(self.share > 0, "slo_tiers.share", self.share, "a tier's share is positive")
        require(self.window_s > 0, "slo_tiers.window_s", self.window_s, "a completion window is positive")
        SLO(self.ttft_s, self.tpot_s)


@dataclass(frozen=True)
class Tenants:
    """`count` tenants whose shares of the requests follow a Zipf law: tenant k (from 0) has share (k + 1)^-skew."""

    count: int = 1
    skew: float = 0.0

    def __post_init__(self) -> None:
        require(self.count >= 1, "tenants.count", self.count, "there is at least 1 tenant")

    def draw(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Tenant numbers of `count` requests."""
        if self.count == 1:
            return np.zeros(count, dtype=np.int64)
        ends = np.cumsum(np.arange(1, self.count + 1) ** -float(self.skew))
        return np.searchsorted(ends / ends[-1], rng.random(count), side="right").clip(max=self.count - 1)


@dataclass(frozen=True)
class Predictor:
    """An output-length predictor: the true length times a lognormal error of median 1.

    error: standard deviation of the logarithm; 0 is an oracle. Off, it predicts nothing (0 tokens).
    """

    enabled: bool = False
    error: float = 0.5

    def __post_init__(self) -> None:
        require(self.error >= 0, "predictor.error", self.error, "the error is 0 or more")

    def fill(self, rows: np.ndarray, rng: np.random.Generator) -> None:
        """Sets predicted_output_tokens, from 1 to max_tokens."""
        if self.enabled:
            guess = rows["output_tokens"] * np.exp(self.error * rng.standard_normal(len(rows)))
            rows["predicted_output_tokens"] = np.clip(np.rint(guess), 1, rows["max_tokens"])


class PerServiceTime:
    """Remembers the last value that was derived from a service-time function; drawing many episodes asks often."""

    def __init__(self) -> None:
        self._of: ServiceTime | None = None
        self._value = 0.0

    def get(self, service_time_s: ServiceTime, derive: Callable[[], float]) -> float:
        """The value for this function, derived where it is another than the last time."""
        # ==, not `is`: every access to a bound method makes a new object.
        if self._of is None or self._of != service_time_s:
            self._value = derive()
            self._of = service_time_s
        return self._value


def _mean_service_s(lengths: LengthModel, service_time_s: ServiceTime) -> float:
    rows = empty_rows(MEAN_SAMPLE)
    lengths.fill(rows, np.random.default_rng(0))  # the same for every episode: load is a property of the scenario
    return positive(float(np.mean(service_time_s(rows))))


def positive(seconds: float) -> float:
    """The seconds; raises UserError where they say that no request fits the engine."""
    if not (math.isfinite(seconds) and seconds > 0):
        raise UserError(
            f"requests cost {seconds:g} s of the engine, since none of them fits it; give it a longer "
            "engine.max_model_len and a larger engine.kv_blocks, or shorten the requests."
        )
    return seconds


Rngs = dict[str, np.random.Generator]


class ImmediateStream(Protocol):
    """Where immediate requests come from."""

    num_tenants: int

    def length_s(self, duration_s: float | None, service_time_s: ServiceTime) -> float:
        """Length of one draw in seconds."""
        ...

    def draw(self, duration_s: float | None, service_time_s: ServiceTime, rngs: Rngs) -> Trace:
        """Requests without promises."""
        ...


def duration_of_synthetic(duration_s: float | None) -> float:
    """The duration in seconds that requests which are drawn need; raises UserError without one."""
    if duration_s is None:
        raise UserError("workload.duration_s=null is for traces; give a synthetic workload a duration in seconds.")
    return duration_s


@dataclass(frozen=True)
class Synthetic:
    """Immediate requests from an arrival process and a length model.

    load: service seconds that arrive per second, in expectation; the request rate is load over the mean service time.
    """

    arrivals: ArrivalProcess
    lengths: LengthModel
    load: float
    tenants: Tenants = field(default_factory=Tenants)
    _mean: PerServiceTime = field(default_factory=PerServiceTime, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require(self.load > 0, "workload.load", self.load, "the load is positive; 1 is the engine's capacity")

    @property
    def num_tenants(self) -> int:
        """Tenants are numbered from 0 to one less."""
        return self.tenants.count

    def length_s(self, duration_s: float | None, service_time_s: ServiceTime) -> float:
        """See `ImmediateStream.length_s`; raises UserError without a duration."""
        return duration_of_synthetic(duration_s)

    def rate_per_s(self, service_time_s: ServiceTime) -> float:
        """Mean requests per second."""
        return self.load / self._mean.get(service_time_s, lambda: _mean_service_s(self.lengths, service_time_s))

    def draw(self, duration_s: float | None, service_time_s: ServiceTime, rngs: Rngs) -> Trace:
        """See `ImmediateStream.draw`."""
        rate_per_s, length_s = self.rate_per_s(service_time_s), self.length_s(duration_s, service_time_s)
        if rate_per_s * length_s > MOST_REQUESTS:
            raise UserError(
                f"workload.load={self.load:g} would be {rate_per_s * length_s:.3g} requests in {length_s:g} s; an "
                f"episode has {MOST_REQUESTS:,} at most."
            )
        times = self.arrivals.draw(rate_per_s, length_s, rngs["arrivals"])
        rows = empty_rows(len(times))
        rows["arrival_s"] = times
        self.lengths.fill(rows, rngs["lengths"])
        rows["tenant"] = self.tenants.draw(len(rows), rngs["tenants"])
        return Trace(rows, "synthetic", self.num_tenants)


class Recorded:
    """Requests of a recorded trace, whole or a window at a random place; whole where it is shorter than a window.

    load: time is rescaled by one factor so that the service seconds of the immediate requests of the WHOLE file over
    its rescaled length are exactly this; None keeps the recorded times. Bursts stay bursts: a window's own load differs
    from it. The length of a file is the time from its first to its last arrival plus one mean gap.
    """

    def __init__(
        self,
        path: str,
        load: float | None,
        format: str | None = None,
        seed: int = 0,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        require(load is None or load > 0, "workload.load", load, "the load is positive; 1 is the engine's capacity")
        self.trace = read_trace(path, format, seed, columns)
        self.load = load
        self.num_tenants = self.trace.num_tenants
        arrival_s = self.trace.rows["arrival_s"]
        self._since_first_s = arrival_s - arrival_s[0]
        last = float(self._since_first_s[-1])
        if load is None and last == 0:
            raise UserError(
                f"{self.trace.name} has all of its {len(arrival_s)} requests at one time, which is no rate; give "
                "workload.load, the share of the engine's capacity at which they are to arrive."
            )
        self._span_s = last * len(arrival_s) / (len(arrival_s) - 1) if last > 0 else 1.0
        self._demand = PerServiceTime()

    @property
    def has_deferred(self) -> bool:
        """True if any of its requests is deferred."""
        return bool((self.trace.rows["request_class"] == DEFERRED).any())

    def own_load(self, request_class: int, service_time_s: ServiceTime) -> float:
        """Service seconds that the class's requests need for each second of the recorded times."""
        return float(np.sum(service_time_s(self.trace.of_class(request_class)))) / self._span_s

    def time_factor(self, service_time_s: ServiceTime) -> float:
        """What recorded times are multiplied by."""
        if self.load is None:
            return 1.0
        demand = self._demand.get(service_time_s, lambda: positive(self.own_load(IMMEDIATE, service_time_s)))
        return demand / self.load

    def length_s(self, duration_s: float | None, service_time_s: ServiceTime) -> float:
        """See `ImmediateStream.length_s`; the whole file's rescaled length where duration_s is None."""
        whole_s = self.time_factor(service_time_s) * self._span_s
        return whole_s if duration_s is None else min(duration_s, whole_s)

    def draw(self, duration_s: float | None, service_time_s: ServiceTime, rngs: Rngs) -> Trace:
        """See `ImmediateStream.draw`; deferred requests of the file are among them."""
        factor = self.time_factor(service_time_s)
        room_s = -1.0 if duration_s is None else self._span_s * factor - duration_s
        if duration_s is None or room_s < 0:
            rows = self.trace.rows.copy()
            rows["arrival_s"] = self._since_first_s * factor
            return replace(self.trace, rows=rows)
        start_s = rngs["arrivals"].random() * room_s
        first, end = np.searchsorted(self._since_first_s, [start_s / factor, (start_s + duration_s) / factor])
        rows = take(self.trace.rows, np.arange(first, end))
        # Rounding of the bounds may leave an arrival a hair outside.
        offset_s = self._since_first_s[first:end] * factor - start_s
        rows["arrival_s"] = np.clip(offset_s, 0.0, np.nextafter(duration_s, 0.0))
        return replace(self.trace, rows=rows).trimmed()


@dataclass(frozen=True)
class Silent:
    """No immediate requests."""

    num_tenants: int = field(default=1, init=False)

    def length_s(self, duration_s: float | None, service_time_s: ServiceTime) -> float:
        """See `ImmediateStream.length_s`; raises UserError without a duration."""
        if duration_s is None:
            raise UserError("workload.duration_s=null is for traces; give this workload a duration in seconds.")
        return duration_s

    def draw(self, duration_s: float | None, service_time_s: ServiceTime, rngs: Rngs) -> Trace:
        """See `ImmediateStream.draw`."""
        return Trace(empty_rows(0), "none", 1)


class DeferredStream(Protocol):
    """Where deferred requests come from."""

    num_tenants: int

    def draw(self, duration_s: float, service_time_s: ServiceTime, rngs: Rngs) -> Trace:
        """Requests with their completion windows."""
        ...


@dataclass(frozen=True)
class Backlog:
    """Deferred requests that all wait from time 0, more than the engine can serve; no deadline.

    margin: their service seconds are at least margin * duration_s.
    """

    lengths: LengthModel
    margin: float = 1.3
    tenants: Tenants = field(default_factory=Tenants)
    _mean: PerServiceTime = field(default_factory=PerServiceTime, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require(self.margin > 0, "deferred.margin", self.margin, "the margin is positive, above 1 to never run out")

    @property
    def num_tenants(self) -> int:
        """Tenants are numbered from 0 to one less."""
        return self.tenants.count

    def draw(self, duration_s: float, service_time_s: ServiceTime, rngs: Rngs) -> Trace:
        """See `DeferredStream.draw`."""
        needed_s = self.margin * duration_s
        mean_s = self._mean.get(service_time_s, lambda: _mean_service_s(self.lengths, service_time_s))
        parts: list[np.ndarray] = []
        missing_s = needed_s
        while missing_s > 0:
            rows = empty_rows(int(1.05 * missing_s / mean_s) + 16)
            self.lengths.fill(rows, rngs["deferred_lengths"])
            total = np.cumsum(service_time_s(rows))
            enough = int(np.searchsorted(total, missing_s)) + 1
            parts.append(rows[:enough])
            missing_s -= float(total[min(enough, len(total)) - 1])
        rows = np.concatenate(parts)
        rows["tenant"] = self.tenants.draw(len(rows), rngs["deferred_tenants"])
        return Trace(rows, "backlog", self.num_tenants)


@dataclass(frozen=True)
class Batches:
    """Deferred requests in files: batch_size requests of one tenant at once, due window_s * time_scale later.

    Files arrive at times_s, or in a Poisson process of mean gap interval_s, or in one whose mean gap makes their
    service seconds arrive at `load` per second. The window of today's batch APIs is 24 h; time_scale shrinks it for a
    short scenario. Where there are several windows, each file has one of them, all equally likely.
    """

    lengths: LengthModel
    batch_size: int
    interval_s: float | None = None
    times_s: tuple[float, ...] | None = None
    load: float | None = None
    window_s: tuple[float, ...] = (86400.0,)
    time_scale: float = 1.0
    tenants: Tenants = field(default_factory=Tenants)
    _mean: PerServiceTime = field(default_factory=PerServiceTime, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "deferred.batch_size", self.batch_size, "a file has at least 1 request")
        require(
            [self.interval_s, self.times_s, self.load].count(None) == 2, "deferred.interval_s", self.interval_s,
            "give one of interval_s, times_s and load, the others null",
        )  # fmt: skip
        require(
            self.interval_s is None or self.interval_s > 0, "deferred.interval_s", self.interval_s,
            "the mean gap between files is positive",
        )  # fmt: skip
        require(
            all(time >= 0 for time in self.times_s or ()),
            "deferred.times_s",
            self.times_s,
            "files arrive at 0 or later",
        )
        require(self.load is None or self.load > 0, "deferred.load", self.load, "the load is positive")
        require(
            len(self.window_s) > 0 and min(self.window_s) > 0, "deferred.window_s", self.window_s,
            "a completion window is positive",
        )  # fmt: skip
        require(self.time_scale > 0, "deferred.time_scale", self.time_scale, "the scale is positive")

    @property
    def num_tenants(self) -> int:
        """Tenants are numbered from 0 to one less."""
        return self.tenants.count

    def draw(self, duration_s: float, service_time_s: ServiceTime, rngs: Rngs) -> Trace:
        """See `DeferredStream.draw`."""
        if self.times_s is not None:
            times = np.sort(np.asarray(self.times_s, dtype=np.float64))
            times = times[times < duration_s]
        else:
            times = Poisson().draw(1 / self._gap_s(service_time_s), duration_s, rngs["deferred_arrivals"])
        rows = empty_rows(len(times) * self.batch_size)
        rows["arrival_s"] = np.repeat(times, self.batch_size)
        windows_s = rngs["deferred_windows"].choice(self.window_s, len(times)) * self.time_scale
        rows["window_s"] = np.repeat(windows_s, self.batch_size)
        self.lengths.fill(rows, rngs["deferred_lengths"])
        rows["tenant"] = np.repeat(self.tenants.draw(len(times), rngs["deferred_tenants"]), self.batch_size)
        return Trace(rows, "batches", self.num_tenants)

    def _gap_s(self, service_time_s: ServiceTime) -> float:
        """Mean seconds between files."""
        if self.interval_s is not None:
            return self.interval_s
        assert self.load is not None
        mean_s = self._mean.get(service_time_s, lambda: _mean_service_s(self.lengths, service_time_s))
        return self.batch_size * mean_s / self.load


@dataclass(frozen=True)
class OfFile:
    """The deferred requests of the recorded trace that the immediate ones are of; `otherwise`, if it has none."""

    otherwise: DeferredStream

    @property
    def num_tenants(self) -> int:
        """Tenants are numbered from 0 to one less."""
        return self.otherwise.num_tenants

    def draw(self, duration_s: float, service_time_s: ServiceTime, rngs: Rngs) -> Trace:
        """See `DeferredStream.draw`; those of a file come from it."""
        return self.otherwise.draw(duration_s, service_time_s, rngs)


@dataclass(frozen=True)
class NoDeferred:
    """No deferred requests."""

    num_tenants: int = field(default=1, init=False)

    def draw(self, duration_s: float, service_time_s: ServiceTime, rngs: Rngs) -> Trace:
        """See `DeferredStream.draw`."""
        return Trace(empty_rows(0), "none", 1)


@dataclass(frozen=True)
class Scenario:
    """Two streams of requests over a span of time.

    duration_s: length of one draw in seconds; None is the whole of a recorded trace. warmup_s: the first seconds,
    which measurements leave out. slo_tiers: promises among which immediate requests are divided; empty, all of them
    have the SLO given to `draw`.
    """

    name: str
    immediate: ImmediateStream
    deferred: DeferredStream
    duration_s: float | None
    warmup_s: float = 0.0
    slo_tiers: tuple[Tier, ...] = ()
    predictor: Predictor = field(default_factory=Predictor)

    def __post_init__(self) -> None:
        require(
            self.duration_s is None or self.duration_s > 0, "workload.duration_s", self.duration_s, "it is positive"
        )
        require(
            0 <= self.warmup_s < (self.duration_s or math.inf), "workload.warmup_s", self.warmup_s,
            "it is at least 0 and less than workload.duration_s",
        )  # fmt: skip

    @property
    def invents_deferred(self) -> bool:
        """False if deferred requests are those of a recorded file."""
        of_file = isinstance(self.immediate, Recorded) and self.immediate.has_deferred
        return not (of_file and isinstance(self.deferred, OfFile))

    def length_s(self, service_time_s: ServiceTime) -> float:
        """Length of one draw in seconds, for this engine; raises UserError where the warm-up leaves nothing of it."""
        length_s = self.immediate.length_s(self.duration_s, service_time_s)
        if self.warmup_s >= length_s:
            raise UserError(
                f"{self.name} lasts {length_s:.6g} s, no longer than workload.warmup_s={self.warmup_s:g}, so nothing "
                "would be measured; set workload.warmup_s=0."
            )
        return length_s

    def draw(self, seed: int, service_time_s: ServiceTime, slo: SLO) -> Trace:
        """The requests of one episode: the same for the same seed and engine, on any machine.

        Arrivals lie in [0, length_s). Raises UserError where the configuration cannot be met.
        """
        children = np.random.SeedSequence(seed).spawn(len(RANDOM_STREAMS))
        rngs = {name: np.random.default_rng(child) for name, child in zip(RANDOM_STREAMS, children, strict=True)}

        recorded = self.immediate.draw(self.duration_s, service_time_s, rngs)
        of_file = recorded.rows["request_class"] == DEFERRED
        which = np.flatnonzero(~of_file)
        immediate = recorded.rows[which]
        tiers = self.slo_tiers or (Tier(1.0, slo.ttft_s, slo.tpot_s),)
        ends = np.cumsum([tier.share for tier in tiers])
        tier = np.searchsorted(ends / ends[-1], rngs["tiers"].random(len(immediate)), side="right")
        tier = tier.clip(max=len(tiers) - 1)
        immediate["ttft_slo_s"] = np.array([tier.ttft_s for tier in tiers])[tier]
        immediate["tpot_slo_s"] = np.array([tier.tpot_s for tier in tiers])[tier]
        immediate["window_s"] = np.array([tier.window_s for tier in tiers])[tier]
        self.predictor.fill(immediate, rngs["predictor"])

        recorded.rows[which] = immediate

        if self.invents_deferred:
            deferred = self.deferred.draw(self.length_s(service_time_s), service_time_s, rngs)
            deferred.rows["request_class"] = DEFERRED
            self.predictor.fill(deferred.rows, rngs["deferred_predictor"])
            return merge([replace(recorded, rows=take(recorded.rows, which)), deferred], self.name)
        of_file_rows = recorded.rows[of_file]
        self.predictor.fill(of_file_rows, rngs["deferred_predictor"])
        recorded.rows[of_file] = of_file_rows
        return replace(recorded, name=self.name, num_tenants=max(recorded.num_tenants, self.deferred.num_tenants))
