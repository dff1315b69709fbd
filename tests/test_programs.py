"""The programs as a user runs them: what they write, and one sentence with exit code 2 where the user is wrong."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import onnx
import pytest
from programs import error, run
from stable_baselines3.common.save_util import load_from_zip_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flexirl.runtime.profile.engine import load_profile, save_profile

EPISODE = ("workload.duration_s=20", "workload.warmup_s=2")
SMALL = (*EPISODE, "env.members=8", "env.group_size=4", "env.traces=4", "total_steps=4096", "validation.members=2",
         "agent.hyperparameters.episodes=2", "agent.hyperparameters.updates=50", "seeds=1",
         "progress=false")  # fmt: skip
BAR = "%|"  # what a progress bar cannot do without
LEADERBOARD = {
    "policy", "workload", "engine", "load", "seed", "unservable", "unservable_work", "cut_short",
    "value_per_s", "revenue_per_s", "immediate_attainment", "given_up", "immediate_cached", "deferred_cached",
    "evicted_blocks", "deferred_below_p80",
    "immediate_goodput_tokens_per_s", "prompt_tokens_per_s", "output_tokens_per_s",
    "deferred_tokens_per_s", "deferred_on_time",
    *(f"{name}_{figure}_s" for name in ("ttft", "tpot") for figure in ("mean", "p50", "p90", "p95", "p99")),
    "itl_p99_s", "e2e_p99_s", "preemptions", "recomputed_tokens", "swapped_tokens", "kv_utilisation",
    "step_time_mean_s", "iterations", "jain_fairness", "simulated_s", "wall_s", "deferred_share_of_deferred_only",
    "ttft_p99_over_immediate_only", "tpot_p99_over_immediate_only",
}  # fmt: skip
RUN_FILES = {
    "config.yaml", "command.txt", "packages.txt", "policy.zip", "policy.onnx", "leaderboard.csv", "leaderboard.json",
    "reward.png", "comparison.png", "timeline.png",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small training run."""
    folder = tmp_path_factory.mktemp("trained")
    ran = run(folder, "train", "hydra.run.dir=.", *SMALL, "policies=[vllm_fcfs,hygen]")
    assert ran.returncode == 0, ran.stderr
    assert "optimises" in ran.stdout and "vllm_fcfs" in ran.stdout
    return folder


def leaderboard(folder: Path) -> list[dict[str, object]]:
    """The rows of a leaderboard; its two files must agree."""
    rows: list[dict[str, object]] = json.loads((folder / "leaderboard.json").read_text())
    with open(folder / "leaderboard.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["policy"] for row in table] == [row["policy"] for row in rows]
    assert all(set(row) == LEADERBOARD for row in (*rows, *table))
    return rows


def test_a_run_leaves_everything_in_its_folder(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} >= RUN_FILES
    for name in ("reward.png", "comparison.png", "timeline.png"):
        assert (trained / name).read_bytes().startswith(b"\x89PNG")
    assert "total_steps: 4096" in (trained / "config.yaml").read_text()
    command = (trained / "command.txt").read_text()
    assert command.startswith("python -m flexirl.train ") and "env.members=8" in command
    assert "\ntorch==" in (trained / "packages.txt").read_text()
    rows = leaderboard(trained)
    assert [row["policy"] for row in rows[1:]] == ["vllm_fcfs", "hygen", "immediate_only", "deferred_only"]
    assert str(rows[0]["policy"]).startswith("learned")
    assert rows[3]["ttft_p99_over_immediate_only"] == 1.0 and rows[4]["deferred_share_of_deferred_only"] == 1.0


def test_tensorboard_shows_the_figures(trained: Path) -> None:
    (events,) = trained.glob("*_1/events.*")
    log = EventAccumulator(str(events.parent)).Reload()
    scalars = set(log.Tags()["scalars"])
    assert scalars >= {"episode/reward", "episode/revenue_per_s", "episode/immediate_attainment",
                       "episode/deferred_tokens_per_s", "episode/preemptions_per_s", "validation/revenue_per_s",
                       "train/loss"}  # fmt: skip
    assert any(name.startswith("action/") for name in log.Tags()["histograms"])
    pictures = EventAccumulator(str(trained)).Reload()
    assert set(pictures.Tags()["images"]) == {"reward", "comparison", "timeline"}


def test_the_exported_policy_describes_itself(trained: Path) -> None:
    properties = {entry.key: entry.value for entry in onnx.load(trained / "policy.onnx").metadata_props}
    assert {"format", "observation_schema", "action_schema", "package_version", "validation"} <= set(properties)
    assert json.loads(properties["training"])["total_steps"] == 4096


def test_training_resumes(trained: Path, tmp_path: Path) -> None:
    policy = trained / "policy.zip"
    ran = run(tmp_path, "train", "hydra.run.dir=out", f"resume={policy}", *SMALL, "total_steps=2048", "policies=[]")
    assert ran.returncode == 0, ran.stderr
    steps = [load_from_zip_file(folder / "policy.zip")[0]["num_timesteps"] for folder in (trained, tmp_path / "out")]
    history = json.loads((tmp_path / "out" / "history.json").read_text())
    assert history[0]["steps"] == steps[0] and history[-1]["steps"] == steps[1] >= steps[0] + 2048
    assert error(run(tmp_path, "train", f"resume={policy}", *EPISODE, "env=grid", "agent=dqn")).startswith(
        "error: resume="
    )


def test_without_steps_the_agent_it_starts_from_is_what_comes_out(tmp_path: Path) -> None:
    ran = run(tmp_path, "train", "hydra.run.dir=out", *SMALL, "total_steps=0", "policies=[]")
    assert ran.returncode == 0 and BAR not in ran.stderr, ran.stderr
    assert [row["steps"] for row in json.loads((tmp_path / "out" / "history.json").read_text())] == [0]
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"policy.onnx", "policy.zip", "reward.png"}


