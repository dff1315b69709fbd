"""The serving engine: scheduler, KV cache accounts, step-time model, and what executes a planned iteration.

Compiled functions are cached between runs. Numba invalidates a cached function when its own file changes, but not when
a function it calls changes in another file, so each state of the compiled sources gets a cache folder of its own.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numba

_PACKAGE = Path(__file__).resolve().parent.parent
# Folders (not those below) of compiled code and the constants it takes in.
_COMPILED = ("runtime", "envs", "policies", "workloads")


def _source_digest() -> str:
    digest = hashlib.sha256()
    for folder in _COMPILED:
        for path in sorted((_PACKAGE / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


if "NUMBA_CACHE_DIR" not in os.environ:
    _cache_home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    numba.config.CACHE_DIR = str(_cache_home / "flexirl" / _source_digest())  # type: ignore[attr-defined]
