"""How soon what a request leaves in the prefix cache is asked for again, learned from what came back.

Requests that begin alike (under one system prompt) and are about equally long are of one kind: a lane of idle nodes.
Of each kind it is counted how many left something behind, and after how long that was asked for again; for a while
also of what had been given up meanwhile, or else what is given up early could never prove itself. A kind that has seen
few leans on all kinds together. Counts fade, so a kind that changes is followed.

What gives way first is what has the least Gittins index (Gittins, "Bandit processes and dynamic allocation indices",
J. Royal Statistical Society B 41, 1979): the most returns per second of waiting that can be expected of it, whatever
time one is ready to wait. Returns per second of space held is how LHD ranks, too (Beckmann et al., NSDI 2018).
"""

from __future__ import annotations

import numba as nb
import numpy as np

from flexirl.compiled import compiled
from flexirl.runtime.scheduler.lengths import beginning_of, mixed
from flexirl.runtime.scheduler.state import AGE_BINS, KINDS, RUNNING, State
from flexirl.workloads.trace import IMMEDIATE

LEAN = 4.0
_MOST = 512.0  # requests that a kind has counted when it halves its counts
_RANKED_FOR_S = 5.0  # seconds until indices are computed anew
_YOUNGEST_S, _PER_OCTAVE = 0.25, 2  # ages are told apart from a quarter of a second to 17 minutes
_FEWEST = 0.05  # share of a kind taken to wait still, however many have come back


@compiled
def forget_returns(state: State) -> None:
    """Nothing has been learned."""
    for returns in state.returns:
        returns.left = 0.0
        returns.after[:] = 0.0
        returns.index[:] = 0.0
    for ghost in state.ghosts:
        ghost.origin = 0
    state.scheduler[0].ranked_s = -np.inf


@compiled
def kind_of(state: State, r: int) -> int:
    """The kind of immediate request r, by what it begins with and its prompt's length to a factor of 4."""
    request = state.requests[r]
    length = np.uint64(np.log2(max(float(request.prompt_tokens), 1.0)) / 2.0)
    return int(
        (mixed(beginning_of(state.contents, request), mixed(np.uint64(0), length)) >> np.uint64(32)) % np.uint64(KINDS)
    )


@compiled
def note_left(state: State, r: int, kind: int) -> None:
    """Request r leaves what it has in the cache, and may be asked for again unless it was only preempted."""
    if state.requests[r].request_class != IMMEDIATE or state.requests[r].status == RUNNING:
        return
    returns = state.returns[kind]
    returns.left += np.float32(1.0)
    if returns.left >= _MOST:
        returns.left *= np.float32(0.5)
        returns.after[:] *= np.float32(0.5)


@compiled
def note_return(state: State, kind: int, age_s: float) -> None:
    """What a request of a kind left `age_s` seconds ago is asked for again."""
    state.returns[kind].after[age_bin(age_s)] += np.float32(1.0)


@compiled
def note_given_up(state: State, origin: np.uint64, kind: int, idle_s: float) -> None:
    """Blocks of this origin, which a request of a kind left at second `idle_s`, are in the cache no longer."""
    ghost = state.ghosts[_place(state, origin)]
    ghost.origin = origin
    ghost.kind = kind
    ghost.idle_s = idle_s


@compiled
def note_miss(state: State, origin: np.uint64) -> bool:
    """Blocks of this origin are asked for and not in the cache; True if they were given up lately, and now count."""
    ghost = state.ghosts[_place(state, origin)]
    if ghost.origin != origin or origin == 0:
        return False
    ghost.origin = 0
    note_return(state, ghost.kind, state.scheduler[0].now_s - ghost.idle_s)
    return True


@nb.njit(cache=True, inline="always")
def worth_keeping(state: State, kind: int, idle_s: float) -> float:
    """The Gittins index of what a request of a kind left at second `idle_s`: returns per second."""
    return state.returns[kind].index[age_bin(state.scheduler[0].now_s - idle_s)]


@compiled
def rank(state: State) -> None:
    """Computes the indices of all kinds from what has been learned so far, if that is some seconds ago."""
    if state.scheduler[0].now_s < state.scheduler[0].ranked_s + _RANKED_FOR_S:
        return
    state.scheduler[0].ranked_s = state.scheduler[0].now_s
    left, after = 0.0, np.zeros(AGE_BINS)
    for returns in state.returns:
        left += returns.left
        after += returns.after
    share = LEAN / max(left, 1.0)
    waiting = np.empty(AGE_BINS + 1)
    for returns in state.returns:
        whole = returns.left + LEAN
        waiting[0] = whole
        for b in range(AGE_BINS):
            waiting[b + 1] = max(waiting[b] - returns.after[b] - share * after[b], _FEWEST * whole)
        for b in range(AGE_BINS):
            seconds, best = 0.0, 0.0
            for end in range(b + 1, AGE_BINS + 1):
                seconds += 0.5 * (waiting[end - 1] + waiting[end]) * (_age_s(end) - _age_s(end - 1))
                best = max(best, (waiting[b] - waiting[end]) / seconds)
            returns.index[b] = best


@compiled
def age_bin(age_s: float) -> int:
    """Where an age of so many seconds is counted."""
    return min(max(int(_PER_OCTAVE * np.log2(max(age_s, 1e-9) / _YOUNGEST_S)), 0), AGE_BINS - 1)


@compiled
def _age_s(b: int) -> float:
    """The age that a bin begins with."""
    return _YOUNGEST_S * 2.0 ** (b / _PER_OCTAVE)


@nb.njit(cache=True, inline="always")
def _place(state: State, origin: np.uint64) -> int:
    return int((mixed(np.uint64(0), origin) >> np.uint64(32)) & np.uint64(len(state.ghosts) - 1))
