"""What a request costs an engine, in seconds of the whole engine: the unit in which load is expressed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexirl.runtime.profile.engine import EngineProfile


@dataclass(frozen=True)
class ServiceTime:
    """The engine's seconds per request in a full batch of requests like it; load 1 keeps the engine busy all the time.

    Prefill tokens cost what they add to a large iteration. An output token costs its share of a decode iteration that
    holds as many such requests as seats and memory allow. Both at once is the fluid picture of continuous batching,
    without any latency promise, so what can be served within an SLO lies below load 1.
    """

    engine: EngineProfile

    def __call__(self, rows: np.ndarray) -> NDArray[np.float64]:
        """Seconds for each of `rows` (array of `TRACE_ROW`)."""
        engine = self.engine.values
        prompt = rows["prompt_tokens"].astype(np.float64)
        output = rows["output_tokens"].astype(np.float64)
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
