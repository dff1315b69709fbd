"""Shared by the workload tests: where recorded traces lie, if they are there."""

from pathlib import Path

import pytest


@pytest.fixture
def traces() -> Path:
    """The folder of recorded traces beside the repository; tests that need it are skipped without it."""
    folder = Path(__file__).parents[2].parent / "shared" / "traces"
    if not folder.is_dir():
        pytest.skip("recorded traces (../shared/traces) are not on this machine")
    return folder
