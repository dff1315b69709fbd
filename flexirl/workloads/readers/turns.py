"""Turns of recorded sessions: each waits for the answer to the one before, and says again what was cached of it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from flexirl.workloads.trace import CONTENT

TOKEN_S = 0.02  # records do not say how long answers took: so many seconds for each of their tokens

Numbers = NDArray[np.int64]


def turns_before(rows: np.ndarray, sessions: Sequence[Hashable]) -> Numbers:
    """Of each row the one before it in its session, by arrival, or -1; a session of None is no session."""
    before = np.full(len(rows), -1, np.int64)
    last: dict[Hashable, int] = {}
    for number in np.argsort(rows["arrival_s"], kind="stable").tolist():
        session = sessions[number]
        if session is not None:
            before[number] = last.get(session, -1)
            last[session] = number
    return before


def link(rows: np.ndarray, before: Numbers) -> None:
    """Lets each row wait for the answer to another (numbers of rows above it, or -1), and then as long as recorded."""
    numbers = np.arange(len(rows))
    linked = numbers[(before >= 0) & (before < numbers)]
    leaders = rows[before[linked]]
    gaps_s = rows["arrival_s"][linked] - leaders["arrival_s"] - TOKEN_S * leaders["output_tokens"]
    rows["follows"][linked] = linked - before[linked]
    rows["delay_s"][linked] = np.maximum(gaps_s, 0.0)


def describe_turns(rows: np.ndarray) -> np.ndarray:
    """Sets what linked rows say, where only the number of cached tokens is known; array of `CONTENT`.

    They are taken to be the first ones of the turn before, prompt and answer. What nobody follows shares nothing.
    """
    followed = np.zeros(len(rows), bool)
    linked = np.flatnonzero(rows["follows"])
    followed[linked - rows["follows"][linked]] = True
    contents: list[tuple[int, int]] = []
    said: dict[int, list[tuple[int, int]]] = {}
    for number in np.flatnonzero(followed | (rows["follows"] > 0)).tolist():
        row = rows[number]
        mine: list[tuple[int, int]] = []
        if row["follows"]:
            cached = int(row["prefix_tokens"])
            for origin, end in said[number - int(row["follows"])]:
                mine.append((origin, min(end, cached)))
                if end >= cached:
                    break
        mine.append((number + 1, int(row["prompt_tokens"]) + int(row["output_tokens"])))
        said[number] = mine
        row["content_first"], row["content_count"] = len(contents), len(mine)
        contents += mine
    return np.array(contents, CONTENT)
