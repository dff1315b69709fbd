"""Files of deferred work, each with an instruction that all its requests begin with, and lengths of its own.

What is sent as a batch is of many kinds: a classification answers in a few tokens, a summary in hundreds, reasoning in
thousands. Within a file requests are alike, so who has seen some of a file knows something about the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flexirl.workloads.arrivals import ArrivalProcess, Poisson
from flexirl.workloads.lengths import Marginal
from flexirl.workloads.scenario import PerServiceTime, Rngs, ServiceTime, Tenants, positive, require
from flexirl.workloads.trace import CONTENT, Trace, empty_rows

_SAMPLE = 400  # files drawn to know what one costs
_ORIGINS = 1 << 61  # a file's instruction; sessions are below


@dataclass(frozen=True)
class Kind:
    """One kind of file. share: of all files, relative.

    instruction: tokens that all requests of a file begin with; prompt, output: what each adds and gets; spread:
    standard deviation of the logarithm of a factor by which a file's prompts and outputs are longer than its kind's;
    requests: how many there are in a file. A file's `max_tokens` is the longest output of its kind, so scaled.
    """

    instruction: Marginal
    prompt: Marginal
    output: Marginal
    requests: Marginal
    share: float = 1.0
    spread: float = 0.3

    def __post_init__(self) -> None:
        require(self.share > 0, "kinds.share", self.share, "a kind's share is positive")
        require(self.spread >= 0, "kinds.spread", self.spread, "a standard deviation is 0 or more")

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """The requests of one file, `TRACE_ROW`, without times, tenant and contents; prefix_tokens: the instruction."""
        rows = empty_rows(int(self.requests.draw(1, rng)[0]))
        longer = np.exp(self.spread * rng.standard_normal(2))
        instruction = int(self.instruction.draw(1, rng)[0])
        rows["prompt_tokens"] = instruction + _scaled(self.prompt.draw(len(rows), rng), longer[0])
        rows["output_tokens"] = _scaled(self.output.draw(len(rows), rng), longer[1])
        rows["max_tokens"] = _scaled(np.array([self.output.max]), longer[1])
        rows["prefix_tokens"] = instruction
        return rows


def _scaled(tokens: np.ndarray, factor: float) -> np.ndarray:
    return np.maximum(np.rint(tokens * factor), 1)


@dataclass(frozen=True)
class Files:
    """Files that arrive in a process, each of one kind and one tenant, all requests at once, due window_s later.

    load: service seconds that arrive per second, in expectation, with a prefix cache without end; at_start: files that
    are there when the episode begins, with what is left of their windows; window_s: each file has one of these.
    """

    kinds: Mapping[str, Kind]
    load: float
    window_s: tuple[float, ...]
    arrivals: ArrivalProcess = field(default_factory=Poisson)
    at_start: int = 0
    tenants: Tenants = field(default_factory=Tenants)
    _mean: PerServiceTime = field(default_factory=PerServiceTime, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require(self.load > 0, "deferred.load", self.load, "the load is positive; 1 is the engine's capacity")
        require(len(self.kinds) > 0, "deferred.kinds", self.kinds, "there is a kind of file")
        require(self.at_start >= 0, "deferred.at_start", self.at_start, "it is a number of files")
        require(
            len(self.window_s) > 0 and min(self.window_s) > 0, "deferred.window_s", self.window_s,
            "a completion window is positive",
        )  # fmt: skip

    @property
    def num_tenants(self) -> int:
        """Tenants are numbered from 0 to one less."""
        return self.tenants.count

    def draw(self, duration_s: float, service_time_s: ServiceTime, rngs: Rngs) -> Trace:
        """See `DeferredStream.draw`."""
        mean_s = self._mean.get(service_time_s, lambda: self._mean_service_s(service_time_s))
        later_s = self.arrivals.draw(self.load / mean_s, duration_s, rngs["deferred_arrivals"])
        times_s = np.concatenate([np.zeros(self.at_start), later_s])
        windows_s = rngs["deferred_windows"].choice(self.window_s, len(times_s))
        windows_s[: self.at_start] *= rngs["deferred_windows"].random(self.at_start)
        files = self._draw(len(times_s), rngs["deferred_lengths"])
        tenants = self.tenants.draw(len(times_s), rngs["deferred_tenants"])
        contents = np.zeros(len(times_s), CONTENT)
        for number, rows in enumerate(files):
            rows["arrival_s"], rows["window_s"] = times_s[number], windows_s[number]
            rows["tenant"] = tenants[number]
            contents[number] = (_ORIGINS + number, rows["prefix_tokens"][0])
            rows["content_first"], rows["content_count"] = number, 1
            rows["prefix_tokens"][0] = 0
        rows = np.concatenate([empty_rows(0), *files])
        return Trace(rows[np.argsort(rows["arrival_s"], kind="stable")], "files", self.num_tenants, contents=contents)

    def _draw(self, count: int, rng: np.random.Generator) -> list[np.ndarray]:
        kinds = list(self.kinds.values())
        shares: NDArray[np.float64] = np.array([kind.share for kind in kinds])
        return [kinds[which].draw(rng) for which in rng.choice(len(kinds), count, p=shares / shares.sum())]

    def _mean_service_s(self, service_time_s: ServiceTime) -> float:
        """Seconds of the engine that a file takes."""
        files = self._draw(_SAMPLE, np.random.default_rng(0))  # the same for every episode
        return positive(float(service_time_s(np.concatenate(files)).sum()) / _SAMPLE)
