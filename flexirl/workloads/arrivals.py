"""Arrival processes: when requests arrive, given a mean rate.

Every process is a frozen dataclass of its parameters with one method, `draw(rate_per_s, duration_s, rng)`, which
returns sorted times in [0, duration_s) whose expected number is rate_per_s * duration_s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import special

from flexirl.errors import UserError

Times = NDArray[np.float64]
DistributionName = Literal["uniform", "poisson", "gaussian", "inverse_gaussian", "zipf"]

ZIPF_SLOTS = 100  # slots of a segment among which an inner Zipf distribution divides its requests


class ArrivalProcess(Protocol):
    """Anything that can say when requests arrive."""

    def draw(self, rate_per_s: float, duration_s: float, rng: np.random.Generator) -> Times:
        """Sorted arrival times in seconds, float64 of shape (count,), within [0, duration_s)."""
        ...


def _require(ok: bool, name: str, value: object, rule: str) -> None:
    if not ok:
        raise UserError(f"arrivals.{name}={value!r} is out of range; {rule}.")


# ---------------------------------------------------------------------------------------------------------------------
# Single processes
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Poisson:
    """Homogeneous Poisson process: independent arrivals.

    Mean count rate * duration; index of dispersion 1 in every window; gaps are exponential (cv 1).
    """

    def draw(self, rate_per_s: float, duration_s: float, rng: np.random.Generator) -> Times:
        """See `ArrivalProcess.draw`."""
        return _renewal(lambda n: rng.standard_exponential(n), rng.standard_exponential(), rate_per_s, duration_s)


@dataclass(frozen=True)
class Gamma:
    """Stationary renewal process with Gamma gaps; cv > 1 is burstier than Poisson, cv < 1 more regular.

    Mean count rate * duration; gaps have shape 1 / cv^2 and coefficient of variation cv, and the index of dispersion
    tends to cv^2 in long windows. Used for serving traces by ServeGen (Xiang et al., 2025) and AlpaServe (Li et al.,
    OSDI 2023).
    """

    cv: float = 2.0

    def __post_init__(self) -> None:
        _require(self.cv > 0, "cv", self.cv, "the coefficient of variation of the gaps is positive")

    def draw(self, rate_per_s: float, duration_s: float, rng: np.random.Generator) -> Times:
        """See `ArrivalProcess.draw`."""
        shape = self.cv**-2
        # The gap that covers time 0 is length-biased, x f(x), which for Gamma(k) is Gamma(k + 1); 0 is anywhere in it.
        first = rng.gamma(shape + 1) / shape * rng.random()
        return _renewal(lambda n: rng.gamma(shape, size=n) / shape, first, rate_per_s, duration_s)


@dataclass(frozen=True)
class Weibull:
    """Stationary renewal process with Weibull gaps; shape < 1 is burstier than Poisson.

    Mean count rate * duration; gaps have cv^2 = G(1 + 2/shape) / G(1 + 1/shape)^2 - 1 with G the gamma function, and
    the index of dispersion tends to cv^2 in long windows. Used for serving traces by ServeGen (Xiang et al., 2025).
    """

    shape: float = 0.5

    def __post_init__(self) -> None:
        _require(self.shape > 0, "shape", self.shape, "the shape of Weibull gaps is positive")

    @property
    def cv(self) -> float:
        """Coefficient of variation of the gaps."""
        # Logarithms, because the gamma function overflows below a shape of about 0.01.
        log_ratio = special.gammaln(1 + 2 / self.shape) - 2 * special.gammaln(1 + 1 / self.shape)
        return math.sqrt(math.expm1(log_ratio))

    def draw(self, rate_per_s: float, duration_s: float, rng: np.random.Generator) -> Times:
        """See `ArrivalProcess.draw`."""
        mean = special.gamma(1 + 1 / self.shape)
        # Length-biased Weibull: (x / scale)^shape is Gamma(1 + 1/shape).
        first = rng.gamma(1 + 1 / self.shape) ** (1 / self.shape) / mean * rng.random()
        return _renewal(lambda n: rng.weibull(self.shape, n) / mean, first, rate_per_s, duration_s)


@dataclass(frozen=True)
class OnOff:
    """Poisson arrivals whose rate alternates between two levels for exponential times (a two-state MMPP).

    Mean count rate * duration; the share of time spent ON is on_s / (on_s + off_s). With L1, L0 the two rates and
    s1 = 1/on_s, s0 = 1/off_s, the index of dispersion tends in long windows to
    1 + 2 s1 s0 (L1 - L0)^2 / ((s1 + s0)^2 (L1 s0 + L0 s1)); Fischer and Meier-Hellstern, "The MMPP cookbook" (1993).

    on_s, off_s: mean durations in seconds; off_level: rate while OFF as a share of the rate while ON (0 is silence).
    """

    on_s: float = 10.0
    off_s: float = 20.0
    off_level: float = 0.0

    def __post_init__(self) -> None:
        _require(self.on_s > 0, "on_s", self.on_s, "a mean ON duration is positive")
        _require(self.off_s > 0, "off_s", self.off_s, "a mean OFF duration is positive")
        _require(0 <= self.off_level <= 1, "off_level", self.off_level, "the OFF rate is 0 to 1 of the ON rate")

    def rates(self, rate_per_s: float) -> tuple[float, float]:
        """The arrival rates while ON and while OFF whose time average is rate_per_s."""
        on = rate_per_s * (self.on_s + self.off_s) / (self.on_s + self.off_level * self.off_s)
        return on, self.off_level * on

    def draw(self, rate_per_s: float, duration_s: float, rng: np.random.Generator) -> Times:
        """See `ArrivalProcess.draw`."""
        on = bool(rng.random() * (self.on_s + self.off_s) < self.on_s)  # stationary: any phase at time 0
        switches = [0.0]
        while switches[-1] < duration_s:
            mean = self.on_s if on == (len(switches) % 2 == 1) else self.off_s
            switches.append(switches[-1] + rng.exponential(mean))
        edges = np.minimum(switches, duration_s)
        rate_on, rate_off = self.rates(rate_per_s)
        rates = np.where((np.arange(len(edges) - 1) % 2 == 0) == on, rate_on, rate_off)
        # Arrivals of a unit-rate Poisson process, carried to real time through the integrated rate.
        expected = np.concatenate([[0.0], np.cumsum(rates * np.diff(edges))])
        units = Poisson().draw(1.0, float(expected[-1]), rng)
        phase = np.searchsorted(expected, units, side="right") - 1
        return _inside(edges[phase] + (units - expected[phase]) / rates[phase], duration_s)


@dataclass(frozen=True)
class DayNight:
    """Poisson arrivals whose rate follows a sine wave, as between day and night.

    The rate is rate_per_s * (1 - depth * cos(2 pi t / period_s)): it starts at night. Mean count rate * duration over
    whole periods.

    period_s: length of a day in seconds; depth: 0 is even, 1 is silence at night and twice the mean rate at noon.
    """

    period_s: float = 600.0
    depth: float = 0.8

    def __post_init__(self) -> None:
        _require(self.period_s > 0, "period_s", self.period_s, "a day has a positive length")
        _require(0 <= self.depth <= 1, "depth", self.depth, "the depth is 0 to 1")

    def draw(self, rate_per_s: float, duration_s: float, rng: np.random.Generator) -> Times:
        """See `ArrivalProcess.draw`."""
        # Thinning (Lewis and Shedler, 1979): arrivals at the highest rate, each kept with the chance of its moment.
        times = Poisson().draw(rate_per_s * (1 + self.depth), duration_s, rng)
        chance = (1 - self.depth * np.cos(2 * np.pi * times / self.period_s)) / (1 + self.depth)
        return times[rng.random(len(times)) < chance]


def _renewal(gaps: Callable[[int], Times], first: float, rate_per_s: float, duration_s: float) -> Times:
    """Times of a renewal process with unit-mean `gaps(n)`, `first` being the time to the first arrival."""
    end = rate_per_s * duration_s  # in mean gaps
    parts = [np.array([first])]
    last = float(first)
    while last < end:
        more = int((end - last) * 1.05) + 64
        parts.append(last + np.cumsum(gaps(more)))
        last = float(parts[-1][-1])
    times = np.concatenate(parts)
    times = times[times < end]
    return _inside(times / rate_per_s, duration_s) if len(times) else times


def _inside(times: Times, duration_s: float) -> Times:
    """Rounding must not push an arrival to the end of a half-open span."""
    return np.minimum(times, np.nextafter(duration_s, 0.0))


# ---------------------------------------------------------------------------------------------------------------------
# Outer x inner
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """How an amount is spread: over segments (outer) or over the time within one segment (inner).

    `steady` of it is spread evenly, the rest follows `distribution`, whose unevenness is `skew`:

    | distribution | outer: sizes of the segments | inner: position x in a segment, 0 <= x < 1 |
    |---|---|---|
    | uniform | even over 1 - skew .. 1 + skew; skew in [0, 1], 0 makes equal segments | even over 0 .. 1 - skew |
    | poisson | Poisson counts, scaled to mean 1, cv = skew (their mean is 1/skew^2) | the same, mean 1/2, cut at 1 |
    | gaussian | normal, mean 1, standard deviation skew, cut at 0 | normal, mean 1/2, deviation skew, cut to 0..1 |
    | inverse_gaussian | inverse Gaussian (Wald), mean 1, cv = skew | the same, mean 1/2, cut at 1 |
    | zipf | rank-size law: the k-th largest has size k^-skew | slot k of 100 has share k^-skew: a sharp onset |

    Segment sizes are the distribution's quantiles at evenly spaced probabilities, in random order (stratified
    sampling), so that they have a closed form and the burstiness does not depend on the luck of one heavy draw.
    """

    distribution: DistributionName
    skew: float
    steady: float = 0.0

    def __post_init__(self) -> None:
        names = get_args(DistributionName)
        _require(self.distribution in names, "distribution", self.distribution, f"choose from {', '.join(names)}")
        _require(0 <= self.steady <= 1, "steady", self.steady, "the evenly spread share is 0 to 1")
        if self.distribution in ("uniform", "zipf"):
            _require(self.skew >= 0, "skew", self.skew, "it is 0 (even) or more")
        else:
            _require(self.skew > 0, "skew", self.skew, "it is positive")
        if self.distribution in ("uniform", "poisson"):
            _require(self.skew <= 1, "skew", self.skew, f"a {self.distribution} spread has a skew of at most 1")

    def shares(self, segments: int) -> Times:
        """Share of each of `segments`, in ascending order (zipf: descending), float64 of shape (segments,), sum 1."""
        sizes = _segment_sizes(self.distribution, self.skew, segments)
        return (1 - self.steady) * sizes + self.steady / segments

    def positions(self, count: int, rng: np.random.Generator) -> Times:
        """`count` independent positions in [0, 1), float64 of shape (count,), unsorted."""
        at = self._uneven_positions(count, rng)
        if self.steady:
            at = np.where(rng.random(count) < self.steady, rng.random(count), at)
        return at

    def _uneven_positions(self, count: int, rng: np.random.Generator) -> Times:
        match self.distribution:
            case "uniform":
                return rng.random(count) * (1 - self.skew)
            case "gaussian":
                low, high = special.ndtr(-0.5 / self.skew), special.ndtr(0.5 / self.skew)
                at = 0.5 + self.skew * special.ndtri(low + (high - low) * rng.random(count))
                return _inside(np.maximum(at, 0.0), 1.0)
            case "inverse_gaussian":
                return _accept(lambda n: rng.wald(0.5, 0.5 / self.skew**2, n), count)
            case "poisson":
                mean = self.skew**-2
                # Counts are whole numbers; a uniform fraction keeps arrivals from falling on the same instant.
                return _accept(lambda n: (rng.poisson(mean, n) + rng.random(n)) / (2 * mean + 1), count)
            case "zipf":
                ends = np.cumsum(_segment_sizes("zipf", self.skew, ZIPF_SLOTS))
                slot = np.minimum(np.searchsorted(ends, rng.random(count), side="right"), ZIPF_SLOTS - 1)
                return _inside((slot + rng.random(count)) / ZIPF_SLOTS, 1.0)


@lru_cache(maxsize=256)
def _segment_sizes(distribution: DistributionName, skew: float, segments: int) -> Times:
    """Quantiles of a distribution at evenly spaced probabilities, scaled to sum 1; read-only, since it is shared."""
    at = (np.arange(segments) + 0.5) / segments
    sizes: Times
    match distribution:
        case "uniform":
            sizes = 1 - skew + 2 * skew * at
        case "poisson":
            sizes = _stats().poisson.ppf(at, skew**-2)
        case "gaussian":
            sizes = _stats().truncnorm.ppf(at, -1 / skew, np.inf, loc=1, scale=skew)
        case "inverse_gaussian":
            sizes = _stats().invgauss.ppf(at, skew**2, scale=skew**-2)
        case "zipf":
            sizes = np.arange(1, segments + 1, dtype=np.float64) ** -float(skew)
    if not sizes.sum() > 0:  # too few segments for so sparse a distribution: every quantile is 0
        sizes = np.ones(segments)
    sizes = np.asarray(sizes / sizes.sum(), dtype=np.float64)
    sizes.setflags(write=False)
    return sizes


def _stats() -> ModuleType:
    # A second to import, for which only scenarios with such spreads wait.
    from scipy import stats

    return stats


def _accept(draw: Callable[[int], Times], count: int) -> Times:
    """`count` draws that fall within [0, 1), by rejection."""
    kept = np.empty(0)
    while len(kept) < count:
        more = draw(2 * (count - len(kept)) + 16)
        kept = np.concatenate([kept, more[(more >= 0) & (more < 1)]])
    return kept[:count]


@dataclass(frozen=True)
class OuterInner:
    """Bursts at two scales: an outer spread of requests over segments, an inner one over the time in each segment.

    The span from `offset_s` to the end is cut into `granularity` equal segments. The outer spread sets each segment's
    share of the n requests, in random order; the inner one sets the times within a segment. Granularity counts
    segments per draw, so a short episode and a long run have the same burst structure, stretched: 50 segments are 4 s
    each in 200 s and 72 s each in an hour.

    Mean count rate * duration, and never more than one request away from it. Dispersion: counts of whole segments have
    variance (n / granularity)^2 * cv^2 with cv that of the outer shares; the expected peak-to-mean over whole segments
    is granularity * max(share).

    The scheme is that of the Vexless workload generator (Su et al., "Vexless", SIGMOD 2024). It differs in that segment
    sizes are stratified, not drawn independently (see `Spread`), and that "inverse Gaussian" is the distribution of
    that name, where the generator's code turns a bell curve upside down.
    """

    outer: Spread = field(default_factory=lambda: Spread("zipf", 1.0))
    inner: Spread = field(default_factory=lambda: Spread("uniform", 0.0))
    granularity: int = 50
    offset_s: float = 0.0

    def __post_init__(self) -> None:
        _require(self.granularity >= 1, "granularity", self.granularity, "there is at least 1 segment")
        _require(self.offset_s >= 0, "offset_s", self.offset_s, "the offset is 0 s or more")

    def draw(self, rate_per_s: float, duration_s: float, rng: np.random.Generator) -> Times:
        """See `ArrivalProcess.draw`; raises UserError where the offset leaves no time for arrivals."""
        _require(
            self.offset_s < duration_s, "offset_s", self.offset_s, f"it is less than the duration, {duration_s:g} s"
        )
        shares = rng.permutation(self.outer.shares(self.granularity))
        count = int(rate_per_s * duration_s + rng.random())  # randomised rounding keeps the mean rate exact
        # Rounding the running sum, not each share, leaves none of the requests over.
        ends = np.round(np.cumsum(shares) * count).astype(np.int64)
        segment = np.repeat(np.arange(self.granularity), np.diff(ends, prepend=0))
        at = (segment + self.inner.positions(len(segment), rng)) / self.granularity
        return np.sort(_inside(self.offset_s + at * (duration_s - self.offset_s), duration_s))
