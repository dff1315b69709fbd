"""One iteration of a live engine in compiled code: from the plan to a flattened batch, from its tokens to `commit`.

Arrays are made once and filled anew for each iteration; what is valid of them is counted in `Counts`.
"""

from __future__ import annotations

import secrets
from typing import NamedTuple

import numba as nb
import numpy as np
from numba.experimental import structref

from flexirl.compiled import compiled
from flexirl.runtime.live.contents import describe
from flexirl.runtime.live.request_table import enter
from flexirl.runtime.live.swaps import Swaps, list_swaps
from flexirl.runtime.profile.engine import EngineProfile
from flexirl.runtime.scheduler.books import best_effort
from flexirl.runtime.scheduler.commit import commit, stop_after
from flexirl.runtime.scheduler.kv_cache import blocks_for
from flexirl.runtime.scheduler.plan import plan
from flexirl.runtime.scheduler.state import State
from flexirl.workloads.trace import DEFERRED


class RequestArrays(NamedTuple):
    """What a live engine keeps of each of R requests beside the scheduler's record; L tokens is the longest one.

    Pages of large arrays that are never used take no memory.
    """

    tokens: np.ndarray  # int32 (R, L): the prompt, then the output
    salts: np.ndarray  # uint64 (R, blocks of the longest): of the images that begin in each block, 0 for none
    seed: np.ndarray  # uint64 (R,)
    ends_early: np.ndarray  # bool (R,): an end-of-sequence token ends it
    watched: np.ndarray  # bool (R,): its tokens are looked at one by one
    cached: np.ndarray  # int32 (R,): tokens of its prompt found in the prefix cache; -1 before it first runs
    key: np.ndarray  # uint64 (2,): of the hashes by which the prefix cache knows tokens


class FlatBatch(NamedTuple):
    """N requests of T tokens in all, those of one request side by side, in the order of the running batch; S of them
    sample a token."""

    requests: np.ndarray  # int32 (N,)
    query_lens: np.ndarray  # int64 (N,): tokens of each request in this iteration
    context_lens: np.ndarray  # int64 (N,): tokens it attends to, this iteration's included
    blocks: np.ndarray  # int32, (N, widest) row by row: blocks of each request
    tokens: np.ndarray  # int64 (T,)
    positions: np.ndarray  # int64 (T,)
    slots: np.ndarray  # int64 (T,): block * block_size + offset, where keys and values go
    sampled: np.ndarray  # int32 (S,): the requests that sample
    sampled_rows: np.ndarray  # int64 (S,): the rows they sample from
    draws: np.ndarray  # float64 (S,): uniform in (0, 1), by the request's seed and the token's number
    stops: np.ndarray  # bool (S,): the token ends its request before max_tokens
    ended: np.ndarray  # bool (S,): its request has ended with it
    swapped_out: np.ndarray  # int32
    swapped_in: np.ndarray  # int32
    saved: np.ndarray  # int32 (saved, 2): deferred requests and how many more of their blocks to copy to host memory


@structref.register
class _LiveStateType(nb.types.StructRef):
    """The compiled side of `LiveState`."""


class LiveState(structref.StructRefProxy):
    """All that `prepare` and `finish` work on as one argument: `State`, `Swaps`, `RequestArrays`, `FlatBatch`.

    Passing their forty arrays one by one, compiled code would take longer to unpack them than for its work.
    """

    state: State
    swaps: Swaps
    arrays: RequestArrays
    flat: FlatBatch

    def __new__(cls, state: State, swaps: Swaps, arrays: RequestArrays, flat: FlatBatch) -> LiveState:
        """The arrays are shared, not copied."""
        return _new_live_state(state, swaps, arrays, flat)


structref.define_proxy(LiveState, _LiveStateType, ["state", "swaps", "arrays", "flat"])


@compiled
def _new_live_state(state: State, swaps: Swaps, arrays: RequestArrays, flat: FlatBatch) -> LiveState:
    # The proxy's own constructor is compiled anew in every process.
    return LiveState(state, swaps, arrays, flat)


class Counts(NamedTuple):
    """How many entries of a `FlatBatch` are valid."""

    requests: int
    tokens: int
    widest: int  # blocks of the longest context
    sampled: int
    swapped_out: int
    swapped_in: int
    saved: int
    copies: int  # between device and host tier
    urgent: bool  # something in it is not work that may wait
    ended_otherwise: int  # requests that did not finish, since the start


def new_request_arrays(max_requests: int, max_model_len: int, longest: int) -> RequestArrays:
    """Room for `max_requests` requests; longest: blocks of the longest sequence."""
    return RequestArrays(
        tokens=np.zeros((max_requests, max_model_len), np.int32),
        salts=np.zeros((max_requests, longest), np.uint64),
        seed=np.zeros(max_requests, np.uint64),
        ends_early=np.zeros(max_requests, np.bool_),
        watched=np.zeros(max_requests, np.bool_),
        cached=np.full(max_requests, -1, np.int32),
        key=np.frombuffer(secrets.token_bytes(16), np.uint64).copy(),
    )


