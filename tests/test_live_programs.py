"""calibrate and evaluate on the live engine, run as their users run them, on the tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from programs import error, run

from flexirl.runtime.engine import load_profile


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The profile of a short calibration."""
    folder = tmp_path_factory.mktemp("calibrate")
    done = run(folder, "calibrate", "hydra.run.dir=.", "seconds=3", "progress=false")
    assert done.returncode == 0, done.stderr
    assert "held out" in done.stdout and "engine's own run" in done.stdout
    return folder / "profile.json"


def test_a_calibration_leaves_a_profile_that_says_where_it_comes_from(profile: Path) -> None:
    engine = load_profile(profile)
    assert engine.fit["rows_fitted"] + engine.fit["rows_held_out"] >= 40
    assert {"machine", "model", "dtype", "versions", "date", "mape", "noise", "run_mape"} <= set(engine.fit)
    assert engine.origin["base_s"].startswith("measured") and engine.values["base_s"] > 0
    assert engine.origin["per_image_token_s"].startswith("not measured")
    assert (profile.parent / "calibration.png").stat().st_size > 10_000
    assert len((profile.parent / "iterations.csv").read_text().splitlines()) >= 41


def test_live_and_surrogate_side_by_side(profile: Path, tmp_path: Path) -> None:
    done = run(
        tmp_path, "evaluate", "hydra.run.dir=.", "compare=live,surrogate", f"engine={profile}", "workload=tiny",
        "workload.duration_s=3", "workload.warmup_s=0.5", "policies=[qoserve]", "seeds=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    fidelity = json.loads((tmp_path / "fidelity.json").read_text())
    assert -1 <= fidelity["kendall_tau"] <= 1 and "Kendall" in done.stdout
    figures = {row["figure"]: row for row in fidelity["rows"] if row["policy"] == "qoserve"}
    # How close they are depends on what else this machine does; that both served the trace does not.
    assert figures["deferred_tokens_per_s"]["live"] > 0 and figures["iterations"]["live"] > 10
    for engine in ("live", "surrogate"):
        board = json.loads((tmp_path / engine / "leaderboard.json").read_text())
        assert {row["policy"] for row in board} == {"qoserve", "immediate_only", "deferred_only"}
        assert (tmp_path / engine / "timeline_qoserve.png").is_file()


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("calibrate", ("seconds=0", "progress=false"), "seconds=0"),
        ("calibrate", ("model=/nowhere",), "/nowhere"),
        ("evaluate", ("executor=abacus",), "abacus is no engine"),
        ("evaluate", ("executor=live", "policies=[qoserve]", "seeds=1"), "longer than the"),
    ],
)
def test_bad_input_is_told_in_a_sentence(tmp_path: Path, name: str, arguments: tuple[str, ...], message: str) -> None:
    assert message in error(run(tmp_path, name, "hydra.run.dir=.", *arguments))
