"""The programs as a user runs them, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(folder: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m flexirl.<name> <arguments>` in a folder, PyTorch on one thread."""
    return subprocess.run(
        [sys.executable, "-m", f"flexirl.{name}", *arguments],
        capture_output=True, text=True, check=False, cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def error(ran: subprocess.CompletedProcess[str]) -> str:
    """What a program said to a user who was wrong: one line, exit code 2; on a busy machine it may compile before."""
    lines = [line for line in ran.stderr.strip().splitlines() if not line.startswith("compiling, ")]
    assert ran.returncode == 2 and len(lines) == 1 and "Traceback" not in ran.stderr, ran.stderr
    return lines[0]
