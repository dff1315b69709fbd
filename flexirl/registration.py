"""Registers the environments with Gymnasium, which it does not import: it waits until somebody else does."""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register(gymnasium: Any) -> None:
    """Makes the environments known to `gymnasium`."""
    gymnasium.register(
        id="flexirl/Batching-v0",
        entry_point="flexirl.experiments.configuration:make_batching_env",
        vector_entry_point="flexirl.experiments.configuration:make_vector_env",
    )
    gymnasium.register(id="flexirl/LiveBatching-v0", entry_point="flexirl.experiments.configuration:make_live_env")


class _OnceImported(MetaPathFinder):
    """Has Gymnasium found by the other finders, and registers once it has run."""

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        """None for all other modules."""
        if name != "gymnasium":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def and_register(module: ModuleType) -> None:
                execute(module)
                register(module)

            spec.loader.exec_module = and_register  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Registers now, or when Gymnasium is imported."""
    if "gymnasium" in sys.modules:
        register(sys.modules["gymnasium"])
    else:
        sys.meta_path.insert(0, _OnceImported())
