"""Files and batches as OpenAI's interface shows them, from the rows of the store."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_TIMES = (
    "created_at", "in_progress_at", "expires_at", "finalizing_at", "completed_at", "failed_at", "expired_at",
    "cancelling_at", "cancelled_at",
)  # fmt: skip


def file_object(row: Mapping[Any, Any]) -> dict[str, Any]:
    """A file."""
    return {
        "id": row["id"], "object": "file", "bytes": row["bytes"], "created_at": row["created_at"],
        "expires_at": row["expires_at"], "filename": row["filename"], "purpose": row["purpose"],
        "status": "processed", "status_details": None,
    }  # fmt: skip


def batch_object(row: Mapping[Any, Any]) -> dict[str, Any]:
    """A batch; `warning` is ours: why it may not be done in time."""
    errors = None if row["errors"] is None else {"object": "list", "data": json.loads(row["errors"])}
    return {
        "id": row["id"], "object": "batch", "endpoint": row["endpoint"], "errors": errors,
        "input_file_id": row["input_file_id"], "completion_window": row["completion_window"],
        "status": row["status"], "output_file_id": row["output_file_id"], "error_file_id": row["error_file_id"],
        **{name: row[name] for name in _TIMES},
        "request_counts": {"total": row["total"], "completed": row["completed"], "failed": row["failed"]},
        "usage": {
            "input_tokens": row["prompt_tokens"], "input_tokens_details": {"cached_tokens": row["cached_tokens"]},
            "output_tokens": row["output_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": row["prompt_tokens"] + row["output_tokens"],
        },
        "metadata": None if row["metadata"] is None else json.loads(row["metadata"]),
        "warning": row["warning"],
    }  # fmt: skip


def page(rows: Sequence[Mapping[Any, Any]], more: bool, show: Callable[[Mapping[Any, Any]], dict[str, Any]]) -> Any:
    """A page of a list."""
    return {
        "object": "list", "data": [show(row) for row in rows], "has_more": more,
        "first_id": rows[0]["id"] if rows else None, "last_id": rows[-1]["id"] if rows else None,
    }  # fmt: skip
