"""A backend that answers by itself, and a service that runs beside a test."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexirl.serving.backend import Backend, Terms
from flexirl.serving.batch_runner import BatchRunner
from flexirl.serving.bodies import CHAT, parse
from flexirl.serving.errors import ApiError
from flexirl.serving.metrics import Metrics
from flexirl.serving.service import Service, Tier
from flexirl.serving.store import Store
from flexirl.serving.tenants import Tenants


class EchoBackend:
    """Says each prompt again. A prompt "fail" fails for good, "busy N" the first N times; `hold` is waited for.

    asked: how often each prompt was; terms: of all that was asked; withdrawn: prompts that were cancelled.
    """

    models: tuple[str, ...] = ("echo",)

    def __init__(self, seconds: float = 0.0) -> None:
        self.trouble: str | None = None
        self.seconds = seconds
        self.asked: Counter[str] = Counter()
        self.terms: list[Terms] = []
        self.withdrawn: list[str] = []
        self.hold: asyncio.Event | None = None

    async def start(self) -> None:
        """See `Backend`."""

    async def close(self) -> None:
        """See `Backend`."""

    async def answer(self, url: str, fields: dict[str, Any], terms: Terms) -> dict[str, Any]:
        """See `Backend`."""
        body: Any = parse(url, fields)
        prompt = str(body.messages[-1].content if url == CHAT else body.prompt)
        self.asked[prompt] += 1
        self.terms.append(terms)
        try:
            await asyncio.sleep(self.seconds)
            if self.hold is not None:
                await self.hold.wait()
        except asyncio.CancelledError:
            self.withdrawn.append(prompt)
            raise
        word, _, count = prompt.partition(" ")
        if word == "fail" or (word == "busy" and self.asked[prompt] <= int(count)):
            raise ApiError(500, "It failed.", code="engine_error")
        usage = {"prompt_tokens": len(prompt), "completion_tokens": 2, "total_tokens": len(prompt) + 2}
        message = {"role": "assistant", "content": prompt}
        choice = {"index": 0, "finish_reason": "stop", "logprobs": None}
        choice |= {"message": message} if url == CHAT else {"text": prompt}
        kind = "chat.completion" if url == CHAT else "text_completion"
        return {"id": "echo", "object": kind, "created": 0, "model": "echo", "choices": [choice], "usage": usage}

    async def stream(self, url: str, fields: dict[str, Any], terms: Terms) -> AsyncIterator[dict[str, Any]]:
        """See `Backend`."""
        answer = await self.answer(url, fields, terms)

        async def chunks() -> AsyncIterator[dict[str, Any]]:
            yield answer

        return chunks()

    def figures(self) -> dict[str, Any]:
        """See `Backend`."""
        return {"policy": "none", "classes": {}}


def make_service(backend: Backend, folder: Path, metrics: Metrics | None = None, **options: Any) -> Service:
    """A service with its data in a folder; options: of `Service`, and most, refuse_late, url, keys, clock."""
    metrics = metrics or Metrics()
    store = Store(folder, options.pop("url", None), options.pop("clock", time.time))
    runner = BatchRunner(store, backend, metrics, options.pop("most", 8), options.pop("refuse_late", False))
    tenants = Tenants(options.pop("keys", None))
    tiers = {"default": Tier(), "flex": Tier(window_s=60.0)}
    return Service(backend, store, runner, metrics, tenants, folder / "policies", tiers, **options)


@contextmanager
def serving(service: Service) -> Iterator[str]:
    """Serves in a thread on a free port of this machine: its URL."""
    # These take seconds to import, and a worker that is killed again and again needs neither.
    import uvicorn

    from flexirl.serving.app import create_app

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="warning", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the service did not start"
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def line(custom_id: str, content: str, **fields: Any) -> str:
    """A line of a batch's input."""
    body = {"model": "echo", "messages": [{"role": "user", "content": content}], **fields}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body})
