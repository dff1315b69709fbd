"""Replays a recorded run of vLLM on the surrogate: its arrivals and lengths, on an engine with its settings.

A run folder's `requests.jsonl` has one object a line:

    input_toks, output_toks, arrival_time, queued_ts, first_token_ts, last_token_ts    seconds, the _ts on one clock
    prefix_tokens                                                                      optional, 0 where left out

`prefix_tokens` are the tokens of the prompt that an earlier request had left in the cache. They save computing but no
memory: vLLM holds a block that two running requests share once, the replay twice. A record without them cannot tell
which prompts began alike, so the replay computes every prompt in full.

A request counts from the moment the engine takes it in (`queued_ts`), which it does between two iterations, so the
replay is driven by when clients sent (`arrival_time`) and takes requests in between its own iterations. With
asynchronous scheduling vLLM chooses an iteration when the one before it begins (`step_with_batch_queue` in
`vllm/v1/engine/core.py`): whoever arrives during an iteration sits out the next one too, and whoever ends in it keeps
blocks and seat until the next one is chosen (`update_from_output` in `vllm/v1/core/sched/scheduler.py` frees them).
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from flexirl.compiled import compiled
from flexirl.errors import UserError
from flexirl.policies.interface.policy import Policy
from flexirl.runtime.fitting.operators import read_meta
from flexirl.runtime.fitting.recorded_engine import is_asynchronous
from flexirl.runtime.fitting.requests import read_requests
from flexirl.runtime.profile.engine import EngineProfile
from flexirl.runtime.profile.step_time import step_time
from flexirl.runtime.scheduler.books import seats_taken
from flexirl.runtime.scheduler.commit import commit, settle
from flexirl.runtime.scheduler.looking import Lookout
from flexirl.runtime.scheduler.plan import apply, plan
from flexirl.runtime.scheduler.queues import owed_tokens
from flexirl.runtime.scheduler.state import FINISHED, State
from flexirl.runtime.simulator.simulation import start
from flexirl.runtime.simulator.surrogate import arrive
from flexirl.workloads.slo import SLO
from flexirl.workloads.trace import Trace, check, empty_rows

# Running and waiting requests and the share of the KV cache in use, `now_s` seconds after the first arrival.
SERIES = np.dtype([("now_s", "f8"), ("running", "f8"), ("waiting", "f8"), ("kv_share", "f8")])
# When the next iteration is chosen, and what requests that end later than that still hold then: blocks, of them those
# that the prefix cache does not keep, and seats.
_CHOICE = np.dtype([("now_s", "f8"), ("held_blocks", "i8"), ("held_uncached", "i8"), ("held_seats", "i8")])
_TIMES = ("queued_ts", "first_token_ts", "last_token_ts")


@dataclass(frozen=True)
class Served:
    """What requests got, in order of arrival: arrays (requests,), in seconds on the run's own clock."""

    queued_s: np.ndarray
    first_token_s: np.ndarray
    last_token_s: np.ndarray
    output_tokens: np.ndarray

    def part(self, which: slice) -> Served:
        """Some of the requests."""
        return Served(*(getattr(self, field.name)[which] for field in fields(self)))

    @property
    def ttft_s(self) -> np.ndarray:
        """Seconds from the queue to the first token."""
        return self.first_token_s - self.queued_s

    @property
    def tpot_s(self) -> np.ndarray:
        """Mean seconds per token after the first, of requests with a second token."""
        several = self.output_tokens > 1
        return (self.last_token_s - self.first_token_s)[several] / (self.output_tokens[several] - 1)

    @property
    def e2e_s(self) -> np.ndarray:
        """Seconds from the queue to the last token."""
        return self.last_token_s - self.queued_s


@dataclass(frozen=True)
class Record:
    """A recorded run: `trace` is what its clients sent, `served` and `series` (of `SERIES`) what it made of that.

    asynchronous: whether the engine chose an iteration while the one before it ran.
    """

    trace: Trace
    served: Served
    series: np.ndarray
    asynchronous: bool

    @staticmethod
    def read(folder: str | Path) -> Record:
        """The record in a run folder; raises UserError that names what is missing or malformed."""
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder} does not exist; run= names the folder of a recorded run.")
        path = folder / "requests.jsonl"
        numbered = [(*_figures(path, number, request), number) for number, request in read_requests(folder)]
        numbered.sort(key=lambda of: of[0])
        table = np.array(numbered)
        times = table[:, :4]
        late = ~np.isfinite(times).all(axis=1) | (np.diff(times[:, 1:], axis=1) < 0).any(axis=1)
        if late.any():
            raise UserError(
                f"{path}: line {numbered[int(np.argmax(late))][-1]} is not a request that was queued before its first "
                "and last token."
            )
        rows = empty_rows(len(table))
        for column, values in zip(("prompt_tokens", "output_tokens", "prefix_tokens"), table[:, 4:7].T, strict=True):
            rows[column] = values
        rows["max_tokens"] = rows["output_tokens"]
        rows["arrival_s"] = times[:, 0] - times[0, 0]
        check(rows, str(path))
        seconds = times[:, 1:] - times[:, 1].min()
        served = Served(seconds[:, 0], seconds[:, 1], seconds[:, 2], rows["output_tokens"])
        trace = Trace(rows, folder.resolve().name, 1)
        return Record(trace, served, _read_series(folder), is_asynchronous(read_meta(folder)))


