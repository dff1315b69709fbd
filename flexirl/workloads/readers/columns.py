"""Which column of a log is what, by the names that services give them."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from flexirl.errors import UserError

log = logging.getLogger(__name__)

# By what is read: the names it goes by, likeliest first, compared without case and signs.
NAMES: dict[str, tuple[str, ...]] = {
    "arrival": (
        "arrival_s", "arrival_time", "arrival", "arrived_at", "received_at", "request_time", "start_time", "started_at",
        "timestamp", "timestamp_ms", "ts", "time", "datetime", "date", "created", "created_at", "arrival_ms",
    ),
    "prompt_tokens": (
        "prompt_tokens", "input_tokens", "num_prompt_tokens", "num_input_tokens", "prompt_length", "input_length",
        "prompt_len", "input_len", "input_toks", "tokens_in", "context_tokens",
    ),
    "output_tokens": (
        "output_tokens", "completion_tokens", "generated_tokens", "num_output_tokens", "num_generated_tokens",
        "output_length", "output_len", "completion_length", "generation_tokens", "output_toks", "tokens_out",
        "response_tokens",
    ),
    "max_tokens": ("max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens"),
    "class": ("class", "request_class", "service_tier", "deferred", "is_deferred", "batch", "is_batch"),
    "window": ("window_s", "completion_window", "window"),
    "tenant": (
        "tenant", "tenant_id", "client_id", "client", "customer", "customer_id", "user", "user_id", "api_key",
        "organization", "organization_id", "project", "project_id",
    ),
    "num_images": ("num_images", "images"),
    "image_tokens": ("image_tokens",),
    "cached_tokens": ("prefix_hit_tokens", "cached_tokens", "cached_prompt_tokens", "prefix_tokens"),
    "hash_ids": ("hash_ids", "block_hashes"),
    "session": ("session_id", "session", "conversation_id"),
    "prob": ("prob",),
}  # fmt: skip
NEEDED = ("prompt_tokens", "output_tokens")


def columns_of(path: Path, names: Sequence[str], asked: Mapping[str, str] | None = None) -> dict[str, str]:
    """The column of each thing in `NAMES` that is there. asked: those that are known, by the same keys.

    Raises UserError for a name that stands twice, or is asked for and not there, and where lengths are missing.
    """
    found: dict[str, str] = {}
    for what, name in (asked or {}).items():
        if what not in NAMES:
            raise UserError(f"columns names {what!r}; choose from {', '.join(NAMES)}.")
        if name not in names:
            raise UserError(f"{path} has no column {name!r} for {what}; its columns are {_shown(names)}.")
        found[what] = name
    plain = [_plain(name) for name in names]
    for what, known in NAMES.items():
        there = [names[plain.index(_plain(name))] for name in known if _plain(name) in plain]
        if what not in found and there:
            found[what] = there[0]
            if len(there) > 1:
                log.warning("%s: %s is read from column %s, not from %s", path, what, there[0], ", ".join(there[1:]))
    for what, name in found.items():
        if names.count(name) > 1:
            raise UserError(
                f"{path} has {names.count(name)} columns {name!r}; name them apart, {what} is read from one."
            )
    for what in NEEDED:
        if what not in found:
            raise UserError(
                f"{path} has no column that is known as {what}; its columns are {_shown(names)}. Name it, as in "
                f"workload.columns='{{{what}: NAME}}'."
            )
    return found


def is_log(names: Sequence[str]) -> bool:
    """True if the lengths of requests are there by some known name."""
    plain = {_plain(name) for name in names}
    return all(any(_plain(name) in plain for name in NAMES[what]) for what in NEEDED)


def _plain(name: str) -> str:
    """Without case and signs; of a nested field, the last part."""
    return re.sub(r"[^a-z0-9]", "", name.split(".")[-1].lower())


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names)[:200]
