"""Settings that had another name: whoever still gives the old one is told the new one."""

from __future__ import annotations

from collections.abc import Iterable

from flexirl.errors import UserError

RENAMED = {"compare.policies": "policies", "compare.seeds": "seeds", "env.executor": "executor"}


def check_names_of_settings(overrides: Iterable[str]) -> None:
    """Raises UserError for the first of these Hydra overrides that goes by an old name."""
    for override in overrides:
        name = override.split("=", 1)[0].lstrip("+~")
        if name in RENAMED:
            raise UserError(f"{name} is called {RENAMED[name]} now.")
