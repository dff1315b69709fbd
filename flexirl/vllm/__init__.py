"""A plug-in for vLLM: its scheduler, with one of FlexiRL's policies deciding. `--scheduler-cls flexirl.vllm.Scheduler`.

Importing this needs no vLLM; `Scheduler` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexirl.vllm.scheduler import Scheduler as Scheduler


def __getattr__(name: str) -> Any:
    if name == "Scheduler":
        from flexirl.vllm.scheduler import Scheduler

        return Scheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
