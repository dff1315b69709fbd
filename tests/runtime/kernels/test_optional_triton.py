"""Without Triton the PyTorch versions run on a CPU, and a GPU is refused with a sentence."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from flexirl.errors import UserError
from flexirl.runtime.kernels import optional_triton


def test_kernels_run_where_triton_is_not_installed() -> None:
    program = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from flexirl.runtime.kernels import rms_norm
print(rms_norm(torch.full((2, 4), 3.0), torch.ones(4), 0.0).tolist())
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == str([[1.0] * 4] * 2)


def test_a_gpu_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu: Any = SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(optional_triton, "tl", None)
    with pytest.raises(UserError, match="pip install"):
        optional_triton.runs_triton(on_gpu)
