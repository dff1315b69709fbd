"""Takes batches from one state to the next: checks their input, has their lines answered, writes their files.

What state a batch is in is in the store alone, so that whoever starts with the same store goes on where another
stopped. Of each batch in progress a few lines at a time are with the backend, as deferred requests that know the
batch's deadline: which of them run when is for the policy of the engine to say.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from flexirl.serving import batch_input, batch_output
from flexirl.serving.backend import Backend
from flexirl.serving.batch_input import BadInput
from flexirl.serving.batch_line import answer_line
from flexirl.serving.metrics import Metrics
from flexirl.serving.store import Line, Outcome, Row, Store

_LOG = logging.getLogger(__name__)
_PAUSE_S = 1.0  # before outcomes that could not be kept are written again
_LOOK_S = 0.5  # between two looks at what falls due
_EXPIRE_FILES_S = 60.0
_PAGE = 256  # lines read from the store at once
_PACE_S = 60.0  # over which lines a second are averaged


@dataclass
class _Course:
    """A batch in progress. waiting: its next lines; behind: the last one read from the store; running: with the
    backend; unwritten: outcomes that are not in the store yet; all_read: no line is left in the store."""

    row: Row
    waiting: deque[Line] = field(default_factory=deque)
    behind: int = 0
    all_read: bool = False
    running: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    unwritten: int = 0
    ends_as: str | None = None  # once no further line is to be answered

    @property
    def over(self) -> bool:
        """True if nothing is left to do but to write its files."""
        if self.running or self.unwritten:
            return False
        return self.ends_as is not None or (self.all_read and not self.waiting)


class BatchRunner:
    """most: lines of all batches that are with the backend at once; refuse_late: batches that will not be done in
    their window are refused, rather than warned of. `start` and `close` are for the event loop, as `wake`, which says
    that something in the store has changed."""

    def __init__(self, store: Store, backend: Backend, metrics: Metrics, most: int, refuse_late: bool = False) -> None:
        self._store, self._backend, self._metrics = store, backend, metrics
        self._most, self._refuse_late = most, refuse_late
        self._courses: dict[str, _Course] = {}
        self._busy: set[str] = set()  # batches that are checked or finished just now
        self._outcomes: dict[str, list[Outcome]] = {}
        self._ended: deque[float] = deque(maxlen=100_000)  # when lines ended
        self._awake, self._to_write = asyncio.Event(), asyncio.Event()
        self._changed = True  # something in the store has, or may have
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    async def start(self) -> None:
        """Goes on with what is in the store."""
        for work in (self._run(), self._write(), self._tidy()):
            self._spawn(work)

    async def close(self) -> None:
        """Stops; lines that are with the backend are withdrawn, and come again with the next start."""
        self._closing = True
        for course in self._courses.values():
            for task in course.running.values():
                task.cancel()
        self._to_write.set()
        self.wake()
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._flush()

    def wake(self) -> None:
        """Something has changed: a new batch, one to be cancelled."""
        self._changed = True
        self._awake.set()

    def running(self, batch_id: str) -> int:
        """Lines of a batch that are with the backend now."""
        course = self._courses.get(batch_id)
        return 0 if course is None else len(course.running)

    @property
    def lines_per_s(self) -> float | None:
        """Lines answered a second of late, None if there were too few to say."""
        now_s = time.monotonic()
        while self._ended and self._ended[0] < now_s - _PACE_S:
            self._ended.popleft()
        if len(self._ended) < 10 or now_s <= self._ended[0]:
            return None
        return len(self._ended) / (now_s - self._ended[0])

    # ------------------------------------------------------------------------------------------------ the main loop

    async def _run(self) -> None:
        looked_s = 0.0
        while not self._closing:
            self._awake.clear()
            try:
                if self._changed or time.monotonic() > looked_s + _LOOK_S:
                    self._changed, looked_s = False, time.monotonic()
                    for row in await asyncio.to_thread(self._store.open_batches):
                        self._look_at(row)
                await self._fill()
            except Exception:  # of the store: it may be back the next time
                _LOG.exception("batches cannot be looked at; another try follows")
            try:
                await asyncio.wait_for(self._awake.wait(), _LOOK_S)
            except TimeoutError:
                pass

    def _look_at(self, row: Row) -> None:
        """Does the next thing there is to do for a batch."""
        batch_id, status = row["id"], row["status"]
        if batch_id in self._busy:
            return
        if status == "validating":
            self._spawn(self._check(row))
        elif status == "finalizing":
            self._spawn(self._finish(row, row["ends_as"]))
        else:
            course = self._courses.setdefault(batch_id, _Course(row))
            course.row = row
            if status == "cancelling":
                self._end(course, "cancelled")
            elif row["expires_at"] <= self._store.now():
                self._end(course, "expired")
            if course.over:
                self._spawn(self._finish(row, course.ends_as or "completed"))

    def _end(self, course: _Course, ends_as: str) -> None:
        """No further line of a batch is answered."""
        if course.ends_as is None:
            course.ends_as = ends_as
            for task in course.running.values():
                task.cancel()

    async def _check(self, row: Row) -> None:
        """Reads a batch's input, from `validating` to `in_progress` or `failed`."""
        store, batch_id = self._store, row["id"]
        self._busy.add(batch_id)
        try:
            lines = batch_input.check(store.path(row["input_file_id"]), row["endpoint"])
            total = await asyncio.to_thread(store.add_lines, batch_id, lines)
            warning = self._late(row, total)
            if warning is not None and self._refuse_late:
                raise BadInput([{"code": "window_too_short", "line": None, "message": warning,
                                 "param": "completion_window"}])  # fmt: skip
            await asyncio.to_thread(store.begin, batch_id, total, warning)
        except BadInput as bad:
            await asyncio.to_thread(store.fail, batch_id, bad.errors)
        except OSError as error:
            trouble = {"code": "unreadable_file", "line": None, "message": f"The file cannot be read ({error}).",
                       "param": "input_file_id"}  # fmt: skip
            await asyncio.to_thread(store.fail, batch_id, [trouble])
        finally:
            self._busy.discard(batch_id)
            self.wake()

    def _late(self, row: Row, total: int) -> str | None:
        """A sentence if the batch will not be done in its window, as far as one can know."""
        pace = self.lines_per_s
        if pace is None:
            return None
        before = sum(
            course.row["total"] - course.row["completed"] - course.row["failed"] for course in self._courses.values()
        )
        takes_s, has_s = (before + total) / pace, self._left_s(row)
        if takes_s <= has_s:
            return None
        return (
            f"At the {pace:.3g} requests a second of late, these {total:,} and the {before:,} before them take "
            f"{takes_s:,.0f} s, and the window ends in {has_s:,.0f} s."
        )

    async def _finish(self, row: Row, ends_as: str) -> None:
        """Writes a batch's files; from then on it is over."""
        batch_id = row["id"]
        self._busy.add(batch_id)
        try:
            await asyncio.to_thread(self._store.finish, batch_id, ends_as, batch_output.unanswered(ends_as))
            self._courses.pop(batch_id, None)
        finally:
            self._busy.discard(batch_id)
            self.wake()

    # ---------------------------------------------------------------------------------------------------- its lines

    async def _fill(self) -> None:
        """Gives the backend lines up to `most`, as many of each batch; what is due first comes first."""
        courses = [course for course in self._courses.values() if course.ends_as is None]
        free = self._most - sum(len(course.running) for course in self._courses.values())
        while free > 0 and courses:
            course = min(courses, key=lambda each: (len(each.running), each.row["expires_at"]))
            if not course.waiting and not course.all_read:
                batch_id, store = course.row["id"], self._store
                page = await asyncio.to_thread(store.waiting_lines, batch_id, course.behind, _PAGE)
                course.waiting.extend(page)
                course.behind = page[-1].number if page else course.behind
                course.all_read = len(page) < _PAGE
            if not course.waiting or course.ends_as is not None:
                courses.remove(course)
                if course.over:
                    self.wake()
                continue
            line = course.waiting.popleft()
            task = course.running[line.number] = self._spawn(self._answer(course, line))
            # Not in the task itself, which never begins if it is cancelled before.
            task.add_done_callback(partial(self._came_back, course, line.number))
            free -= 1

    def _came_back(self, course: _Course, number: int, _: asyncio.Task[None]) -> None:
        del course.running[number]
        if course.over:
            self.wake()
        self._awake.set()

    async def _answer(self, course: _Course, line: Line) -> None:
        """Has one line answered, and its outcome kept by and by."""
        row = course.row
        path = self._store.path(row["input_file_id"])
        left_s = partial(self._left_s, row)
        outcome = await answer_line(self._backend, path, line, left_s, row["tenant"])
        course.unwritten += 1
        self._outcomes.setdefault(row["id"], []).append(outcome)
        self._ended.append(time.monotonic())
        self._to_write.set()

    def _left_s(self, row: Row) -> float:
        return float(row["expires_at"] - self._store.now())

    async def _write(self) -> None:
        """Keeps outcomes, as many at a time as have come while the last ones were written."""
        while not self._closing:
            await self._to_write.wait()
            self._to_write.clear()
            await self._flush()

    async def _flush(self) -> None:
        outcomes, self._outcomes = self._outcomes, {}
        if not outcomes:
            return
        try:
            await asyncio.shield(asyncio.to_thread(self._store.record, outcomes))
        except Exception:  # of the store; they are kept for another try
            _LOG.exception("outcomes cannot be kept; another try follows")
            for batch_id, given in outcomes.items():
                self._outcomes.setdefault(batch_id, []).extend(given)
            await asyncio.sleep(_PAUSE_S)
            self._to_write.set()
            return
        for batch_id, given in outcomes.items():
            self._courses[batch_id].unwritten -= len(given)
            answered = sum(outcome.answered for outcome in given)
            self._metrics.line_ended("answered", answered)
            self._metrics.line_ended("failed", len(given) - answered)
            if self._courses[batch_id].over:
                self.wake()

    async def _tidy(self) -> None:
        while not self._closing:
            await asyncio.to_thread(self._store.expire_files)
            await asyncio.sleep(_EXPIRE_FILES_S)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _LOG.error("work on batches has failed", exc_info=task.exception())
