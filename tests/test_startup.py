"""What a command imports before it is known to be right, and before what it does needs it: no clock, only modules."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from programs import ROOT, error

from flexirl.__main__ import PROGRAMS
from flexirl.experiments.values import CONF

HEAVY = {"torch", "numba", "stable_baselines3", "gymnasium", "transformers", "matplotlib", "scipy", "onnx", "pandas"}
CONFIGURED = sorted(name.replace("-", "_") for name in set(PROGRAMS) - {"pretrained", "bench", "deploy", "key"})
TINY = ("workload=tiny", "workload.duration_s=2", "workload.warmup_s=0", "seeds=1", "policies=[qoserve]")


def timed(folder: Path, name: str, *arguments: str) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Runs a program; returns also the top-level packages and the modules of SciPy that it imported."""
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", f"flexirl.{name}", *arguments],
        capture_output=True, text=True, check=False, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    lines = ran.stderr.splitlines()
    imported = {line.split("|")[2].strip() for line in lines if line.startswith("import time:")}
    ran.stderr = "\n".join(line for line in lines if not line.startswith("import time:"))
    return ran, {name.split(".")[0] for name in imported} | imported


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_help_waits_for_no_library(tmp_path: Path, name: str) -> None:
    ran, imported = timed(tmp_path, name.replace("-", "_"), "--help")
    assert ran.returncode == 0 and "usage" in ran.stdout and "flexirl" in imported
    assert not imported & HEAVY


@pytest.mark.parametrize("name", CONFIGURED)
def test_help_shows_groups_and_settings_with_their_comments(tmp_path: Path, name: str) -> None:
    config_name = "workload_stats" if name == "workload" else name
    ran, _ = timed(tmp_path, name, "--help")
    text = (CONF / f"{config_name}.yaml").read_text()
    config = OmegaConf.create(text)
    for group in (group for entry in config.get("defaults", []) if entry != "_self_" for group in entry):
        for choice in (CONF / group).glob("*.yaml"):
            assert re.search(rf"^  {re.escape(choice.stem)}( |$)", ran.stdout, re.MULTILINE), choice
    for setting in set(config) - {"defaults", "hydra"}:
        assert re.search(rf"^  {setting}:", ran.stdout, re.MULTILINE)
    for comment in re.findall(r"(?<=  )# .*", text.split("hydra:")[0].split("defaults:")[0]):
        assert comment in ran.stdout


@pytest.mark.parametrize(
    ("name", "override"),
    [
        *((name, "nonsense=1") for name in CONFIGURED),
        ("train", "workload=nowhere"),
        ("train", "total_steps=-1"),
        ("train", "seed=first"),
        ("evaluate", "engine=h999"),
        ("evaluate", "seeds=0"),
        ("evaluate", "policies=[fifo]"),
        ("evaluate", "policies=[nowhere.onnx]"),
        ("evaluate", "compare.seeds=3"),
        ("benchmark", "suite=nowhere"),
        ("benchmark", "progress=off"),
        ("generate", "threads=0"),
        ("calibrate", "seconds=long"),
    ],
)
def test_a_wrong_override_waits_for_no_library(tmp_path: Path, name: str, override: str) -> None:
    ran, imported = timed(tmp_path, name, override)
    assert error(ran).startswith("error: ") and not imported & HEAVY


def test_comparing_a_rule_takes_nothing_that_trains_or_runs_models(tmp_path: Path) -> None:
    ran, imported = timed(tmp_path, "evaluate", "hydra.run.dir=.", *TINY)
    assert ran.returncode == 0 and "numba" in imported
    assert not imported & {"torch", "stable_baselines3", "gymnasium", "transformers", "onnx", "pandas", "scipy.stats"}


def test_an_environment_takes_nothing_that_trains() -> None:
    code = """
import sys, flexirl
assert "gymnasium" not in sys.modules
import gymnasium
for env in (gymnasium.make("flexirl/Batching-v0"), gymnasium.make_vec("flexirl/Batching-v0", num_envs=2)):
    env.reset(seed=0)
print(sorted({"torch", "stable_baselines3", "transformers", "matplotlib", "onnx", "scipy.stats"} & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("first", ["gymnasium", "flexirl"])
def test_the_environments_are_known_in_either_order(first: str) -> None:
    code = f"import sys, {first}, flexirl, gymnasium; print(*(id for id in gymnasium.registry if 'flexirl' in id))"
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["flexirl/Batching-v0", "flexirl/LiveBatching-v0"]


def test_interrupted_before_training_it_says_so(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "flexirl.train", "hydra.run.dir=out", "progress=false"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        while not (tmp_path / "out" / ".hydra").is_dir():  # its libraries are imported next
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    assert process.returncode == 130 and said == "interrupted\n"
