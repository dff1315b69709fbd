"""How many processor cores this process may use: not how many the machine has."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def available_cores(cgroups: Path = CGROUPS) -> int:
    """Cores by the process's affinity and its container's limit (cgroup v2 or v1), at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = _limit(cgroups)
    return max(min(cores, math.ceil(limit)), 1) if limit is not None else cores


def _limit(cgroups: Path) -> float | None:
    """CPU time per second that the container may use; None: no limit is known."""
    try:
        quota, period = (cgroups / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((cgroups / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return None
    try:
        share = int(quota) / int(period)  # "max" and -1 are no limit
    except (ValueError, ZeroDivisionError):
        return None
    return share if share > 0 else None
