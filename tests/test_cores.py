"""Cores that may be used: affinity and the quotas of control groups, from files made up here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flexirl.cores import available_cores


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 16 cores on which nothing is limited."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    return tmp_path


def put(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_affinity_alone(root: Path) -> None:
    assert available_cores(root) == 16


@pytest.mark.parametrize(
    ("limit", "cores"),
    [("max 100000", 16), ("300000 100000", 3), ("250000 100000", 3), ("5000 100000", 1), ("9900000 100000", 16)],
)
def test_quota_of_version_2(root: Path, limit: str, cores: int) -> None:
    put(root, {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": limit})
    assert available_cores(root) == cores


def test_the_tightest_of_the_groups_above_counts(root: Path) -> None:
    put(
        root,
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000",
            "sys/fs/cgroup/a/cpu.max": "400000 100000",
        },
    )
    assert available_cores(root) == 4


def test_a_container_sees_its_group_as_the_root(root: Path) -> None:
    put(root, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000"})
    assert available_cores(root) == 2


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
@pytest.mark.parametrize("place", ["docker/1", ""])
def test_quota_of_version_1(root: Path, mount: str, place: str) -> None:
    folder = f"sys/fs/cgroup/{mount}/{place}"
    put(root, {"proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/docker/1\n0::/\n",
               f"{folder}/cpu.cfs_quota_us": "600000\n", f"{folder}/cpu.cfs_period_us": "200000\n"})  # fmt: skip
    assert available_cores(root) == 3
    put(root, {f"{folder}/cpu.cfs_quota_us": "-1\n"})
    assert available_cores(root) == 16
