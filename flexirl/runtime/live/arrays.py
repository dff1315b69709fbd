"""The arrays of a live engine, shared by all its parts and by compiled code, and their beginning."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flexirl.runtime.live.executor import Executor
from flexirl.runtime.live.iteration import (
    FlatBatch,
    LiveState,
    RequestArrays,
    finish,
    new_flat_batch,
    new_request_arrays,
    prepare,
    take_in,
)
from flexirl.runtime.live.options import Options
from flexirl.runtime.live.request_table import leave
from flexirl.runtime.live.swaps import Swaps, new_swaps, note_swaps
from flexirl.runtime.scheduler.commit import abandon
from flexirl.runtime.scheduler.intake import cancel
from flexirl.runtime.scheduler.kv_cache import blocks_for
from flexirl.runtime.scheduler.plan import apply
from flexirl.runtime.scheduler.state import FUTURE, State, new_states
from flexirl.runtime.simulator import surrogate
from flexirl.workloads.trace import empty_rows


class Arrays(NamedTuple):
    """What an engine works on."""

    state: State
    swaps: Swaps
    requests: RequestArrays
    flat: FlatBatch
    live: LiveState  # the four above as one argument
    is_end: np.ndarray  # bool (vocabulary,): end-of-sequence tokens


def new_arrays(executor: Executor, options: Options, patience: float) -> Arrays:
    """Arrays of an engine without requests; all that its first iterations call is compiled by then.

    patience: see `SLO`.
    """
    profile = executor.profile
    max_model_len = int(profile.values["max_model_len"])
    longest = blocks_for(max_model_len, int(profile.values["block_size"]))
    caching = bool(profile.values["prefix_caching"])
    contents = options.max_requests * longest if caching else 0
    states = new_states(1, profile, options.max_requests, options.num_tenants, contents, numbered=True)
    state = State(*(array[0] for array in states))
    swaps = new_swaps(options.max_requests, len(state.running))
    requests = new_request_arrays(options.max_requests, max_model_len, longest)
    flat = new_flat_batch(profile, longest)
    is_end = np.zeros(executor.vocab_size, np.bool_)
    is_end[list(executor.end_tokens)] = True
    arrays = Arrays(state, swaps, requests, flat, LiveState(state, swaps, requests, flat), is_end)
    _start(arrays, options.seed, patience)
    return arrays


def _start(arrays: Arrays, seed: int, patience: float) -> None:
    state = arrays.state
    no_tokens = np.zeros(0, np.int64)
    surrogate.start(state, empty_rows(0), seed, patience)
    take_in(arrays.live, 0, empty_rows(1))
    cancel(state, 0)
    leave(state, 0)
    apply(state)
    note_swaps(state, arrays.swaps)
    prepare(arrays.live, 0)
    finish(arrays.live, no_tokens, arrays.is_end, 0.0)
    abandon(state, 0.0)
    state.requests["status"] = FUTURE
    surrogate.start(state, empty_rows(0), seed, patience)
    # No bound on a real iteration is certain, so a promise is broken when its time has passed and not before.
    state.scheduler["fastest_step_s"] = 0.0
