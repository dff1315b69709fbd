"""What a request costs an engine, in seconds of the whole engine: the unit in which load is expressed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexirl.runtime.profile.engine import EngineProfile
from flexirl.runtime.profile.fits import longest_sequence


@dataclass(frozen=True)
class ServiceTime:
    """The engine's seconds per request in a full batch of requests like it; load 1 keeps the engine busy all the time.

    Prefill tokens cost what they add to a large iteration. An output token costs its share of a decode iteration that
    holds as many such requests as seats and memory allow. Both at once is the fluid picture of continuous batching,
    without any latency promise, so what can be served within an SLO lies below load 1. An output ends where the
    engine's longest sequence does, and a prompt that leaves no token costs nothing: it is never served.
    """

    engine: EngineProfile

    def __call__(self, rows: np.ndarray) -> NDArray[np.float64]:
        """Seconds for each of `rows` (array of `TRACE_ROW`)."""
        room = longest_sequence(self.engine.values) - rows["prompt_tokens"].astype(np.int64)
        seconds = self._seconds(rows, np.clip(rows["output_tokens"], 1, np.maximum(room, 1)).astype(np.float64))
        return np.where(room >= 1, seconds, 0.0)

    def if_held(self, rows: np.ndarray) -> NDArray[np.float64]:
        """Seconds for each of `rows` on an engine like this that could hold all of them."""
        return self._seconds(rows, rows["output_tokens"].astype(np.float64))

    def _seconds(self, rows: np.ndarray, output: NDArray[np.float64]) -> NDArray[np.float64]:
        engine = self.engine.values
        prompt = rows["prompt_tokens"].astype(np.float64)
        cached = np.minimum(rows["prefix_tokens"], rows["prompt_tokens"] - 1)
        computed = prompt - cached
        per_prefill_token_s = (
            engine["per_token_s"] + engine["per_token_64_s"] + engine["per_token_128_s"] + engine["per_token_256_s"]
        )
        prefill_s = (
            per_prefill_token_s * computed
            + engine["per_chunk_context_s"] * (computed * cached + 0.5 * computed**2)
            + engine["per_image_token_s"] * rows["image_tokens"]
        )
        context = prompt + 0.5 * output
        seats = np.clip(engine["kv_blocks"] * engine["block_size"] / context, 1.0, engine["max_running"])
        decode_s = (
            (engine["base_s"] + engine["host_s"] + engine["over_16_s"]) / seats
            + engine["per_sequence_s"]
            + engine["per_token_s"]
            + engine["per_token_64_s"] * np.maximum(1 - 64 / seats, 0)
            + engine["per_token_128_s"] * np.maximum(1 - 128 / seats, 0)
            + engine["per_context_s"] * context
        )
        return prefill_s + output * decode_s


def shares_lost(engine: EngineProfile, rows: np.ndarray) -> dict[str, float]:
    """What of some requests an engine cannot serve, as shares of them, 0 without any.

    unservable: requests that it can never hold; unservable_work: their part of the service time that all would take if
    it could; cut_short: requests whose outputs end where the longest sequence does.
    """
    room = longest_sequence(engine.values) - rows["prompt_tokens"].astype(np.int64)
    never = room < 1
    seconds = ServiceTime(engine).if_held(rows)
    count, total_s = max(len(rows), 1), float(seconds.sum()) or 1.0
    return {
        "unservable": float(never.sum() / count),
        "unservable_work": float(seconds[never].sum() / total_s),
        "cut_short": float((~never & (rows["output_tokens"] >= room)).sum() / count),
    }


def in_words(lost: Mapping[str, float], what: str) -> list[str]:
    """A sentence for each of `shares_lost` that is not 0; `what`: the requests, in words."""
    said = []
    if lost["unservable"] > 0:
        said.append(
            f"{lost['unservable']:.2%} of {what} ({lost['unservable_work']:.1%} of their service time) can never fit "
            "the engine: they are refused, count as missed, and are no part of the load."
        )
    if lost["cut_short"] > 0:
        said.append(f"{lost['cut_short']:.2%} of {what} end where the engine's longest sequence does.")
    return said
