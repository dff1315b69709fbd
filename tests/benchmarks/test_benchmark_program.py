"""The benchmark as a user runs it: what it writes, that it goes on where it stopped, and wrong input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
PROGRAM = (sys.executable, "-m", "flexirl.benchmark", "hydra.run.dir=out", "progress=false")
SMALL = (
    "suite.grids=[{overrides: ['workload=poisson', 'workload.duration_s=10', 'workload.warmup_s=1'], "
    "axes: {workload.load: [0.5, 0.9]}}]",
    "policies=[vllm_priority,qoserve]",
)  # fmt: skip


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the benchmark in a folder."""
    return subprocess.run(
        [*PROGRAM, *arguments], capture_output=True, text=True, check=False, cwd=folder, env=ENVIRONMENT
    )


def test_a_small_suite(tmp_path: Path) -> None:
    ran = run(tmp_path, *SMALL, "processes=1", "seeds=2")
    assert ran.returncode == 0, ran.stderr
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {(row["scenario"], row["policy"], row["seed"]) for row in rows} == {
        (f"load {load}", policy, seed)
        for load in (0.5, 0.9)
        for policy in ("vllm_priority", "qoserve", "immediate_only", "deferred_only")
        for seed in (0, 1)
    }
    assert all(row["revenue_per_s"] <= row["upper_bound_revenue_per_s"] for row in rows)
    assert (tmp_path / "out" / "report.html").is_file() and (tmp_path / "out" / "config.yaml").is_file()
    assert len(list((tmp_path / "outputs" / "benchmark_cache").iterdir())) == 2 * 5


def heed_ctrl_c() -> None:
    """What a shell starts in the background ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_and_on_again(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*PROGRAM, *SMALL, "seeds=200", "processes=2"], cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE,
        text=True, preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    cache = tmp_path / "outputs" / "benchmark_cache"
    while process.poll() is None and not (cache.is_dir() and list(cache.glob("*.json"))):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and said == "interrupted; the same command goes on from here\n"
    assert 0 < len(list(cache.glob("*.json"))) < 2 * 5
    assert not (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("suite=nothing",), "Could not find 'suite/nothing'"),
        (("suite=traces",), "suite=traces needs traces; give the folder they lie in as suite.folder=PATH."),
        (("policies=[fifo]",), "'fifo' is unknown"),
        (("policies=hygen",), "policies=hygen is not a list"),
        (("processes=0",), "processes=0"),
        (("seeds=0",), "seeds=0"),
        (("suite.grids=[]",), "has no scenarios"),
        (("suite.grids=[{overrides: ['workload.speed=3']}]",), "Could not override 'workload.speed'"),
    ],
)
def test_bad_input(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    ran = run(tmp_path, *arguments)
    lines = ran.stderr.strip().splitlines()
    assert ran.returncode == 2 and len(lines) == 1 and message in lines[0], ran.stderr
