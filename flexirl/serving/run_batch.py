"""A batch without a server: lines of a file in, answers appended to another, as they come.

Interrupted, it goes on where it stopped: what the output names is not asked again. A line that cannot be read does not
hold up the others. Of the files no more is in memory than what is with the backend.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from flexirl.errors import UserError
from flexirl.serving import batch_input, batch_output
from flexirl.serving.backend import Backend
from flexirl.serving.batch_input import Names
from flexirl.serving.batch_line import answer_line
from flexirl.serving.bodies import read_json
from flexirl.serving.errors import ApiError
from flexirl.serving.store import Line


async def run_batch(
    backend: Backend, source: Path, target: Path, window_s: float, most: int, told: Callable[[str], object]
) -> Counter[str]:
    """Has each line of `source` answered that `target` has not; counts of answered, failed and skipped ones.

    window_s: seconds from now by which all are due; most: lines with the backend at once; told: called with how each
    line ended. Raises UserError for files that cannot be read or written.
    """
    counts: Counter[str] = Counter()
    try:
        done = _answered_already(target)
        file = open(target, "a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}); choose another output.") from None
    loop, running = asyncio.get_running_loop(), set[asyncio.Task[None]]()
    due_s = loop.time() + window_s
    with file:
        try:
            for line, fault in _lines(source, done):
                if line is None:
                    counts["skipped"] += 1
                    told("skipped")
                    continue
                while len(running) >= most:
                    _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                work = _answer(backend, source, line, fault, due_s, file, counts, told)
                running.add(loop.create_task(work))
            if running:
                await asyncio.wait(running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
    return counts


def _answered_already(target: Path) -> Names:
    """The custom_ids in an output; a last line that was cut off is taken out of it."""
    names = Names()
    if not target.exists():
        return names
    with open(target, "rb+") as file:
        whole = 0
        while data := file.readline():
            if not data.endswith(b"\n"):
                break
            whole += len(data)
            try:
                names.add(str(json.loads(data)["custom_id"]))
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{target} has a line that is no answer; choose another output.") from None
        file.truncate(whole)
    return names


def _lines(source: Path, done: Names) -> Iterator[tuple[Line | None, ApiError | None]]:
    """Lines that are to be answered, with what is wrong with them; None for one that is answered already."""
    names = Names()
    try:
        for number, offset, data in batch_input.raw_lines(source):
            fault = None
            try:
                name = batch_input.name_of(data, None)
                if not names.add(name):
                    fault = ApiError(400, f"custom_id {name!r} is there already; make each unique.", param="custom_id")
                    name = ""  # or the other would pass for answered
            except ApiError as error:
                name, fault = _name_if_any(data), error
            name = name or f"line {number}"
            known = name in done
            yield (None, None) if known else (Line(number, offset, len(data), name), fault)
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror}).") from None


def _name_if_any(data: bytes) -> str:
    try:
        fields = read_json(data)
        return str(fields["custom_id"])
    except (ApiError, KeyError, TypeError):
        return ""


async def _answer(
    backend: Backend,
    source: Path,
    line: Line,
    fault: ApiError | None,
    due_s: float,
    file: IO[str],
    counts: Counter[str],
    told: Callable[[str], object],
) -> None:
    loop = asyncio.get_running_loop()
    if fault is None:
        outcome = await answer_line(backend, source, line, lambda: due_s - loop.time())
    else:
        outcome = batch_output.refused(line, fault)
    file.write(outcome.answer + "\n")
    file.flush()
    counts["answered" if outcome.answered else "failed"] += 1
    told("answered" if outcome.answered else "failed")
