"""Progress where there is no terminal."""

from __future__ import annotations

import time

import pytest

from flexirl import progress


def test_short_work_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar(3, " runs") as bar:
        bar.update(3)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("leave", [True, False])
def test_long_work_is_told_by_lines(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, leave: bool
) -> None:
    monkeypatch.setattr(progress, "_LINES", progress._LINES | {"delay": 0.05, "mininterval": 0.05})
    with progress.progress_bar(1000, " runs", leave=leave) as bar:
        for _ in range(1000):
            time.sleep(0.0005)
            bar.update()
    lines = capfd.readouterr().err.splitlines()
    assert 3 <= len(lines) <= 30  # not a bar for every update
    counts = [int(line.split("/1000")[0].split()[-1]) for line in lines]
    assert counts == sorted(counts) and 0 < counts[-1] <= 1000
    assert all("/1000" in line and "\r" not in line for line in lines)


def test_silence_is_kept_when_asked_for(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LINES", progress._LINES | {"delay": 0.0, "mininterval": 0.0})
    with progress.progress_bar(3, " runs", shown=False) as bar:
        bar.update(3)
    assert capfd.readouterr().err == ""


def test_work_without_an_update_is_told_too(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LINES", progress._LINES | {"delay": 0.05, "mininterval": 0.05, "maxinterval": 0.05})
    with progress.progress_bar(2, " runs", desc="searching") as bar:
        time.sleep(0.5)
        bar.update()
    lines = capfd.readouterr().err.splitlines()
    assert 3 <= len(lines) <= 12 and all("searching" in line and "/2" in line for line in lines)
    time.sleep(0.2)
    assert capfd.readouterr().err == ""  # nothing is told of work that has ended
