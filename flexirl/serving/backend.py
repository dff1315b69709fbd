"""What answers requests: an engine in this process, or a server elsewhere. The rest of the service knows only this."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Protocol

from flexirl.workloads.trace import IMMEDIATE


@dataclass(frozen=True)
class Terms:
    """How a request is to be served: what the scheduler of the engine knows of it beside its tokens.

    request_class: IMMEDIATE or DEFERRED; ttft_s, tpot_s: its promise, None for the engine's own; window_s: seconds
    until a deferred request expires; tenant: the name of whose it is; tier: what it was asked as, to be said in the
    answer.
    """

    request_class: int = IMMEDIATE
    ttft_s: float | None = None
    tpot_s: float | None = None
    window_s: float = float("inf")
    tenant: str = "default"
    tier: str = "default"


class Backend(Protocol):
    """Answers bodies sent to `bodies.CHAT` and `bodies.TEXT`; all methods are for the event loop."""

    models: tuple[str, ...]  # names by which it may be asked

    async def start(self) -> None:
        """To be called before anything else; raises UserError if it cannot work."""
        ...

    async def close(self) -> None:
        """Ends what is open."""
        ...

    async def answer(self, url: str, fields: dict[str, Any], terms: Terms) -> dict[str, Any]:
        """The whole answer; raises ApiError. Cancelled, the request is withdrawn."""
        ...

    async def stream(self, url: str, fields: dict[str, Any], terms: Terms) -> AsyncGenerator[dict[str, Any], None]:
        """The answer in chunks, once it is accepted; raises ApiError. To be closed if it is not read to its end."""
        ...

    @property
    def trouble(self) -> str | None:
        """Why it cannot answer now, None if it can."""
        ...

    def figures(self) -> dict[str, Any]:
        """What it does now and has done, for the status page and for metrics."""
        ...
