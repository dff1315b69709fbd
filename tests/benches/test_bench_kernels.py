"""The kernels' bench on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexirl.benches import kernels as bench_kernels


def test_says_that_it_needs_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "figures.json"
    with pytest.raises(SystemExit) as ended:
        bench_kernels.main(["--output", str(output)])
    assert ended.value.code == 2 and not output.exists()
    error = capsys.readouterr().err
    assert "CUDA" in error and error.count("\n") == 1
