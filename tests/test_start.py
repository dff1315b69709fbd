"""What programs load before they know that there is something to do: by it, not by a clock, a start is quick."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What takes a tenth of a second or more.
SLOW = {"torch", "stable_baselines3", "transformers", "matplotlib", "scipy.stats", "tensorboard", "onnx", "pandas"}
SHORT = ("workload=tiny", "workload.duration_s=2", "workload.warmup_s=0", "seeds=1", "policies=[qoserve]")


def loaded(folder: Path, *words: str, code: int = 0) -> set[str]:
    """Names of all modules that a Python process with these arguments imports."""
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", *words], capture_output=True, text=True, check=False, cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ran.returncode == code, ran.stderr[-2000:]
    return {line.split("|")[-1].strip() for line in ran.stderr.splitlines() if line.startswith("import time:")}


@pytest.mark.parametrize("program", ["train", "evaluate", "benchmark", "generate", "calibrate", "validate", "workload"])
def test_help_loads_only_what_reads_configuration(program: str, tmp_path: Path) -> None:
    assert not loaded(tmp_path, "-m", f"flexirl.{program}", "--help") & (
        SLOW | {"numba", f"flexirl.programs.{program}"}
    )


@pytest.mark.parametrize("override", ["sedes=3", "workload=nowhere", "workload.load"])
def test_a_wrong_override_is_told_at_once(override: str, tmp_path: Path) -> None:
    assert not loaded(tmp_path, "-m", "flexirl.train", override, code=2) & (SLOW | {"numba", "flexirl.programs.train"})


@pytest.mark.parametrize("override", ["total_steps=-1", "policies=[fifo]", "engine.kv_blocks=-5", "workload.load=high"])
def test_a_wrong_value_is_told_before_the_training_tools_are_loaded(override: str, tmp_path: Path) -> None:
    assert not loaded(tmp_path, "-m", "flexirl.train", override, code=2) & (SLOW - {"onnx"})


def test_comparing_rules_loads_no_training_tools(tmp_path: Path) -> None:
    modules = loaded(tmp_path, "-m", "flexirl.evaluate", "hydra.run.dir=.", *SHORT)
    assert not modules & (SLOW - {"matplotlib"}) and "matplotlib" in modules


def test_an_environment_loads_no_training_tools(tmp_path: Path) -> None:
    code = "import gymnasium, flexirl; gymnasium.make('flexirl/Batching-v0', overrides=['workload=tiny']).reset(seed=0)"
    assert not loaded(tmp_path, "-c", code) & SLOW
