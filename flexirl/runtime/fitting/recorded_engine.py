"""What a recorded engine could hold: as its record says, as the user says, or derived where neither does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flexirl.errors import UserError

BLOCK_SIZE = 16  # tokens; vLLM's default on GPUs
# From this version on vLLM chooses an iteration while the one before it runs, unless told otherwise.
_ASYNCHRONOUS_SINCE = (0, 14)
_FIELDS = {
    "max_tokens_per_step": "max_num_batched_tokens", "max_running": "max_num_seqs", "max_model_len": "max_model_len",
    "block_size": "block_size", "kv_blocks": "num_gpu_blocks",
}  # fmt: skip


def capacity_of(
    path: Path, meta: Mapping[str, Any], lengths: np.ndarray, given: Mapping[str, int | None]
) -> tuple[dict[str, float], dict[str, str]]:
    """Capacity figures of an engine profile, and where each is from.

    path: of the record, for messages; lengths: prompt and output tokens of its requests, int (requests, 2); given: what
    the user says, which goes before the record. Where nobody says, the block size is vLLM's, the longest sequence that
    of the record's longest request, and the cache as large as seats can ever fill, so that memory is not short.
    Raises UserError for limits on seats and tokens that nobody says.
    """
    cache = meta.get("kv_cache") or {}
    recorded = {**(meta.get("engine_kwargs") or {}), **cache}
    values: dict[str, float] = {}
    origin: dict[str, str] = {}
    longest = int(lengths.sum(axis=1).max())
    for field, name in _FIELDS.items():
        value, said = given.get(field), recorded.get(name)
        if value is not None:
            values[field], origin[field] = value, f"set by engine.{field}"
        elif isinstance(said, int) and not isinstance(said, bool):
            # vLLM keeps one block of its pool back: padding and skipped positions point to it.
            values[field], origin[field] = said - (field == "kv_blocks"), "setting of the recorded run (meta.json)"
        elif field == "block_size":
            values[field], origin[field] = BLOCK_SIZE, "not recorded: vLLM's default"
        elif field == "max_model_len":
            values[field], origin[field] = longest, "not recorded: the record's longest request"
        elif field == "kv_blocks":
            blocks = -(-longest // values["block_size"]) * values["max_running"]
            values[field], origin[field] = (
                blocks,
                "not recorded: as many as seats can fill",
            )
        else:
            raise UserError(f"{path} needs the whole number {name} of the recorded engine; or give engine.{field}=.")
    values["prefix_caching"] = int(bool(cache.get("enable_prefix_caching", False)))
    origin["prefix_caching"] = "setting of the recorded run (meta.json)"
    return values, origin


def is_asynchronous(meta: Mapping[str, Any]) -> bool:
    """Whether the engine chose an iteration while the one before it ran: as recorded, or as its version does."""
    scheduler = (meta.get("resolved_config") or {}).get("scheduler_config") or {}
    if "async_scheduling" in scheduler:
        return bool(scheduler["async_scheduling"])
    parts = str(meta.get("vllm_version", "0")).split(".")
    return tuple(int(part) if part.isdecimal() else 0 for part in parts[:2]) >= _ASYNCHRONOUS_SINCE
