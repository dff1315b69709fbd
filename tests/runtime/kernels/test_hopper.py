"""The kernels compile for Hopper, with the resources that `kernels/launch.py` counts on; no GPU is needed for that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexirl.runtime.kernels.launch import DECODES, WITH_CHUNKS

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, int]]:
    # In a process of its own, because here kernels may be bound to the interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("hopper.py")
    output = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
    return json.loads(output.stdout)


@pytest.mark.parametrize("name, launch", [("attention_decodes", DECODES), ("attention_mixed", WITH_CHUNKS)])
def test_attention_fits_as_planned(compiled: dict[str, dict[str, int]], name: str, launch) -> None:
    found = compiled[name]
    assert found["programs"] >= launch.programs
    assert found["spilled_bytes"] <= 32  # per thread; a few registers outside of the loops
    assert found["tensor_cores"] > 0 and found["async_copies"] > 0


def test_other_kernels_spill_nothing(compiled: dict[str, dict[str, int]]) -> None:
    others = {name: found["spilled_bytes"] for name, found in compiled.items() if not name.startswith("attention")}
    assert len(others) == 6 and not any(others.values())
