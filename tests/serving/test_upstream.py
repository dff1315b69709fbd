"""A server elsewhere answers: here another of our own, and one that writes down what it is told."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from serving_toys import EchoBackend, line, make_service, serving

from flexirl.errors import UserError
from flexirl.serving.backend import Terms
from flexirl.serving.bodies import CHAT
from flexirl.serving.errors import ApiError
from flexirl.serving.upstream import UpstreamBackend
from flexirl.workloads.trace import DEFERRED

BODY = {"model": "echo", "messages": [{"role": "user", "content": "hello"}]}


def test_both_kinds_of_request_pass_through(tmp_path: Path) -> None:
    behind = EchoBackend()
    with serving(make_service(behind, tmp_path / "behind")) as url:
        front = make_service(UpstreamBackend(url, hints=False), tmp_path / "front")
        with serving(front) as front_url, OpenAI(base_url=f"{front_url}/v1", api_key="x", max_retries=0) as client:
            assert [model.id for model in client.models.list()] == ["echo"]
            answer = client.chat.completions.create(**BODY)  # type: ignore[call-overload]
            assert answer.choices[0].message.content == "hello" and behind.terms[-1].request_class == 0
            refused = httpx.post(f"{front_url}/v1/chat/completions", json={**BODY, "n": 0})
            assert refused.status_code == 400 and refused.json()["error"]["param"] == "n"
            (tmp_path / "in").write_text("\n".join([line("a", "one"), line("b", "fail"), line("c", "busy 1")]))
            file = client.files.create(file=tmp_path / "in", purpose="batch")
            batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")  # type: ignore[arg-type]
            while batch.status != "completed":
                batch = client.batches.retrieve(batch.id)
            assert batch.request_counts is not None and batch.request_counts.completed == 2
            assert behind.terms[-1].request_class == DEFERRED
            status = httpx.get(f"{front_url}/status.json").json()
            assert status["engine"]["classes"]["deferred"]["open"] == 0


@contextmanager
def recording(status: int = 200, data: bytes | None = None) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that answers everything alike, and what it was sent."""
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def _answer(self, status: int, content: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self._answer(200, b'{"data": [{"id": "m"}]}', "application/json")

        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            if data is not None:
                self._answer(status, data, "application/json")
            elif bodies[-1].get("stream"):
                self._answer(
                    200, b': hello\n\ndata: {"x": 1}\n\ndata: {"x": 2}\n\ndata: [DONE]\n\n', "text/event-stream"
                )
            else:
                self._answer(status, b'{"choices": []}', "application/json")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", bodies
    finally:
        server.shutdown()
        server.server_close()


def ask(url: str, terms: Terms, fields: dict[str, Any] = BODY, stream: bool = False) -> Any:
    async def run() -> Any:
        backend = UpstreamBackend(url)
        await backend.start()
        try:
            if not stream:
                return await backend.answer(CHAT, fields, terms)
            return [chunk async for chunk in await backend.stream(CHAT, {**fields, "stream": True}, terms)]
        finally:
            await backend.close()

    return asyncio.run(run())


def test_the_engine_behind_is_told_what_a_request_is_worth() -> None:
    with recording() as (url, bodies):
        ask(url, Terms())
        ask(url, Terms(DEFERRED, window_s=60.0))
        ask(url, Terms(ttft_s=0.5, tpot_s=0.05), {**BODY, "vllm_xargs": {"mine": 1}, "service_tier": "priority"})
    assert bodies[0] == BODY
    assert bodies[1] == {**BODY, "priority": 1, "vllm_xargs": {"flexirl_class": "deferred", "flexirl_window_s": 60.0}}
    hints = {"mine": 1, "flexirl_ttft_s": 0.5, "flexirl_tpot_s": 0.05}
    assert bodies[2] == {**BODY, "priority": 0, "vllm_xargs": hints}


def test_streams_are_handed_on_chunk_by_chunk() -> None:
    with recording() as (url, _):
        assert ask(url, Terms(), stream=True) == [{"x": 1}, {"x": 2}]


@pytest.mark.parametrize(
    "status, data, message",
    [
        (429, b'{"error": {"message": "too much", "code": 429}}', "too much"), (400, b'{"message": "bad"}', "bad"),
        (500, b"<html>", "answered 500"), (503, b"[]", "answered 503"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_of_the_server_behind_keep_their_status(status: int, data: bytes, message: str, stream: bool) -> None:
    with recording(status, data) as (url, _), pytest.raises(ApiError, match=message) as refused:
        ask(url, Terms(), stream=stream)
    assert refused.value.status == status


@pytest.mark.parametrize("data", [b"[]", b"<html>"])
def test_an_answer_that_is_none_is_the_fault_of_the_server_behind(data: bytes) -> None:
    with recording(200, data) as (url, _), pytest.raises(ApiError, match="other than a JSON object") as refused:
        ask(url, Terms())
    assert refused.value.status == 502


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="does not list its models"):
        ask("http://127.0.0.1:9", Terms())
