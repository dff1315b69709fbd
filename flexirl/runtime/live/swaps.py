"""Whose keys and values have to move between device and host memory, told from the outcome of a plan."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flexirl.compiled import compiled
from flexirl.runtime.scheduler.state import WAITING, State


class Swaps(NamedTuple):
    """R requests, of which at most S run or have run in the last plan."""

    running: np.ndarray  # int32, (S,): the running batch as the last plan left it
    listed: np.ndarray  # int64, (1,)
    swapped: np.ndarray  # bool, (R,): keys and values are in host memory


def new_swaps(max_requests: int, seats: int) -> Swaps:
    """Nothing runs, and nothing is in host memory."""
    return Swaps(np.zeros(seats, np.int32), np.zeros(1, np.int64), np.zeros(max_requests, np.bool_))


@compiled
def list_swaps(state: State, swaps: Swaps, swapped_out: np.ndarray, swapped_in: np.ndarray) -> tuple[int, int]:
    """Lists whose keys and values move (int32, (S,) each), and returns how many; call it after each `plan`.

    The block table of a request swapped out still names its blocks, but they may have been given to another: they have
    to be copied before any other change to the cache.
    """
    out, back = 0, 0
    for i in range(swaps.listed[0]):
        r = swaps.running[i]
        request = state.requests[r]
        if request.status == WAITING and request.host_blocks > 0 and not swaps.swapped[r]:
            swaps.swapped[r] = True
            swapped_out[out] = r
            out += 1
    running = state.scheduler[0].running
    for i in range(running):
        r = state.running[i]
        swaps.running[i] = r
        if swaps.swapped[r]:
            swaps.swapped[r] = False
            swapped_in[back] = r
            back += 1
    swaps.listed[0] = running
    return out, back
