"""The house: imports run one way, and deciding with a deployed policy loads nothing that training needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_imports_run_one_way() -> None:
    """The contracts of pyproject.toml, checked by import-linter."""
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_a_deployed_policy_decides_without_torch_and_without_our_engine() -> None:
    code = """
import sys
from flexirl.policies.interface.view import idle_view
from flexirl.policies.registry import PRETRAINED, make_policy
from flexirl.runtime.profile.engine import load_profile
from flexirl.workloads.slo import SLO

policy, view = make_policy(PRETRAINED), idle_view(load_profile("cpu-tiny").values, SLO(1.0, 0.05))
policy.reset(view)
policy.decide(view)
assert policy.failures == {}
heavy = ("torch", "stable_baselines3", "transformers", "flexirl.runtime.scheduler", "flexirl.runtime.simulator")
print([name for name in heavy if name in sys.modules])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout.strip() == "[]"