def test_sweeps_give_every_job_a_folder(tmp_path: Path) -> None:
    swept = run(tmp_path, "train", "--multirun", "hydra.sweep.dir=.", *SMALL, "seed=1,2", "policies=[]")
    assert swept.returncode == 0, swept.stderr
    first, second = (json.loads((tmp_path / job / "history.json").read_text()) for job in "01")
    assert first != second
    for job in "01":
        assert len(leaderboard(tmp_path / job)) == 3


def test_a_bad_job_does_not_end_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "good=1.csv").write_text("arrival_s,prompt_tokens,output_tokens\n" + "0,50,5\n9,50,5\n" * 3)
    swept = run(
        tmp_path, "workload", "--multirun", "hydra.sweep.dir=.", "hydra.sweep.subdir=${hydra.job.num}",
        "workload=trace", "workload.path=nowhere.csv,good=1.csv,gone.csv", "workload.duration_s=null",
        "workload.warmup_s=0", "workload.load=0.1",
    )  # fmt: skip
    said = swept.stderr.strip().splitlines()
    assert swept.returncode == 2 and "Traceback" not in swept.stderr
    assert [line.split(" (")[0] for line in said] == ["error: job 0", "error: job 2"]
    assert "failed: nowhere.csv does not exist" in said[0] and "workload.path=gone.csv" in said[1]
    assert (tmp_path / "1" / "workload.json").is_file() and not (tmp_path / "2" / "workload.json").is_file()


def test_policies_are_evaluated_on_the_same_arrivals(trained: Path, tmp_path: Path) -> None:
    save_profile(load_profile("a100-llama-3.1-8b"), tmp_path / "mine.json")
    policies = f"policies=[sarathi,{trained / 'policy.onnx'}]"
    ran = run(
        tmp_path,
        "evaluate",
        "hydra.run.dir=out",
        policies,
        *EPISODE,
        "workload=high_bursty",
        "engine=mine.json",
        "seeds=2",
        "progress=false",
    )
    assert ran.returncode == 0 and BAR not in ran.stderr, ran.stderr
    assert (tmp_path / "out" / "command.txt").read_text().startswith("python -m flexirl.evaluate hydra.run.dir=out")
    rows = leaderboard(tmp_path / "out")
    assert len(rows) == 8 and {row["seed"] for row in rows} == {0, 1}
    assert all(row["engine"] == "a100-llama-3.1-8b" and row["workload"] == "high_bursty" for row in rows)
    assert len({row["load"] for row in rows}) == 2  # one per seed
    timelines = {path.name for path in (tmp_path / "out").glob("timeline_*.png")}
    assert len(timelines) == 4 and (tmp_path / "out" / "comparison.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("total_step=5",), "Could not override 'total_step'"),
        (("workload=trace", "workload.path=nowhere.csv"), "nowhere.csv does not exist"),
        (("workload=trace", "workload.path=bad.csv"), "name them in workload.columns"),
        (("workload=trace", "workload.path=negative.csv"), "prompt_tokens"),
        (("policies=[fifo]",), "'fifo' is unknown; choose from"),
        (("engine=h999",), "Could not find 'engine/h999'"),
        (("engine=nowhere.json",), "nowhere.json does not exist"),
        (("agent=dqn",), "env=grid"),
        (("total_steps=-1",), "total_steps=-1"),
        (("engine.kv_blocks=-5",), "engine.kv_blocks=-5"),
        (("policies=hygen",), "policies=hygen is not a list"),
        (("compare.seeds=1",), "compare.seeds is called seeds now."),
        (("++compare.policies=[hygen]",), "compare.policies is called policies now."),
        (("progress=off",), "progress=off is neither true nor false"),
        (("env.members=10",), "env.members=10 is not a multiple of env.group_size=8"),
    ],
)
def test_training_with_bad_input(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    (tmp_path / "bad.csv").write_text("arrival_s,prompt_tokens\n0.0,5\n")
    (tmp_path / "negative.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0.0,-5,3\n")
    assert message in error(run(tmp_path, "train", *arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("policies=[nowhere.onnx]",), "nowhere.onnx does not exist"),
        (("policies=[broken.onnx]",), "broken.onnx is not a readable ONNX file"),
        (("seeds=0",), "seeds=0"),
        (("seeds=many",), "seeds=many"),
        (("env.executor=live",), "env.executor is called executor now."),
    ],
)
def test_evaluating_bad_input(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"not a network")
    assert message in error(run(tmp_path, "evaluate", *arguments))


@pytest.mark.parametrize(
    "name", ["train", "evaluate", "workload", "validate", "calibrate", "generate", "bench", "benchmark"]
)
def test_programs_explain_themselves(tmp_path: Path, name: str) -> None:
    ran = run(tmp_path, name, "--help")
    assert ran.returncode == 0 and name in ran.stdout, ran.stderr


def test_what_is_printed_is_kept_and_a_failed_command_leaves_nothing(tmp_path: Path) -> None:
    short = ("workload=tiny", "workload.duration_s=2", "workload.warmup_s=0", "seeds=1", "policies=[qoserve]")
    ran = run(tmp_path, "evaluate", *short)
    assert ran.returncode == 0, ran.stderr
    (log,) = tmp_path.glob("outputs/*/*/evaluate.log")
    assert log.read_text() == ran.stdout and "qoserve" in ran.stdout
    shutil.rmtree(tmp_path / "outputs")
    ran = run(tmp_path, "evaluate", *short, "workload.load=-1")
    assert error(ran).startswith("error: workload.load=-1")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [] and not list(tmp_path.glob("outputs/*"))
