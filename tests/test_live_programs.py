"""calibrate and evaluate on the live engine, run as their users run them, on the tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from programs import error, run

from flexirl.runtime.profile.engine import load_profile


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
    assert fidelity["engines"] == ["live", "surrogate"] and figures["iterations"]["first"] > 10
    assert len(fidelity["paces"]) == 2 and all(0.2 < pace < 5 for pace in fidelity["paces"])
    # How close they are depends on what else this machine does between calibration and run: the limit is wide.
    assert -0.5 < figures["step_time_mean_s"]["difference"] < 1.0
    for engine in ("live", "surrogate"):
        board = json.loads((tmp_path / engine / "leaderboard.json").read_text())
        assert {row["policy"] for row in board} == {"qoserve", "immediate_only", "deferred_only"}
        assert (tmp_path / engine / "timeline_qoserve.png").is_file()


SMALL = ("workload=tiny", "workload.duration_s=2", "workload.warmup_s=0.4", "validation.every_steps=1000", "seeds=1",
         "progress=false")  # fmt: skip
ROLLOUTS = ("agent.hyperparameters.n_steps=10", "agent.hyperparameters.batch_size=10")


def test_an_agent_learns_on_the_live_engine(profile: Path, tmp_path: Path) -> None:
    """From the best constant dials, as no policy to resume is given."""
    done = run(
        tmp_path, "train", "hydra.run.dir=.", "env=live", f"engine={profile}", *SMALL, *ROLLOUTS, "total_steps=20",
        "policies=[qoserve]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    history = json.loads((tmp_path / "history.json").read_text())
    assert [row["steps"] for row in history] == [1, 20] and all(row["revenue_per_s"] > 0 for row in history)
    board = json.loads((tmp_path / "leaderboard.json").read_text())
    assert {row["policy"] for row in board[1:]} == {"qoserve", "immediate_only", "deferred_only"}
    assert all(row["iterations"] > 10 for row in board) and (tmp_path / "policy.onnx").is_file()


def test_an_agent_of_the_surrogate_is_tuned_on_the_live_engine(profile: Path, tmp_path: Path) -> None:
    """Its groups of members shrink to one engine."""
    settings = (f"engine={profile}", *SMALL, "policies=[]")
    done = run(
        tmp_path, "train", "hydra.run.dir=before", *settings, "env.members=4", "env.group_size=2", "env.traces=2",
        "validation.members=1", "total_steps=40", "agent.warm_start=false", "agent.hyperparameters.episodes=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = run(
        tmp_path, "train", "hydra.run.dir=after", "env=live", *settings, *ROLLOUTS, "total_steps=10",
        "resume=before/policy.zip",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    history = json.loads((tmp_path / "after" / "history.json").read_text())
    assert history[0]["steps"] == 1 and history[-1]["steps"] >= 10


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("calibrate", ("seconds=0", "progress=false"), "seconds=0"),
        ("calibrate", ("model=/nowhere",), "/nowhere"),
        ("train", ("env=live", "env.clock=sand"), "env.clock=sand is unknown; choose from virtual, wall"),
        ("train", ("env=live", "env.members=2"), "env.members"),
        ("evaluate", ("executor=abacus",), "abacus is no engine"),
        ("evaluate", ("executor=live", "policies=[qoserve]", "seeds=1", "progress=false"), "longer than the"),
    ],
)
def test_bad_input_is_told_in_a_sentence(tmp_path: Path, name: str, arguments: tuple[str, ...], message: str) -> None:
    assert message in error(run(tmp_path, name, "hydra.run.dir=.", *arguments))
