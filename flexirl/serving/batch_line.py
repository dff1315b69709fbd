"""One line of a batch, from its request to its outcome: asked again where the fault is the service's and may pass."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from flexirl.serving import batch_input, batch_output
from flexirl.serving.backend import Backend, Terms
from flexirl.serving.errors import ApiError
from flexirl.serving.store import Line, Outcome
from flexirl.workloads.trace import DEFERRED

_LOG = logging.getLogger(__name__)
_TRIES = 3  # of a line that the service fails to answer; while it has no room, there is no end of them
_PAUSE_S = 1.0  # before the next try, where nothing else is said
_OF_STREAMS = ("stream", "stream_options")  # what they ask for a file cannot hold


async def answer_line(
    backend: Backend, source: Path, line: Line, left_s: Callable[[], float], tenant: str = "default"
) -> Outcome:
    """What became of a line of `source` that has been checked; left_s: seconds until it is due, at each try.

    Cancelled, the request is withdrawn. Raises nothing else: an answer that nobody foresaw must not hold up a batch.
    """
    tries = 0
    while True:
        try:
            url, body = await asyncio.to_thread(batch_input.read, source, line)
            fields = {name: value for name, value in body.items() if name not in _OF_STREAMS}
            terms = Terms(DEFERRED, window_s=max(left_s(), 1.0), tenant=tenant, tier="flex")
            return batch_output.answered(line, await backend.answer(url, fields, terms))
        except ApiError as error:
            tries += error.status != 429
            if not error.passes or tries >= _TRIES:
                return batch_output.refused(line, error)
            pause_s = error.retry_after_s or _PAUSE_S
        except Exception as error:
            _LOG.exception("line %d of %s has failed", line.number, source)
            return batch_output.refused(line, ApiError(500, f"The request failed ({error}).", code="server_error"))
        await asyncio.sleep(pause_s)
