"""The lines of a batch's output and error files, as OpenAI writes them."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from typing import Any

from flexirl.serving.errors import ApiError
from flexirl.serving.store import Line, Outcome

_WHY = {
    "expired": ("batch_expired", "This request could not be executed before the completion window expired."),
    "cancelled": ("batch_cancelled", "This request was not executed, since the batch was cancelled."),
}


def answered(line: Line, body: dict[str, Any]) -> Outcome:
    """The outcome of a line with an answer."""
    usage = body.get("usage") or {}
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Outcome(
        line.number, True, _line(line, _response(200, body), None), usage.get("prompt_tokens") or 0, cached,
        usage.get("completion_tokens") or 0,
    )  # fmt: skip


def refused(line: Line, error: ApiError) -> Outcome:
    """The outcome of a line that was refused, or has failed for good."""
    return Outcome(line.number, False, _line(line, _response(error.status, error.body), None))


def unanswered(ends_as: str) -> Callable[[Line], str]:
    """What is written for the lines that have no answer when a batch has expired or is cancelled."""
    code, message = _WHY.get(ends_as, ("batch_failed", "This request was not executed."))
    return lambda line: _line(line, None, {"code": code, "message": message})


def _response(status: int, body: dict[str, Any]) -> dict[str, Any]:
    return {"status_code": status, "request_id": f"req_{secrets.token_hex(12)}", "body": body}


def _line(line: Line, response: dict[str, Any] | None, error: dict[str, Any] | None) -> str:
    identity = f"batch_req_{secrets.token_hex(12)}"
    return json.dumps({"id": identity, "custom_id": line.custom_id, "response": response, "error": error})
