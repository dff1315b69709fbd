"""A stream of events closes what it is made of, whenever its client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from flexirl.serving.routes_completions import EventStream


@pytest.mark.parametrize("told", [0, 1, 2])
def test_a_client_that_leaves_while_it_is_told_something(told: int) -> None:
    """After so many messages: before the head of the answer, before the first event, before the second."""
    closed: list[int] = []

    async def chunks() -> AsyncGenerator[dict[str, Any], None]:
        try:
            yield {}
            for i in range(1000):
                yield {"i": i}
        finally:
            closed.append(1)

    async def leave() -> None:
        begun = chunks()
        await anext(begun)
        messages: list[Any] = []
        stuck = asyncio.Event()

        async def receive() -> dict[str, Any]:
            await stuck.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if len(messages) == told:
                stuck.set()
                await asyncio.sleep(3600)
            messages.append(message)

        scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
        await asyncio.wait_for(EventStream(begun)(scope, receive, send), 10)
        assert closed == [1] and len(messages) == told

    asyncio.run(leave())
