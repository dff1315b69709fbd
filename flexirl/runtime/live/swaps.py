"""Whose keys and values have to move between device and host memory, told from what the scheduler did."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flexirl.compiled import compiled
from flexirl.runtime.scheduler.state import WAITING, State


class Swaps(NamedTuple):
    """R requests, of which at most S run or have run in the last plan."""

    running: np.ndarray  # int32, (S,): the running batch as the last plan left it
    listed: np.ndarray  # int64, (1,): how many those are
    swapped: np.ndarray  # bool, (R,): keys and values are in host memory, or about to go there
    rows: np.ndarray  # int32, (R,): the block table that a request had when it was swapped out
    out: np.ndarray  # int32, (S,): those about to go
    going: np.ndarray  # int64, (1,): how many those are


def new_swaps(max_requests: int, seats: int) -> Swaps:
    """Nothing runs, and nothing is in host memory."""
    return Swaps(
        np.zeros(seats, np.int32), np.zeros(1, np.int64), np.zeros(max_requests, np.bool_),
        np.zeros(max_requests, np.int32), np.zeros(seats, np.int32), np.zeros(1, np.int64),
    )  # fmt: skip


@compiled
def note_swaps(state: State, swaps: Swaps) -> None:
    """Notes who was swapped out since the last plan; call it after each decision that evicts somebody.

    Another decision may let them join again before the next plan, with other blocks.
    """
    for i in range(swaps.listed[0]):
        r = swaps.running[i]
        request = state.requests[r]
        if request.status == WAITING and request.host_blocks > 0 and not swaps.swapped[r]:
            swaps.swapped[r] = True
            swaps.rows[r] = request.row
            swaps.out[swaps.going[0]] = r
            swaps.going[0] += 1


@compiled
def list_swaps(state: State, swaps: Swaps, swapped_out: np.ndarray, swapped_in: np.ndarray) -> tuple[int, int]:
    """Lists whose keys and values move (int32, (S,) each), and returns how many; call it after each `plan`.

    The block table of a request swapped out still names its blocks, but they may have been given to another: they have
    to be copied before any other change to the cache. One that is back already is in both lists.
    """
    note_swaps(state, swaps)
    out, back = 0, 0
    for i in range(swaps.going[0]):
        if swaps.swapped[swaps.out[i]]:  # or else it has ended meanwhile
            swapped_out[out] = swaps.out[i]
            out += 1
    swaps.going[0] = 0
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