def _figures(path: Path, number: int, request: dict[str, Any]) -> tuple[float, ...]:
    """Times, then lengths in tokens, of one line; raises UserError for what is no number."""
    needed = ("arrival_time", *_TIMES, "input_toks", "output_toks")
    try:
        figures = (*(float(request[name]) for name in needed), float(request.get("prefix_tokens", 0)))
        if any(not 0 <= tokens < 2**31 or tokens != int(tokens) for tokens in figures[4:]):
            raise ValueError
    except (KeyError, OverflowError, TypeError, ValueError):
        raise UserError(
            f"{path} needs one JSON object a line with the numbers {', '.join(needed)}; line {number} is none."
        ) from None
    for what, tokens in (("a prompt", figures[4]), ("an output", figures[5])):
        if tokens < 1:
            raise UserError(f"{path}: line {number} has {tokens:.0f} tokens; {what} has at least 1 token.")
    return figures


def _read_series(folder: Path) -> np.ndarray:
    path = folder / "timeseries.csv"
    try:
        with path.open(newline="") as file:
            rows = [
                (float(row["t"]), float(row["running"]), float(row["waiting"]), float(row["kv_cache_pct"]) / 100)
                for row in csv.DictReader(file)
            ]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; a run folder needs its recorded series.") from None
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} needs numbers in the columns t, running, waiting and kv_cache_pct.") from None
    return np.array(rows, dtype=SERIES)


def replay(
    policy: Policy, engine: EngineProfile, trace: Trace, asynchronous: bool, tick_s: float = 1.0
) -> tuple[Served, np.ndarray]:
    """What a trace's requests get from `engine` under `policy`, and the series, one row of `SERIES` per `tick_s`.

    Without step-time noise. Raises UserError if the engine refuses a request.
    """
    state = start(engine, trace, seed=0)
    lookout = Lookout(state, SLO(np.inf, np.inf))
    policy.reset(lookout.view)
    queued_s = trace.rows["arrival_s"].copy()
    series: list[tuple[float, ...]] = []
    choice = np.zeros(1, dtype=_CHOICE)
    while int(state.classes["finished"].sum() + state.classes["ended_otherwise"].sum()) < len(trace):
        state.decision[0] = policy.decide(lookout.look())
        _advance(state, trace.rows, asynchronous, queued_s, choice, len(series) * tick_s)
        series.append(_series_row(state))
    requests = state.requests
    refused = np.flatnonzero(requests["status"] != FINISHED)
    if len(refused):
        row = trace.rows[refused[0]]
        tokens = f"{row['prompt_tokens']} + {row['output_tokens']} tokens"
        raise UserError(f"{trace.name}: a request of {tokens} does not fit the engine.")
    served = Served(queued_s, requests["first_token_s"], requests["finish_s"], requests["output_tokens"])
    return served, np.array(series, dtype=SERIES)


@compiled
def _advance(
    state: State, trace: np.ndarray, asynchronous: bool, queued_s: np.ndarray, choices: np.ndarray, until_s: float
) -> None:
    """Runs until the clock reaches `until_s`; `choices` is one `_CHOICE`, the next.

    Writes the time at which each request was taken in into `queued_s`.
    """
    scheduler, batch, engine, choice = state.scheduler[0], state.batch[0], state.engine[0], choices[0]
    apply(state)
    while scheduler.now_s < until_s:
        first = scheduler.trace_next
        arrive(state, trace, choice.now_s)
        queued_s[first : scheduler.trace_next] = choice.now_s
        _plan(state, choice)
        if batch.prefill_tokens > 0 or batch.decode_sequences > 0:
            began_s, seats = scheduler.now_s, seats_taken(state)
            free_blocks, empty_blocks = scheduler.free_blocks, scheduler.empty_blocks
            if asynchronous:
                _note_unknown(state)
            commit(state, step_time(engine, batch))
            choice.now_s = scheduler.now_s
            if asynchronous:
                choice.now_s = began_s
                choice.held_blocks = scheduler.free_blocks - free_blocks
                choice.held_uncached = scheduler.empty_blocks - empty_blocks
                choice.held_seats = seats - seats_taken(state)
            continue
        if choice.now_s == scheduler.now_s:
            # Idle: the next request finds nothing in flight and is scheduled on the spot.
            scheduler.now_s = until_s
            if scheduler.trace_next < scheduler.trace_length:
                scheduler.now_s = min(trace[scheduler.trace_next].arrival_s, until_s)
            settle(state)
        choice.now_s = scheduler.now_s


@compiled
def _note_unknown(state: State) -> None:
    """A block is known by its tokens, and a decode begins before the token that it computes has been told."""
    for i in range(state.scheduler[0].running):
        request = state.requests[state.running[i]]
        if request.scheduled > 0:
            request.unknown = request.generated > 0 and owed_tokens(request) == 1


@compiled
def _plan(state: State, choice) -> None:
    """Plans the next iteration with what `choice` knew: what ended later still has its blocks and its seat."""
    scheduler, engine = state.scheduler[0], state.engine[0]
    scheduler.free_blocks -= choice.held_blocks
    scheduler.empty_blocks -= choice.held_uncached
    engine.max_running -= choice.held_seats
    plan(state)
    scheduler.free_blocks += choice.held_blocks
    scheduler.empty_blocks += choice.held_uncached
    engine.max_running += choice.held_seats
    choice.held_blocks = 0
    choice.held_uncached = 0
    choice.held_seats = 0


def _series_row(state: State) -> tuple[float, ...]:
    total = float(state.engine["kv_blocks"][0])
    return (
        float(state.scheduler["now_s"][0]),
        float(state.classes["running"].sum()),
        float(state.classes["waiting"].sum()),
        1.0 - float(state.scheduler["free_blocks"][0]) / total,
    )
