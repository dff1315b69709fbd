"""Compiled code is cached by the state of all sources that it may take in."""

from __future__ import annotations

from pathlib import Path

import flexirl
from flexirl.runtime import _COMPILED

PACKAGE = Path(flexirl.__file__).parent


def test_every_folder_of_cached_code_counts() -> None:
    """But for programs, whose functions nothing else calls."""
    cached = [path for path in PACKAGE.glob("*/**/*.py") if "cache=True" in path.read_text()]
    assert len(cached) > 10
    assert {path.parent.relative_to(PACKAGE).as_posix() for path in cached} <= set(_COMPILED)
