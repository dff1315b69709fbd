"""The examples run, with small settings, each in a process of its own, since rules stay known once defined."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHORT = ["workload=high_bursty", "workload.duration_s=8", "workload.warmup_s=1"]


def run(name: str, **settings: object) -> str:
    """What the `main` of an example prints."""
    code = f"import runpy; runpy.run_path({str(ROOT / 'examples' / name)!r})['main'](**{settings!r})"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_stable_baselines3_learns_on_the_environment() -> None:
    printed = run("train_with_sb3.py", steps=2048, overrides=SHORT)
    middle, agent = (float(number.replace(",", "")) for number in re.findall(r"([\d,]+) with", printed))
    assert middle > 0 and agent > 0 and agent != middle


def test_a_rule_of_ones_own_is_compared() -> None:
    printed = run("own_rule.py", seeds=1, overrides=SHORT)
    assert {line.split()[0] for line in printed.splitlines()[2:]} == {
        "stand_back", "qoserve", "immediate_only", "deferred_only",
    }  # fmt: skip
