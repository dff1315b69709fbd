"""How long outputs will be, learned from those that have ended: a distribution for every request, asked by quantile.

Requests are of kinds within kinds: their class; tenant and `max_tokens`; what they begin with (a file's instruction, an
assistant's system prompt); prompt length to a factor of 2. Each kind counts outputs in bins a quarter of an octave
wide. A kind that has seen few leans on the one around it, as if it had seen `LEAN` more outputs spread as there (a
Dirichlet prior, as in hierarchical language models: MacKay and Peto, 1995), and the outermost on all lengths up to
`max_tokens` alike, by their logarithm. Counts fade, so a kind that changes is followed.

Only requests that have finished are learned from. Short outputs finish first, so what is new looks shorter than it is
until its first long ones have ended.
"""

from __future__ import annotations

import numpy as np

from flexirl.compiled import compiled
from flexirl.runtime.scheduler.state import LENGTH_BINS, State

PER_OCTAVE = 4
LEAN = 4.0
_MOST = 512.0  # outputs that a kind has counted when it halves its counts
_LEVELS = 4
_PROBES = 8
_OUTERMOST = 2  # the first slots are those of the classes


@compiled
def predicted_tokens(state: State, r: int, quantile: float) -> float:
    """Output tokens that request r stays below with this probability (0 to 1), given those it has made already."""
    request = state.requests[r]
    shares = _shares(state.lengths, request, beginning_of(state.contents, request))
    least = _position(request.generated + 1)
    begun = min(int(least), LENGTH_BINS - 1)
    shares[:begun] = 0.0
    shares[begun] *= max(begun + 1 - least, 0.0)
    wanted = quantile * shares.sum()
    for i in range(begun, LENGTH_BINS):
        if wanted <= shares[i] and shares[i] > 0.0:
            start = max(least, float(i))
            position = start + (i + 1 - start) * wanted / shares[i]
            return float(min(max(np.floor(2.0 ** (position / PER_OCTAVE)), request.generated + 1), request.max_tokens))
        wanted -= shares[i]
    return float(request.max_tokens)


@compiled
def learn_length(state: State, r: int) -> None:
    """Request r has finished: its kinds learn its output's length, and what was thought of it is kept account of."""
    request = state.requests[r]
    beginning = beginning_of(state.contents, request)
    at = min(int(_position(request.generated)), LENGTH_BINS - 1)
    _book_place(state.length_tenths[request.request_class], _shares(state.lengths, request, beginning), at)
    for level in range(_LEVELS):
        tag = _tag(request, beginning, level)
        n = _slot(state.lengths, request, tag, level)
        if n < 0:
            n = _claim(state.lengths, tag)
        kind = state.lengths[n]
        kind.counts[at] += np.float32(1.0)
        kind.total += np.float32(1.0)
        if kind.total >= _MOST:
            kind.counts[:] *= np.float32(0.5)
            kind.total *= np.float32(0.5)


@compiled
def forget_lengths(state: State) -> None:
    """Nothing has been learned."""
    for kind in state.lengths:
        kind.tag = 0
        kind.total = 0.0
        kind.counts[:] = 0.0
    state.length_tenths[:] = 0.0


@compiled
def _position(tokens: int) -> float:
    """Where among the bins a length of so many tokens lies."""
    return PER_OCTAVE * np.log2(max(float(tokens), 1.0))


@compiled
def beginning_of(contents: np.ndarray, request) -> np.uint64:
    """What request begins with, as far as others may begin likewise; 0 for nothing."""
    return contents[request.content_first].origin if request.content_count > 0 else np.uint64(0)


@compiled
def _shares(lengths: np.ndarray, request, beginning: np.uint64) -> np.ndarray:
    """The probability of each bin, float64 (LENGTH_BINS,), of which `max_tokens` cuts off nothing yet."""
    shares = np.zeros(LENGTH_BINS)
    possible = min(int(_position(request.max_tokens)), LENGTH_BINS - 1) + 1
    shares[:possible] = 1.0 / possible
    for level in range(_LEVELS):
        n = _slot(lengths, request, _tag(request, beginning, level), level)
        if n < 0:
            break
        weight, counts = 1.0 / (lengths[n].total + LEAN), lengths[n].counts
        leaning = LEAN * weight
        for i in range(LENGTH_BINS):
            shares[i] = weight * counts[i] + leaning * shares[i]
    return shares


@compiled
def _tag(request, beginning: np.uint64, level: int) -> np.uint64:
    """The name of the kind that a request is of at a level from 1 on; never 0, which an empty slot has."""
    tag = mixed(np.uint64(0), np.uint64(request.request_class + 2 * request.tenant))
    tag = mixed(tag, np.uint64(request.max_tokens))
    if level > 1:
        tag = mixed(tag, beginning)
    if level > 2:
        tag = mixed(tag, np.uint64(1 + _position(request.prompt_tokens) / PER_OCTAVE))
    return tag | np.uint64(1)


@compiled
def _slot(lengths: np.ndarray, request, tag: np.uint64, level: int) -> int:
    """Where a kind is counted, or -1."""
    if level == 0:
        return request.request_class
    for i in range(_PROBES):
        n = _place(tag, i, len(lengths))
        if lengths[n].tag == tag:
            return n
    return -1


@compiled
def _claim(lengths: np.ndarray, tag: np.uint64) -> int:
    """A slot for a kind that has none: of its places the one with least in it, which is forgotten."""
    least = _place(tag, 0, len(lengths))
    for i in range(1, _PROBES):
        n = _place(tag, i, len(lengths))
        if lengths[n].total < lengths[least].total:
            least = n
    lengths[least].tag = tag
    lengths[least].total = 0.0
    lengths[least].counts[:] = 0.0
    return least


@compiled
def _place(tag: np.uint64, i: int, slots: int) -> int:
    return _OUTERMOST + (int(tag >> np.uint64(32)) + i) % (slots - _OUTERMOST)


@compiled
def mixed(tag: np.uint64, value: np.uint64) -> np.uint64:
    """The finaliser of splitmix64 (Steele et al., 2014)."""
    z = (tag ^ value) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x632BE59BD9B4E019)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@compiled
def _book_place(tenths: np.ndarray, shares: np.ndarray, at: int) -> None:
    """Counts in which tenths of its predicted distribution an output lies; a bin may cover several.

    The histogram of probability integral transforms for counts of Czado, Gneiting and Held, Biometrics 65 (2009):
    flat if what is predicted happens as often as it should.
    """
    below = shares[:at].sum()
    within = max(shares[at], 1e-12)
    for i in range(len(tenths)):
        start, end = max(i / len(tenths), below), min((i + 1) / len(tenths), below + within)
        tenths[i] += max(end - start, 0.0) / within
