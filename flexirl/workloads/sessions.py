"""Sessions: conversations and agents, whose every turn says all that was said before and waits for its answer.

A turn's prompt is the tenant's system prompt, all inputs and answers so far, and its own input. It is sent a pause
after the answer to the turn before, so a slow engine sees it later; `arrival_s` of a row is when it would come if
answers took `token_s` per token. A prefix cache without end holds all of a prompt but its own input.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexirl.errors import UserError
from flexirl.workloads.arrivals import ArrivalProcess
from flexirl.workloads.lengths import Fixed, Marginal
from flexirl.workloads.scenario import (
    MOST_REQUESTS,
    ImmediateStream,
    PerServiceTime,
    Rngs,
    ServiceTime,
    Tenants,
    duration_of_synthetic,
    positive,
    require,
)
from flexirl.workloads.trace import CONTENT, Trace, empty_rows, merge, take

_SAMPLE = 400  # sessions drawn to know what one costs and how long it lasts
_LONGEST = 0.98  # of the sessions, the share that is shorter than the time before an episode in which some began


@dataclass(frozen=True)
class Pause:
    """Seconds from an answer to the next turn: lognormal, cut at most_s. A person thinks, an agent's tool runs."""

    median_s: float
    sigma: float = 1.0
    most_s: float = 3600.0

    def __post_init__(self) -> None:
        require(self.median_s > 0, "pause.median_s", self.median_s, "a pause is longer than 0 s")
        require(self.sigma >= 0, "pause.sigma", self.sigma, "a standard deviation is 0 or more")

    def draw(self, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """`count` pauses in seconds."""
        return np.minimum(self.median_s * np.exp(self.sigma * rng.standard_normal(count)), self.most_s)


class _Turns(NamedTuple):
    """Turns of several sessions, those of one session side by side and in order."""

    rows: np.ndarray  # TRACE_ROW
    session: NDArray[np.int64]
    system: NDArray[np.int64]  # tokens of the system prompt
    contents: np.ndarray  # CONTENT


@dataclass(frozen=True)
class Sessions:
    """Immediate requests of sessions that begin in an arrival process.

    turns, first, later, output: how many turns there are, tokens of the first input, of the others and of the answers;
    pause: between turns; system: tokens of a tenant's system prompt, drawn once for each tenant; most_tokens: a session
    ends before a prompt and its answer would be longer. load: service seconds that arrive per second, in expectation,
    with a prefix cache without end.

    Sessions that began before the episode are in it with what is left of them.
    """

    arrivals: ArrivalProcess
    turns: Marginal
    first: Marginal
    later: Marginal
    output: Marginal
    pause: Pause
    load: float
    system: Marginal = field(default_factory=lambda: Fixed(1))
    most_tokens: int = 32768
    token_s: float = 0.02
    tenants: Tenants = field(default_factory=Tenants)
    _mean: PerServiceTime = field(default_factory=PerServiceTime, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require(self.load > 0, "workload.load", self.load, "the load is positive; 1 is the engine's capacity")
        require(self.most_tokens > 1, "most_tokens", self.most_tokens, "a sequence has 2 tokens or more")
        require(self.token_s >= 0, "token_s", self.token_s, "seconds per token are 0 or more")

    @property
    def num_tenants(self) -> int:
        """Tenants are numbered from 0 to one less."""
        return self.tenants.count

    def length_s(self, duration_s: float | None, service_time_s: ServiceTime) -> float:
        """See `ImmediateStream.length_s`; raises UserError without a duration."""
        return duration_of_synthetic(duration_s)

    def draw(self, duration_s: float | None, service_time_s: ServiceTime, rngs: Rngs) -> Trace:
        """See `ImmediateStream.draw`."""
        length_s = self.length_s(duration_s, service_time_s)
        rate_per_s = self.load / self._mean.get(service_time_s, lambda: self._mean_service_s(service_time_s))
        sample = self._sample()
        spans_s = np.zeros(_SAMPLE)
        np.maximum.at(spans_s, sample.session, sample.rows["arrival_s"])
        before_s = float(np.quantile(spans_s, _LONGEST))
        expected = rate_per_s * (length_s + before_s) * len(sample.rows) / _SAMPLE
        if expected > MOST_REQUESTS:
            raise UserError(
                f"workload.load={self.load:g} would be {expected:.3g} turns in {length_s:g} s; an episode has "
                f"{MOST_REQUESTS:,} requests at most."
            )
        starts_s = self.arrivals.draw(rate_per_s, length_s + before_s, rngs["arrivals"]) - before_s
        tenants = self.tenants.draw(len(starts_s), rngs["tenants"])
        turns = self._draw_turns(starts_s, tenants, rngs["lengths"])
        there = np.flatnonzero((turns.rows["arrival_s"] >= 0) & (turns.rows["arrival_s"] < length_s))
        rows = take(turns.rows, there)
        # What was said before the episode has to be computed in it once, but for the system prompt.
        first = rows["follows"] == 0
        rows["prefix_tokens"][first] = np.minimum(turns.system[there], rows["prompt_tokens"])[first]
        rows = take(rows, np.argsort(rows["arrival_s"], kind="stable"))
        return Trace(rows, "sessions", self.num_tenants, contents=turns.contents)

    def _draw_turns(
        self, starts_s: NDArray[np.float64], tenants: NDArray[np.int64], rng: np.random.Generator
    ) -> _Turns:
        """All turns of sessions that start at these times."""
        count = self.turns.draw(len(starts_s), rng).astype(np.int64)
        session = np.repeat(np.arange(len(count)), count)
        number = np.arange(len(session)) - np.repeat(np.cumsum(count) - count, count)
        begins = number == 0
        inputs = self.later.draw(len(session), rng).astype(np.int64)
        inputs[begins] = self.first.draw(len(count), rng)
        outputs = self.output.draw(len(session), rng).astype(np.int64)
        pauses_s = np.where(begins, 0.0, self.pause.draw(len(session), rng))
        before = np.where(begins, 0, np.roll(outputs, 1))
        # The tenants' system prompts are theirs, whatever the episode.
        system = self.system.draw(self.tenants.count, np.random.default_rng(0)).astype(np.int64)[tenants][session]
        prompts = system + _sums(inputs + before, begins)
        kept = np.flatnonzero(_sums(prompts + outputs > self.most_tokens, begins) == 0)
        rows = empty_rows(len(session))
        rows["arrival_s"] = starts_s[session] + _sums(before * self.token_s + pauses_s, begins)
        rows["prompt_tokens"] = np.minimum(prompts, self.most_tokens)
        rows["output_tokens"] = outputs
        rows["max_tokens"] = self.output.max
        rows["tenant"] = tenants[session]
        rows["follows"] = ~begins
        rows["delay_s"] = pauses_s
        rows["prefix_tokens"] = np.where(begins, system, rows["prompt_tokens"] - inputs)
        # What the turns say: the system prompt, then one stretch for each input with its answer.
        first = np.cumsum(count + 1) - count - 1
        contents = np.zeros(len(session) + len(count), CONTENT)
        contents["origin"][first] = tenants + 1
        contents["end"][first] = system[begins]
        stretch = first[session] + number + 1
        contents["origin"][stretch] = (session + 1 << 20) + number
        contents["end"][stretch] = np.minimum(prompts + outputs, 2 * self.most_tokens)
        rows["content_first"] = first[session]
        rows["content_count"] = number + 2
        return _Turns(rows[kept], session[kept], system[kept], contents)

    def _sample(self) -> _Turns:
        rng = np.random.default_rng(0)  # the same for every episode: load is a property of the scenario
        return self._draw_turns(np.zeros(_SAMPLE), self.tenants.draw(_SAMPLE, rng), rng)

    def _mean_service_s(self, service_time_s: ServiceTime) -> float:
        """Seconds of the engine that a session takes."""
        return positive(float(service_time_s(self._sample().rows).sum()) / _SAMPLE)


def _sums(values: np.ndarray, begins: NDArray[np.bool_]) -> np.ndarray:
    """Running sums that start anew where a session begins."""
    total = np.cumsum(values)
    first = np.flatnonzero(begins)
    before = (total - values)[first]
    return total - np.repeat(before, np.diff(np.append(first, len(values))))


@dataclass(frozen=True)
class Several:
    """Several immediate streams side by side, each with its share of the load; tenants of all are numbered alike."""

    parts: tuple[ImmediateStream, ...]

    @property
    def num_tenants(self) -> int:
        """Tenants are numbered from 0 to one less."""
        return max(part.num_tenants for part in self.parts)

    def length_s(self, duration_s: float | None, service_time_s: ServiceTime) -> float:
        """See `ImmediateStream.length_s`."""
        return self.parts[0].length_s(duration_s, service_time_s)

    def draw(self, duration_s: float | None, service_time_s: ServiceTime, rngs: Rngs) -> Trace:
        """See `ImmediateStream.draw`."""
        streams = {name: rng.spawn(len(self.parts)) for name, rng in rngs.items()}
        drawn = []
        for number, part in enumerate(self.parts):
            trace = part.draw(duration_s, service_time_s, {name: each[number] for name, each in streams.items()})
            trace.contents["origin"] += np.uint64(number << 52)  # what different parts say is never the same
            drawn.append(trace)
        return merge(drawn, "several")
