"""What an engine can hold: the one rule that load, clipping, admission and the upper bound go by.

A request fits if its prompt and the output its client asks for are no longer than the longest sequence. A client that
asks for more gets what is left (`Trace.within`), so that only a prompt that leaves no token can never be served.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flexirl.compiled import compiled


@compiled
def longest_sequence(engine) -> int:
    """Tokens of the longest sequence: what the model takes, or a whole KV cache; `engine` is one `ENGINE` record."""
    return min(engine.max_model_len, engine.kv_blocks * engine.block_size)


def fits(engine: np.ndarray, rows: np.ndarray) -> NDArray[np.bool_]:
    """Whether the engine can ever hold each of `rows` (array of `TRACE_ROW`)."""
    return rows["prompt_tokens"].astype(np.int64) + rows["max_tokens"] <= longest_sequence(engine)
