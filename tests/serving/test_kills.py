"""The process is killed at random moments, again and again: no answer is lost, none is written twice.

FLEXIRL_TEST_KILLS: how often (5), on SQLite and, where it is installed, on PostgreSQL.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from serving_toys import EchoBackend, line, make_service

from flexirl.errors import UserError
from flexirl.serving.database import open_database
from flexirl.serving.store import OPEN, Line, Outcome, Store
from flexirl.serving.tables import metadata

KILLS = int(os.environ.get("FLEXIRL_TEST_KILLS", "5"))
LINES, BATCHES = 300, 3

WORKER = f"""
import asyncio, sys
sys.path[:0] = {[str(Path(__file__).parents[1])]!r}
from pathlib import Path
from flexirl.serving.batch_runner import BatchRunner
from flexirl.serving.metrics import Metrics
from flexirl.serving.store import Store
from serving_toys import EchoBackend

async def main():
    store = Store(Path(sys.argv[1]), sys.argv[2])
    await BatchRunner(store, EchoBackend(seconds=0.02), Metrics(), most=8).start()
    print("started", flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


@pytest.fixture(params=["SQLite", "PostgreSQL"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a database that may have tables but has nothing in them."""
    if request.param == "SQLite":
        return f"sqlite:///{tmp_path / 'a.sqlite'}"
    url: str = request.getfixturevalue("postgresql")
    database = open_database(url)
    with database.begin() as connection:
        for table in metadata.sorted_tables:
            connection.execute(table.delete())
    database.dispose()
    return url


def test_nothing_is_lost_and_nothing_comes_twice(tmp_path: Path, url: str) -> None:
    rng = random.Random(0)
    store = Store(tmp_path, url)
    with open(tmp_path / "in.jsonl", "w") as target:
        target.write("\n".join(line(f"r{i}", f"p{i}") for i in range(LINES)))
    kills = 0
    while kills < KILLS:
        batches = []
        for _ in range(BATCHES):
            with open(tmp_path / "in.jsonl", "rb") as source:
                file = store.add_file("t", "batch", "in.jsonl", source, None, 10**9)
            batches.append(store.add_batch("t", file["id"], "/v1/chat/completions", "24h", 86400, None, None)["id"])
        store.close()
        done = dict.fromkeys(batches, 0)
        while True:
            arguments = [sys.executable, "-c", WORKER, str(tmp_path), url]
            with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as worker:
                assert worker.stdout is not None
                # While it starts, too: then it may be sweeping, or half way through a migration.
                if rng.random() < 0.9:
                    assert worker.stdout.readline() == "started\n"
                    time.sleep(rng.uniform(0.0, 0.4))
                else:
                    time.sleep(rng.uniform(0.0, 0.8))
                worker.send_signal(signal.SIGKILL)
                kills += 1
            store = Store(tmp_path, url)
            rows = {batch_id: store.batch("t", batch_id) for batch_id in batches}
            for batch_id, row in rows.items():
                assert row["completed"] >= done[batch_id], "an answer that was kept is lost"
                done[batch_id] = row["completed"]
            if not any(row["status"] in OPEN for row in rows.values()):
                break
            store.close()
        for batch_id in batches:
            row = store.batch("t", batch_id)
            assert (row["status"], row["completed"], row["failed"]) == ("completed", LINES, 0)
            answers = [json.loads(each) for each in store.path(row["output_file_id"]).read_text().splitlines()]
            assert [each["custom_id"] for each in answers] == [f"r{i}" for i in range(LINES)]
            said = [each["response"]["body"]["choices"][0]["message"]["content"] for each in answers]
            assert said == [f"p{i}" for i in range(LINES)]
        assert sorted(path.name for path in (tmp_path / "files").iterdir()) == sorted(
            row["id"] for row in store.list_files("t", None, 1000, True, None)[0]
        )
        assert not list((tmp_path / "aside").iterdir())
        with store._database.connect() as connection:
            assert connection.scalar(sa.text("SELECT count(*) FROM lines")) == 0
    store.close()


def test_answers_of_one_line_count_once(tmp_path: Path, url: str) -> None:
    """A line that two runs have answered, one killed before it could say so: the first answer stays."""
    service = make_service(EchoBackend(), tmp_path, url=url)
    store = service.store
    (tmp_path / "in").write_text(line("a", "b"))
    with open(tmp_path / "in", "rb") as source:
        file = store.add_file("t", "batch", "in", source, None, 1000)
    batch_id = store.add_batch("t", file["id"], "/v1/chat/completions", "24h", 86400, None, None)["id"]
    store.add_lines(batch_id, [Line(1, 0, 10, "a")])
    assert store.begin(batch_id, 1, None)
    for text in ("first", "second"):
        store.record({batch_id: [Outcome(1, True, text, 5, 0, 7)]})
    row = store.batch("t", batch_id)
    assert (row["completed"], row["prompt_tokens"], row["output_tokens"]) == (1, 5, 7)
    store.finish(batch_id, "completed", lambda _: "never")
    assert store.path(store.batch("t", batch_id)["output_file_id"]).read_text() == "first\n"
    asyncio.run(service.backend.close())
    store.close()


def test_migrations_make_the_tables_that_the_code_has(url: str) -> None:
    database = open_database(url)
    with database.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    database.dispose()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(UserError, match="in use by another server"):
        Store(tmp_path)
    store.close()
    Store(tmp_path).close()
