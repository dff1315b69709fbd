"""Immediate requests: chat and text completions, whole or streamed, and which models there are."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from flexirl.serving.bodies import CHAT, TEXT, ChatBody, TextBody, described, read_json
from flexirl.serving.errors import ApiError
from flexirl.serving.service import Service

router = APIRouter()


@router.post(CHAT, openapi_extra=described(ChatBody))
async def chat(request: Request) -> Response:
    """The next turn of a chat."""
    return await _complete(request, CHAT)


@router.post(TEXT, openapi_extra=described(TextBody))
async def text(request: Request) -> Response:
    """How a text goes on."""
    return await _complete(request, TEXT)


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The models that are served."""
    service: Service = request.app.state.service
    service.tenants.of(request.headers.get("authorization"))
    return {"object": "list", "data": [_model(name) for name in service.backend.models]}


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """One of them."""
    service: Service = request.app.state.service
    service.tenants.of(request.headers.get("authorization"))
    if name not in service.backend.models:
        raise ApiError(404, f"There is no model {name!r} here.", code="model_not_found", param="model")
    return _model(name)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "flexirl"}


async def _complete(request: Request, url: str) -> Response:
    service: Service = request.app.state.service
    tenant = service.tenants.of(request.headers.get("authorization"))
    service.tenants.count(tenant)
    fields = read_json(await request.body())
    if not isinstance(fields, dict):
        raise ApiError(400, "The body is not a JSON object.")
    if service.backend.trouble is not None:
        raise ApiError(503, service.backend.trouble, code="engine_down", retry_after_s=5)
    terms = service.terms(fields.get("service_tier"), tenant)
    if fields.get("stream") is True:
        chunks = await service.backend.stream(url, fields, terms)
        return EventStream(chunks)
    answer = asyncio.ensure_future(service.backend.answer(url, fields, terms))
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not answer.done():  # nobody waits for it any more
            answer.cancel()
            with suppress(asyncio.CancelledError, ApiError):
                await answer
    if answer.cancelled():
        return Response(status_code=499)
    return JSONResponse(answer.result())


async def _gone(request: Request) -> None:
    """Returns when the client has."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events, which closes the chunks they are made of however it ends.

    A client may leave while an event is being sent; the generators would then be closed when they are collected, and
    the engine would go on until then.
    """

    def __init__(self, chunks: AsyncGenerator[dict[str, Any], None]) -> None:
        self._chunks, self._events = chunks, _events(chunks)
        super().__init__(self._events, media_type="text/event-stream", headers={"cache-control": "no-store"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends them, as an application of ASGI."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._chunks.aclose()


async def _events(chunks: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[bytes, None]:
    """What goes wrong on the way is the last of them."""
    try:
        async for chunk in chunks:
            yield b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        yield b"data: " + json.dumps(error.body).encode() + b"\n\n"
