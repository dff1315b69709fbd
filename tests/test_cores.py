"""Cores that may be used: by affinity, and by a container's limit in either form."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flexirl.cores import available_cores

HERE = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("limit", "cores"),
    [("100000 100000", 1), ("10000 100000", 1), ("max 100000", HERE), ("99900000 100000", HERE), ("nonsense", HERE)],
)
def test_a_containers_limit_counts(tmp_path: Path, limit: str, cores: int) -> None:
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
    assert available_cores(tmp_path) == cores


@pytest.mark.parametrize(("quota", "cores"), [("50000", 1), ("-1", HERE)])
def test_the_older_form_counts_too(tmp_path: Path, quota: str, cores: int) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert available_cores(tmp_path) == cores


def test_affinity_counts(tmp_path: Path) -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert available_cores(tmp_path) == 1
    finally:
        os.sched_setaffinity(0, allowed)
