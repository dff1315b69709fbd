"""How many processor cores this process may use: what affinity and containers leave of the machine's."""

from __future__ import annotations

import math
import os
from pathlib import Path

_ROOT = Path("/")


def available_cores(root: Path = _ROOT) -> int:
    """Cores that the scheduler gives this process, at most those its control groups pay for, rounded up; at least 1.

    root: where the file system begins, for tests.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # no Linux
        cores = os.cpu_count() or 1
    quotas = [quota for group in _groups(root) if (quota := _quota(group)) is not None]
    return max(1, min([cores, *(math.ceil(quota) for quota in quotas)]))


def _groups(root: Path) -> list[Path]:
    """Folders of the control groups that limit this process's processor time, each with all above it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    mounts = root / "sys/fs/cgroup"
    found = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # Version 2 is mounted as a whole, version 1 by controller. A container may see its own group as the root.
        for mount in [mounts] if not controllers else [mounts / controllers, mounts / "cpu"]:
            group = mount / name.lstrip("/")
            found += [group, *(parent for parent in group.parents if parent.is_relative_to(mount))]
    return found


def _quota(group: Path) -> float | None:
    """Cores' worth of processor time of one group; None where it has no limit."""
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        cores = float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):  # "max", or no such file
        return None
    return cores if cores > 0 else None