def new_flat_batch(profile: EngineProfile, longest: int) -> FlatBatch:
    """Room for the largest iteration of an engine; longest: blocks of the longest sequence."""
    seats, tokens = int(profile.values["max_running"]), int(profile.values["max_tokens_per_step"])
    return FlatBatch(
        requests=np.zeros(seats, np.int32),
        query_lens=np.zeros(seats, np.int64),
        context_lens=np.zeros(seats, np.int64),
        blocks=np.zeros(seats * longest, np.int32),
        tokens=np.zeros(tokens, np.int64),
        positions=np.zeros(tokens, np.int64),
        slots=np.zeros(tokens, np.int64),
        sampled=np.zeros(seats, np.int32),
        sampled_rows=np.zeros(seats, np.int64),
        draws=np.zeros(seats),
        stops=np.zeros(seats, np.bool_),
        ended=np.zeros(seats, np.bool_),
        swapped_out=np.zeros(2 * seats, np.int32),
        swapped_in=np.zeros(2 * seats, np.int32),
        saved=np.zeros((seats, 2), np.int32),
    )


@compiled
def take_in(live: LiveState, r: int, rows: np.ndarray) -> None:
    """Submits the request in `rows` (`TRACE_ROW`, (1,)), whose prompt stands in place r of the arrays."""
    state, arrays, request, row = live.state, live.arrays, live.state.requests[r], rows[0]
    arrays.cached[r] = -1
    if state.engine[0].prefix_caching:
        row.content_first = r * np.int64(arrays.salts.shape[1])
        request.content_first = row.content_first
        request.content_count = 0
        describe(state, r, arrays.tokens[r], row.prompt_tokens, arrays.salts[r], arrays.key)
        row.content_count = request.content_count
    enter(state, r, rows)


@compiled
def prepare(live: LiveState, save_blocks: int) -> tuple[int, int, int, int, int, int, int, int, bool, int]:
    """Plans the next iteration and writes the flattened batch; returns `Counts`.

    save_blocks: blocks of deferred requests, at most, to list for copying to host memory.
    """
    state, arrays, flat = live.state, live.arrays, live.flat
    state.scheduler[0].copies = 0
    plan(state)
    swapped_out, swapped_in = list_swaps(state, live.swaps, flat.swapped_out, flat.swapped_in)
    block_size = state.engine[0].block_size
    widest = 0
    for i in range(state.scheduler[0].running):
        request = state.requests[state.running[i]]
        if request.scheduled > 0:
            widest = max(widest, blocks_for(request.computed + request.scheduled, block_size))
    requests = tokens = sampled = saved = 0
    urgent = False
    for i in range(state.scheduler[0].running):
        r = state.running[i]
        request = state.requests[r]
        if request.scheduled == 0:
            continue
        start, count = request.computed, request.scheduled
        if arrays.cached[r] < 0:
            arrays.cached[r] = start
        end, known = start + count, request.prompt_tokens + request.generated
        urgent = urgent or not best_effort(request)
        flat.requests[requests] = r
        flat.query_lens[requests] = count
        flat.context_lens[requests] = end
        row = state.block_rows[request.row]
        for b in range(blocks_for(end, block_size)):
            flat.blocks[requests * widest + b] = row[b]
        for position in range(start, end):
            at = tokens + position - start
            flat.tokens[at] = arrays.tokens[r, position]
            flat.positions[at] = position
            flat.slots[at] = np.int64(row[position // block_size]) * block_size + position % block_size
        if end == known:
            flat.sampled[sampled] = r
            flat.sampled_rows[sampled] = tokens + count - 1
            flat.draws[sampled] = uniform(arrays.seed[r], request.generated)
            flat.stops[sampled] = False
            sampled += 1
        if save_blocks > 0 and request.request_class == DEFERRED:
            unsaved = min((start - request.saved) // block_size, save_blocks)
            if unsaved > 0:
                flat.saved[saved, 0] = r
                flat.saved[saved, 1] = unsaved
                saved += 1
                save_blocks -= unsaved
        tokens += count
        requests += 1
    copies = int(state.scheduler[0].copies)
    ended_otherwise = _ended_otherwise(state)
    return requests, tokens, widest, sampled, swapped_out, swapped_in, saved, copies, urgent, ended_otherwise


@compiled
def finish(live: LiveState, tokens: np.ndarray, is_end: np.ndarray, elapsed_s: float) -> tuple[int, int]:
    """Books the sampled tokens and commits the iteration.

    tokens: int64 (S,); is_end: bool (vocabulary,), the end-of-sequence tokens. Sets `stops`, on top of what is set in
    it already, and `ended`. Returns how many requests ended with these tokens, and how many otherwise since the start.
    """
    state, arrays, flat = live.state, live.arrays, live.flat
    ended = 0
    for i in range(len(tokens)):
        r = flat.sampled[i]
        request = state.requests[r]
        arrays.tokens[r, request.prompt_tokens + request.generated] = tokens[i]
        if arrays.ends_early[r] and is_end[tokens[i]]:
            flat.stops[i] = True
        if flat.stops[i]:
            stop_after(state, r)
        flat.ended[i] = request.generated + 1 == request.output_tokens
        if state.engine[0].prefix_caching:
            known = request.prompt_tokens + request.generated + 1
            describe(state, r, arrays.tokens[r], known, arrays.salts[r], arrays.key)
        ended += flat.ended[i]
    commit(state, elapsed_s)
    return ended, _ended_otherwise(state)


@compiled
def _ended_otherwise(state: State) -> int:
    return state.classes[0].ended_otherwise + state.classes[1].ended_otherwise


@compiled
def uniform(seed: np.uint64, number: int) -> float:
    """A uniform number in (0, 1) that depends on its arguments alone, so that a schedule cannot change what is drawn.

    SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
    """
    z = _mix(seed) + np.uint64(number + 1) * np.uint64(0x9E3779B97F4A7C15)
    return (float(_mix(z) >> np.uint64(11)) + 0.5) / 9007199254740992.0


@nb.njit(cache=True, inline="always")
def _mix(z):
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
