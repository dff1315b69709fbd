"""A trace: the requests of one scenario, one row each, sorted by arrival.

What a prompt says is not kept, only which stretches of it are the same as in others: see `CONTENT`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flexirl.errors import UserError

IMMEDIATE = 0
DEFERRED = 1

TRACE_ROW = np.dtype(
    [
        ("arrival_s", "f8"),  # seconds since the start of the scenario
        ("ttft_slo_s", "f8"),  # promised time to first token; inf where none is promised
        ("tpot_slo_s", "f8"),  # promised mean time per output token after the first; inf where none
        ("window_s", "f8"),  # completion window: the last token is due at arrival_s + window_s; inf where none
        ("request_class", "i4"),  # IMMEDIATE or DEFERRED
        ("tenant", "i4"),  # 0-based tenant number
        ("prompt_tokens", "i4"),  # image tokens included
        ("output_tokens", "i4"),  # true output length: known to the trace alone, never to a policy
        ("max_tokens", "i4"),  # the limit the client asked for, at least output_tokens
        ("predicted_output_tokens", "i4"),  # what an output-length predictor says; 0 where none is switched on
        ("num_images", "i4"),
        ("image_tokens", "i4"),  # of prompt_tokens, those that a vision encoder makes
        ("prefix_tokens", "i4"),  # of prompt_tokens, those that earlier requests had too: a cache without end has them
        # A turn of a conversation waits for the answer to the one before: it arrives delay_s seconds after that ended,
        # and arrival_s, by which rows are sorted, is only when it was recorded or is expected.
        ("follows", "i4"),  # that one stands so many rows above; 0: it waits for none
        ("delay_s", "f8"),
        ("content_first", "i8"),  # its stretches in `Trace.contents`, and how many; 0: it shares nothing
        ("content_count", "i4"),
    ],
    align=True,
)

# Prompt and answer as stretches of tokens, in order. Sequences with a stretch of the same origin at the same place are
# the same up to there, token by token, all that stands before it included. What lies behind the last is its own.
CONTENT = np.dtype([("origin", "u8"), ("end", "i4")], align=True)  # end: tokens from the start of the prompt


@dataclass(frozen=True)
class Trace:
    """Requests sorted by arrival.

    rows: array of `TRACE_ROW`; name: where they come from; num_tenants: tenants are 0..num_tenants-1; asked: the rows
    before `within` cut them, None where it did not; contents: array of `CONTENT`, of all rows.
    """

    rows: np.ndarray
    name: str
    num_tenants: int
    asked: np.ndarray | None = None
    contents: np.ndarray = field(default_factory=lambda: np.zeros(0, CONTENT))

    def __len__(self) -> int:
        return len(self.rows)

    def of_class(self, request_class: int) -> np.ndarray:
        """The rows of one class, as a copy."""
        return self.only(request_class).rows

    def only(self, request_class: int) -> Trace:
        """The requests of one class; those that follow one of the other wait for none."""
        mine = np.flatnonzero(self.rows["request_class"] == request_class)
        return Trace(take(self.rows, mine), self.name, self.num_tenants, contents=self.contents)

    def within(self, longest: int) -> Trace:
        """The same requests of clients that ask for no more tokens than a sequence of this length has left for them.

        Outputs that would be longer end there, as a server ends them. A prompt that leaves no token stays as it is.
        """
        rows = self.rows.copy()
        room = np.maximum(longest - rows["prompt_tokens"], 1)
        for column in ("max_tokens", "output_tokens", "predicted_output_tokens"):
            rows[column] = np.minimum(rows[column], room)
        return Trace(rows, self.name, self.num_tenants, self.rows, self.contents)

    def trimmed(self) -> Trace:
        """The same requests, without contents that are none of theirs."""
        rows = self.rows.copy()
        counts = rows["content_count"].astype(np.int64)
        first = np.cumsum(counts) - counts
        kept = np.repeat(rows["content_first"] - first, counts) + np.arange(counts.sum())
        rows["content_first"] = np.where(counts > 0, first, 0)
        return Trace(rows, self.name, self.num_tenants, self.asked, self.contents[kept])

    def as_asked(self) -> Trace:
        """The requests before `within` cut them."""
        return self if self.asked is None else Trace(self.asked, self.name, self.num_tenants, None, self.contents)

    @property
    def duration_s(self) -> float:
        """Time of the last arrival in seconds."""
        return float(self.rows["arrival_s"][-1]) if len(self.rows) else 0.0


def empty_rows(count: int) -> np.ndarray:
    """`count` rows with the defaults: immediate, tenant 0, no images, no promises, one token each way."""
    rows = np.zeros(count, dtype=TRACE_ROW)
    for promise in ("ttft_slo_s", "tpot_slo_s", "window_s"):
        rows[promise] = np.inf
    rows["prompt_tokens"] = 1
    rows["output_tokens"] = 1
    rows["max_tokens"] = 1
    return rows


def take(rows: np.ndarray, chosen: NDArray[np.int64]) -> np.ndarray:
    """The rows with these numbers, in this order, as a copy; what follows one that is left out waits for none.

    chosen: no number twice. A request that would stand above the one it follows waits for none, either.
    """
    place = np.full(len(rows), -1)
    place[chosen] = np.arange(len(chosen))
    taken = rows[chosen]
    before = place[chosen - taken["follows"]]
    here = np.arange(len(chosen))
    taken["follows"] = np.where((taken["follows"] > 0) & (before >= 0) & (before < here), here - before, 0)
    return taken


def merge(traces: list[Trace], name: str) -> Trace:
    """One trace of all rows, stable-sorted by arrival; tenants keep their numbers."""
    rows = np.concatenate([trace.rows for trace in traces])
    shift = np.cumsum([0, *(len(trace.contents) for trace in traces[:-1])])
    rows["content_first"] += np.repeat(shift, [len(trace) for trace in traces])
    rows = take(rows, np.argsort(rows["arrival_s"], kind="stable"))
    contents = np.concatenate([trace.contents for trace in traces])
    return Trace(rows, name, max(trace.num_tenants for trace in traces), contents=contents)


def check(rows: np.ndarray, source: str) -> None:
    """Raises UserError, naming the first bad row of `source`, unless every row can be served."""
    rules = (
        ("arrival_s", rows["arrival_s"] < 0, "arrival times start at 0 or later"),
        ("arrival_s", ~np.isfinite(rows["arrival_s"]), "arrival times are finite seconds"),
        ("prompt_tokens", rows["prompt_tokens"] < 1, "a prompt has at least 1 token"),
        ("output_tokens", rows["output_tokens"] < 1, "an output has at least 1 token"),
        ("max_tokens", rows["max_tokens"] < rows["output_tokens"], "max_tokens is at least output_tokens"),
        ("image_tokens", rows["image_tokens"] > rows["prompt_tokens"], "image tokens are part of the prompt"),
        ("prefix_tokens", rows["prefix_tokens"] > rows["prompt_tokens"], "cached tokens are part of the prompt"),
        ("follows", rows["follows"] < 0, "a request waits for one that stands above it"),
        ("follows", rows["follows"] > np.arange(len(rows)), "a request waits for one that stands above it"),
        ("delay_s", ~(np.isfinite(rows["delay_s"]) & (rows["delay_s"] >= 0)), "a delay is 0 or more seconds"),
    )
    for column, broken, remedy in rules:
        if broken.any():
            at = int(np.argmax(broken))
            raise UserError(f"{source}: row {at} has {column}={rows[column][at]}; {remedy}.")
