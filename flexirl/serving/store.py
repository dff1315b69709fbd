"""Files, batches and their lines, kept where nothing is lost whenever the process dies.

A database has everything but the contents of files, which are in a folder. Contents are written aside and renamed
before their row appears; a row goes before its contents do; what has contents and no row is swept at the start. One
process at a time: a lock on the folder sees to it. Methods are for any thread, and may wait for the disk.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from flexirl.errors import UserError
from flexirl.serving.database import open_database
from flexirl.serving.errors import ApiError, not_found
from flexirl.serving.tables import DONE, FAILED, WAITING, batches, files, lines

OPEN = ("validating", "in_progress", "finalizing", "cancelling")
_OF_LINES = 1000  # written in one statement

Row = Mapping[Any, Any]


class Line(NamedTuple):
    """A line of an input file: its number from 1, where it stands in bytes, and the client's name for it."""

    number: int
    offset: int
    length: int
    custom_id: str


@dataclass(frozen=True)
class Outcome:
    """What became of a line: the line of the output or error file, and the tokens it took."""

    number: int
    answered: bool
    answer: str
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


class Store:
    """folder: where contents are, made if it is not there; url: of the database, None one in the folder.

    clock: seconds since 1970. Raises UserError if folder or database cannot be used, or another process uses them.
    """

    def __init__(self, folder: Path, url: str | None = None, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._contents, self._aside = folder / "files", folder / "aside"
        try:
            for each in (self._contents, self._aside):
                each.mkdir(parents=True, exist_ok=True)
            self._lock_file = open(folder / "lock", "w")
        except OSError as error:
            raise UserError(f"data_dir={folder} cannot be used ({error.strerror}); choose another place.") from None
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock_file.close()
            raise UserError(f"data_dir={folder} is in use by another server; stop it, or choose another.") from None
        self._database = open_database(url or f"sqlite:///{folder.absolute() / 'flexirl.sqlite'}")
        self._writing = threading.Lock()
        self._number = time.time_ns()  # of what is made next: rises from process to process
        self._sweep()

    def close(self) -> None:
        """Lets folder and database go, once what is being written is."""
        with self._writing:
            self._database.dispose()
            self._lock_file.close()

    def now(self) -> int:
        """Seconds since 1970."""
        return int(self._clock())

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with self._writing, self._database.begin() as connection:
            yield connection

    def _next_number(self) -> int:
        with self._writing:
            self._number = max(self._number + 1, time.time_ns())
            return self._number

    def _sweep(self) -> None:
        """Removes what a process that died left half done."""
        for path in self._aside.iterdir():
            path.unlink()
        with self._database.connect() as connection:
            known = set(connection.scalars(sa.select(files.c.id)))
            # Of a batch whose files were written and not yet entered, they are written again.
        for path in self._contents.iterdir():
            if path.name not in known:
                path.unlink()

    # ---------------------------------------------------------------------------------------------------- files

    def add_file(
        self, tenant: str, purpose: str, filename: str, source: IO[bytes], expires_s: int | None, most: int
    ) -> Row:
        """Keeps what can be read from `source`; raises ApiError above `most` bytes."""
        file_id, size = _new_id("file"), 0
        aside = self._aside / file_id
        try:
            with open(aside, "wb") as target:
                while chunk := source.read(1 << 20):
                    size += len(chunk)
                    if size > most:
                        raise ApiError(413, f"The file has more than {most:,} bytes; split it.", param="file")
                    target.write(chunk)
                _to_disk(target)
            os.rename(aside, self._contents / file_id)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        row = self._file_row(file_id, tenant, purpose, filename, size, expires_s)
        with self._write() as connection:
            connection.execute(files.insert(), row)
        return row

    def _file_row(
        self, file_id: str, tenant: str, purpose: str, filename: str, size: int, expires_s: int | None
    ) -> dict[str, Any]:
        now = self.now()
        return {
            "id": file_id, "number": self._next_number(), "tenant": tenant, "purpose": purpose, "filename": filename,
            "bytes": size, "created_at": now, "expires_at": None if expires_s is None else now + expires_s,
        }  # fmt: skip

    def file(self, tenant: str, file_id: str) -> Row:
        """One file; raises ApiError if the tenant has no such file."""
        return self._one(files, tenant, file_id, "file")

    def path(self, file_id: str) -> Path:
        """Where its contents are."""
        return self._contents / file_id

    def list_files(
        self, tenant: str, after: str | None, limit: int, newest_first: bool, purpose: str | None
    ) -> tuple[list[Row], bool]:
        """A page of files, and whether there are more."""
        query = sa.select(files).where(files.c.tenant == tenant)
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        return self._page(files, query, tenant, after, limit, newest_first, "file")

    def delete_file(self, tenant: str, file_id: str) -> None:
        """Forgets a file; raises ApiError if there is none, or a batch needs it."""
        self.file(tenant, file_id)
        with self._write() as connection:
            self._delete(connection, files.c.tenant == tenant, file_id)
        self.path(file_id).unlink(missing_ok=True)

    def _delete(self, connection: Connection, condition: Any, file_id: str) -> None:
        needed = sa.select(batches.c.id).where(batches.c.input_file_id == file_id, batches.c.status.in_(OPEN))
        batch_id = connection.scalar(needed.limit(1))
        if batch_id is not None:
            raise ApiError(409, f"{file_id} is the input of {batch_id}, which is not over; cancel that first.")
        if connection.execute(files.delete().where(files.c.id == file_id, condition)).rowcount == 0:
            raise not_found("file", file_id)

    def expire_files(self) -> None:
        """Forgets files whose time is over, but for those that a batch needs."""
        over = sa.select(files.c.id).where(files.c.expires_at <= self.now())
        with self._database.connect() as connection:
            expired = connection.scalars(over).all()
        for file_id in expired:
            with suppress(ApiError):
                with self._write() as connection:
                    self._delete(connection, sa.true(), file_id)
                self.path(file_id).unlink(missing_ok=True)

    # -------------------------------------------------------------------------------------------------- batches

    def add_batch(
        self,
        tenant: str,
        input_file_id: str,
        endpoint: str,
        completion_window: str,
        window_s: int,
        metadata: dict[str, str] | None,
        output_expires_s: int | None,
    ) -> Row:
        """A new batch, to be validated; raises ApiError if the tenant has no such file, or it is not for batches."""
        self.file(tenant, input_file_id)
        now = self.now()
        row: dict[str, Any] = {column.name: None for column in batches.columns} | {
            "id": _new_id("batch"), "number": self._next_number(), "tenant": tenant, "status": "validating",
            "endpoint": endpoint, "input_file_id": input_file_id, "completion_window": completion_window,
            "metadata": None if metadata is None else json.dumps(metadata), "output_expires_s": output_expires_s,
            "created_at": now, "expires_at": now + window_s, "total": 0, "completed": 0, "failed": 0,
            "prompt_tokens": 0, "cached_tokens": 0, "output_tokens": 0,
        }  # fmt: skip
        with self._write() as connection:
            file = connection.execute(
                sa.select(files).where(files.c.id == input_file_id, files.c.tenant == tenant)
            ).first()
            if file is None:
                raise not_found("file", input_file_id)
            if file.purpose != "batch":
                raise ApiError(
                    400, f"{input_file_id} was uploaded for {file.purpose!r}; upload it with purpose 'batch'.",
                    param="input_file_id",
                )  # fmt: skip
            connection.execute(batches.insert(), row)
        return row

    def batch(self, tenant: str, batch_id: str) -> Row:
        """One batch; raises ApiError if the tenant has no such batch."""
        return self._one(batches, tenant, batch_id, "batch")

    def list_batches(self, tenant: str, after: str | None, limit: int) -> tuple[list[Row], bool]:
        """A page of batches, the newest first, and whether there are more."""
        query = sa.select(batches).where(batches.c.tenant == tenant)
        return self._page(batches, query, tenant, after, limit, True, "batch")

    def open_batches(self) -> list[Row]:
        """Those of all tenants that are not over, the oldest first."""
        query = sa.select(batches).where(batches.c.status.in_(OPEN)).order_by(batches.c.number)
        with self._database.connect() as connection:
            return list(connection.execute(query).mappings())

    def ask_to_cancel(self, tenant: str, batch_id: str) -> Row:
        """Marks a batch as cancelling, if it is not over; raises ApiError if it is."""
        self.batch(tenant, batch_id)
        with self._write() as connection:
            changed = connection.execute(
                batches.update()
                .where(batches.c.id == batch_id, batches.c.tenant == tenant)
                .where(batches.c.status.in_(("validating", "in_progress")))
                .values(status="cancelling", cancelling_at=self.now())
            ).rowcount
        row = self.batch(tenant, batch_id)
        if not changed and row["status"] != "cancelling":
            raise ApiError(409, f"{batch_id} is {row['status']} and cannot be cancelled.", param="batch_id")
        return row

    # ------------------------------------------------------------------------------------ the course of a batch

    def add_lines(self, batch_id: str, given: Iterable[Line]) -> int:
        """Enters the lines of a batch, in place of any that were there; how many."""
        count, chunk = 0, list[dict[str, Any]]()
        with self._write() as connection:
            connection.execute(lines.delete().where(lines.c.batch_id == batch_id))
            for line in given:
                chunk.append({"batch_id": batch_id, "state": WAITING, "answer": None, **line._asdict()})
                count += 1
                if len(chunk) == _OF_LINES:
                    connection.execute(lines.insert(), chunk)
                    chunk.clear()
            if chunk:
                connection.execute(lines.insert(), chunk)
        return count

    def begin(self, batch_id: str, total: int, warning: str | None) -> bool:
        """A batch is valid and in progress from now on; False if it has been cancelled meanwhile."""
        return self._change(
            batch_id, "validating", status="in_progress", in_progress_at=self.now(), total=total, warning=warning
        )

    def fail(self, batch_id: str, errors: Sequence[dict[str, Any]]) -> None:
        """A batch is not valid; errors: as OpenAI lists them."""
        with self._write() as connection:
            connection.execute(lines.delete().where(lines.c.batch_id == batch_id))
        self._change(batch_id, "validating", status="failed", failed_at=self.now(), errors=json.dumps(list(errors)))

    def _change(self, batch_id: str, before: str, **values: Any) -> bool:
        with self._write() as connection:
            of_batch = batches.update().where(batches.c.id == batch_id, batches.c.status == before)
            return connection.execute(of_batch.values(**values)).rowcount > 0

    def waiting_lines(self, batch_id: str, behind: int, most: int) -> list[Line]:
        """The next lines without an answer, behind the one of this number."""
        query = (
            sa.select(lines.c.number, lines.c.offset, lines.c.length, lines.c.custom_id)
            .where(lines.c.batch_id == batch_id, lines.c.state == WAITING, lines.c.number > behind)
            .order_by(lines.c.number)
            .limit(most)
        )
        with self._database.connect() as connection:
            return [Line(*row) for row in connection.execute(query)]

    def record(self, outcomes: Mapping[str, Sequence[Outcome]]) -> None:
        """Keeps outcomes of lines, by batch, all or none; one that a line has already stays."""
        with self._write() as connection:
            for batch_id, given in outcomes.items():
                new = [outcome for outcome in given if self._enter(connection, batch_id, outcome)]
                answered = sum(outcome.answered for outcome in new)
                connection.execute(
                    batches.update()
                    .where(batches.c.id == batch_id)
                    .values(
                        completed=batches.c.completed + answered,
                        failed=batches.c.failed + len(new) - answered,
                        prompt_tokens=batches.c.prompt_tokens + sum(outcome.prompt_tokens for outcome in new),
                        cached_tokens=batches.c.cached_tokens + sum(outcome.cached_tokens for outcome in new),
                        output_tokens=batches.c.output_tokens + sum(outcome.output_tokens for outcome in new),
                    )
                )

    @staticmethod
    def _enter(connection: Connection, batch_id: str, outcome: Outcome) -> bool:
        line = (lines.c.batch_id == batch_id) & (lines.c.number == outcome.number) & (lines.c.state == WAITING)
        state = DONE if outcome.answered else FAILED
        return connection.execute(lines.update().where(line).values(state=state, answer=outcome.answer)).rowcount > 0

    def finish(self, batch_id: str, ends_as: str, unanswered: Callable[[Line], str]) -> None:
        """Writes the files of a batch and ends it as completed, expired or cancelled.

        unanswered: the line of the error file for one that has no answer. Begun once, it goes on as it was begun.
        """
        with self._write() as connection:
            connection.execute(
                batches.update()
                .where(batches.c.id == batch_id, batches.c.status.in_(("in_progress", "cancelling", "validating")))
                .values(status="finalizing", finalizing_at=self.now(), ends_as=ends_as)
            )
            query = sa.select(batches).where(batches.c.id == batch_id)
            batch = connection.execute(query).mappings().one()
        output, failed = _new_id("file"), _new_id("file")
        sizes = self._write_answers(batch_id, output, failed, unanswered)
        values: dict[str, Any] = {"status": batch["ends_as"], f"{batch['ends_as']}_at": self.now()}
        rows = []
        for name, file_id, label in (("output_file_id", output, "output"), ("error_file_id", failed, "error")):
            if sizes[file_id] > 0:
                filename = f"{batch_id}_{label}.jsonl"
                expires_s = batch["output_expires_s"]
                size = sizes[file_id]
                rows.append(self._file_row(file_id, batch["tenant"], "batch_output", filename, size, expires_s))
                values[name] = file_id
        with self._write() as connection:
            if rows:
                connection.execute(files.insert(), rows)
            connection.execute(batches.update().where(batches.c.id == batch_id).values(**values))
            connection.execute(lines.delete().where(lines.c.batch_id == batch_id))

    def _write_answers(
        self, batch_id: str, output: str, failed: str, unanswered: Callable[[Line], str]
    ) -> dict[str, int]:
        """Writes both files in the order of the lines, empty ones not; their sizes in bytes."""
        targets = {file_id: open(self._aside / file_id, "wb") for file_id in (output, failed)}
        try:
            query = sa.select(lines).where(lines.c.batch_id == batch_id).order_by(lines.c.number)
            with self._database.connect() as connection:
                rows = connection.execution_options(yield_per=_OF_LINES).execute(query)
                for row in rows:
                    line = Line(row.number, row.offset, row.length, row.custom_id)
                    answer = unanswered(line) if row.state == WAITING else row.answer
                    targets[output if row.state == DONE else failed].write(answer.encode() + b"\n")
            sizes = {}
            for file_id, target in targets.items():
                sizes[file_id] = target.tell()
                _to_disk(target)
        finally:
            for target in targets.values():
                target.close()
        for file_id, size in sizes.items():
            if size > 0:
                os.rename(self._aside / file_id, self._contents / file_id)
            else:
                (self._aside / file_id).unlink()
        return sizes

    # ------------------------------------------------------------------------------------------------- both kinds

    def _one(self, table: sa.Table, tenant: str, row_id: str, what: str) -> Row:
        row = None
        if "\x00" not in row_id:  # which PostgreSQL does not take
            query = sa.select(table).where(table.c.id == row_id, table.c.tenant == tenant)
            with self._database.connect() as connection:
                row = connection.execute(query).mappings().first()
        if row is None:
            raise not_found(what, row_id)
        return row

    def _page(
        self, table: sa.Table, query: Any, tenant: str, after: str | None, limit: int, newest_first: bool, what: str
    ) -> tuple[list[Row], bool]:
        if after is not None:
            number = self._one(table, tenant, after, what)["number"]
            query = query.where(table.c.number < number if newest_first else table.c.number > number)
        order = table.c.number.desc() if newest_first else table.c.number
        with self._database.connect() as connection:
            rows: list[Row] = list(connection.execute(query.order_by(order).limit(limit + 1)).mappings())
        return rows[:limit], len(rows) > limit


def _new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(16)}" if kind == "batch" else f"{kind}-{secrets.token_hex(16)}"


def _to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
