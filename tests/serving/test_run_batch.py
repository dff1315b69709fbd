"""A batch without a server: what is answered once is not asked again, and no line holds up another."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path

import pytest
from programs import error, run
from serving_toys import EchoBackend, line

from flexirl.errors import UserError
from flexirl.run_batch import words
from flexirl.serving.run_batch import run_batch


def play(backend: EchoBackend, source: Path, target: Path, most: int = 4) -> Counter[str]:
    return asyncio.run(run_batch(backend, source, target, 3600.0, most, lambda _: None))


def test_every_line_is_answered_once_whatever_happens(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bad = ["{", "[1]", '{"custom_id": "half"}', line("r3", "again"), line("cold", "x", temperature=-1)]
    source.write_text("\n".join([*(line(f"r{i}", f"p{i}") for i in range(20)), "", *bad]) + "\n")
    backend = EchoBackend()
    assert play(backend, source, target) == {"answered": 20, "failed": 5}
    given = [json.loads(each) for each in target.read_text().splitlines()]
    status = {each["custom_id"]: each["response"]["status_code"] for each in given}
    good = {f"r{i}": 200 for i in range(20)}
    assert status == good | dict.fromkeys(("line 22", "line 23", "half", "line 25", "cold"), 400)
    assert max(backend.asked.values()) == 1

    whole = target.read_text().splitlines(keepends=True)
    target.write_text("".join(whole[:7]) + whole[7][:30])  # as if it had been killed while it wrote the eighth
    again = EchoBackend()
    counts = play(again, source, target)
    assert counts["skipped"] == 7 and sum(counts.values()) == 25
    assert sorted(json.loads(each)["custom_id"] for each in target.read_text().splitlines()) == sorted(
        each["custom_id"] for each in given
    )
    assert sum(again.asked.values()) + sum(1 for each in whole[:7] if '"status_code": 200' in each) == 20


def test_no_more_lines_than_allowed_are_with_the_backend(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(line(f"r{i}", f"p{i}") for i in range(50)))
    most_open = 0

    class Counting(EchoBackend):
        open = 0

        async def answer(self, *given):  # type: ignore[no-untyped-def]
            nonlocal most_open
            self.open += 1
            most_open = max(most_open, self.open)
            try:
                return await super().answer(*given)
            finally:
                self.open -= 1

    assert play(Counting(seconds=0.01), source, tmp_path / "out.jsonl", most=3)["answered"] == 50
    assert most_open == 3


def test_an_output_that_is_none_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(line("a", "b"))
    (tmp_path / "notes.txt").write_text("dear diary\n")
    with pytest.raises(UserError, match="no answer; choose another output"):
        play(EchoBackend(), tmp_path / "in.jsonl", tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "dear diary\n"


def test_the_command_line_names_files_shortly() -> None:
    assert words(["in.jsonl", "-o", "out.jsonl", "model=tiny"]) == ["input=in.jsonl", "output=out.jsonl", "model=tiny"]
    assert words(["model=tiny", "in.jsonl", "--output", "o"]) == ["input=in.jsonl", "output=o", "model=tiny"]
    assert words(["--help"]) == ["--help"]


def test_the_program_answers_on_the_tiny_model(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join(line(f"r{i}", f"p{i}", model="tiny", max_tokens=4) for i in range(9)))
    done = run(tmp_path, "run_batch", "in.jsonl", "-o", "out.jsonl", "hydra.run.dir=run", "progress=false")
    assert done.returncode == 0, done.stderr
    assert "9 answered; written to out.jsonl" in done.stdout
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 9
    done = run(tmp_path, "run_batch", "none.jsonl", "-o", "out.jsonl", "hydra.run.dir=run", "progress=false")
    assert error(done) == "error: none.jsonl does not exist."
