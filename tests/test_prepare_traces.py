"""The script that prepares downloaded traces, on small files in their original formats."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flexirl.workloads.readers import read_trace

ROOT = Path(__file__).parents[1]


def prepare(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "prepare_traces.py"), *map(str, arguments)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.fixture
def azure(tmp_path: Path) -> Path:
    """101 requests, one a second."""
    path = tmp_path / "AzureLLMInferenceTrace_conv.csv"
    lines = [f"2023-11-16 18:{15 + i // 60:02}:{i % 60:02}.5000000,{100 + i},{1 + i % 7}" for i in range(101)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]) + "\n")
    return path


def test_parts_of_an_azure_trace(azure: Path, tmp_path: Path) -> None:
    target = tmp_path / "traces" / "azure23_conv"
    ran = prepare(azure, target)
    assert ran.returncode == 0, ran.stderr
    whole = read_trace(azure).rows
    train, val = (read_trace(f"{target}{suffix}").rows for suffix in (".csv.gz", ".val.csv.gz"))
    assert (len(train), len(val)) == (61, 15)
    for column in ("arrival_s", "prompt_tokens", "output_tokens"):
        assert np.concatenate([train[column], val[column]]).tolist() == whole[column][:76].tolist()
    before = Path(f"{target}.csv.gz").read_bytes()
    prepare(azure, target)
    assert Path(f"{target}.csv.gz").read_bytes() == before


def test_a_servegen_service_keeps_its_clients_and_images(tmp_path: Path) -> None:
    folder = tmp_path / "mm-image"
    folder.mkdir()
    for client in (3, 8):
        (folder / f"chunk-{client}-trace.csv").write_text("0,0.5,1.0,Gamma,1.0,1.0\n1000,0,0,,0,0\n")
        dataset = {"0": {"text_tokens": "{50: 1.0}", "output_tokens": "{9: 1.0}", "image_count": "{0: 0.5, 2: 0.5}",
                         "image_tokens": "{300: 1.0}"}}  # fmt: skip
        (folder / f"chunk-{client}-dataset.json").write_text(json.dumps(dataset))
    ran = prepare(folder, tmp_path / "mm", "--train", "9/14", "--val", "2/14", "--seed", 3)
    assert ran.returncode == 0, ran.stderr
    train, val = (read_trace(tmp_path / f"mm{suffix}") for suffix in (".csv.gz", ".val.csv.gz"))
    assert train.num_tenants == 2 and set(train.rows["image_tokens"].tolist()) == {0, 600}
    assert len(train) / (len(train) + len(val)) == pytest.approx(9 / 11, abs=0.05)
    assert train.duration_s < val.rows["arrival_s"][0]


def test_what_is_wrong_is_a_sentence(azure: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((tmp_path / "none.csv", tmp_path / "x"), "none.csv does not exist"),
        ((azure, tmp_path / "x", "--train", "0.9", "--val", "0.2"), "together at most 1"),
        ((azure, tmp_path / "x", "--train", "0.999", "--val", "0.0001"), "has no request for x.val.csv.gz"),
    ):
        ran = prepare(*arguments)
        assert ran.returncode == 2 and message in ran.stderr and "Traceback" not in ran.stderr
