"""The requests of a recorded run: `requests.jsonl`, one JSON object a line, without those that were aborted.

An aborted request has no times (null, or 0 beside no output tokens, as vLLM writes them) and so nothing to compare. It
is left out and its line is named, as long as such requests are few: they did take part in the run.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from flexirl.errors import UserError

log = logging.getLogger(__name__)

ABORTED_LIMIT = 0.05  # of all requests
NAMED = 10  # lines that a sentence names

Line = tuple[int, dict[str, Any]]  # number, from 1, and object


def read_requests(folder: Path) -> list[Line]:
    """The served requests of a run folder; raises UserError, naming the line, for what is no request."""
    path = folder / "requests.jsonl"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; a run folder needs the requests it served.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text ({error}).") from None
    served: list[Line] = []
    aborted: list[int] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            request = json.loads(line)
        except ValueError:
            request = None
        if not isinstance(request, dict):
            raise UserError(f"{path} needs one JSON object a line; line {number} is none.")
        if _is_aborted(request):
            aborted.append(number)
        else:
            served.append((number, request))
    if not served:
        raise UserError(f"{path} needs at least one request that was served.")
    if aborted:
        count, share = len(aborted), len(aborted) / (len(aborted) + len(served))
        lines = ", ".join(map(str, aborted[:NAMED])) + (", ..." if count > NAMED else "")
        said = f"{path}: {count} requests ({share:.1%}) were aborted (line {lines})"
        if share > ABORTED_LIMIT:
            raise UserError(f"{said}; a run is compared if at most {ABORTED_LIMIT:.0%} were.")
        log.warning("%s and are left out", said)
    return served


def _is_aborted(request: dict[str, Any]) -> bool:
    times = [request[name] for name in ("first_token_ts", "last_token_ts") if name in request]
    return None in times or (request.get("output_toks") in (0, None) and 0 in times)
