"""The workload program, run as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(tmp_path, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "flexirl.workload", f"hydra.run.dir={tmp_path}", *arguments],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip


def test_prints_a_table_and_writes_its_files(tmp_path):
    ran = run(tmp_path, "workload=medium_bursty", "workload.load=0.9", "workload.immediate.arrivals.granularity=50")
    assert ran.returncode == 0, ran.stderr
    assert "peak to mean" in ran.stdout and "output tokens, p95" in ran.stdout
    summary = json.loads((tmp_path / "workload.json").read_text())
    assert summary["classes"]["immediate"]["demand"] == pytest.approx(0.9, rel=0.1)
    assert (tmp_path / "workload.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("workload=calm", "Could not find 'workload/calm'"),
        ("workload.lod=1", "Could not override 'workload.lod'"),
        ("workload.load=0", "workload.load=0.0 is out of range"),
        ("seed=-1", "seed=-1"),
        ("slo.ttft_s=soon", "slo.ttft_s=soon is not a number"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, argument, message):
    ran = run(tmp_path, argument)
    assert ran.returncode == 2
    assert message in ran.stderr and len(ran.stderr.strip().splitlines()) == 1
    assert ran.stdout == ""
