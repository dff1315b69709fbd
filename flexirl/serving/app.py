"""The web application: its routes put together, and whatever goes wrong in one answered in OpenAI's shape."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from flexirl.serving import routes_batches, routes_completions, routes_operation
from flexirl.serving.errors import ApiError
from flexirl.serving.service import Service

_LOG = logging.getLogger(__name__)
_MOST_BODY = 32 << 20  # bytes of any body but a file's
_FORM = 1 << 20  # bytes that the form around a file takes at most

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


def create_app(service: Service) -> FastAPI:
    """The application of a service, which starts and ends with it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.backend.start()
        try:
            await service.runner.start()
            yield
        finally:
            await service.runner.close()
            await service.backend.close()
            service.store.close()

    app = FastAPI(title="FlexiRL", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    for routes in (routes_completions, routes_batches, routes_operation):
        app.include_router(routes.router)

    @app.exception_handler(ApiError)
    async def answer_error(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def answer_validation(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return JSONResponse(ApiError(400, f"{name}: {first['msg']}.", code="invalid_value", param=name).body, 400)

    @app.exception_handler(HTTPException)
    async def answer_http(request: Request, error: HTTPException) -> JSONResponse:
        message = error.detail if error.status_code != 404 else f"There is nothing at {request.url.path}."
        return JSONResponse(ApiError(error.status_code, str(message)).body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def answer_failure(request: Request, error: Exception) -> JSONResponse:
        _LOG.error("%s %s has failed", request.method, request.url.path, exc_info=error)
        return JSONResponse(ApiError(500, "The service failed at this request.").body, 500)

    if service.tenants.open:
        app.add_middleware(OwnPagesOnly)
    app.add_middleware(BodyLimit, most=_MOST_BODY, of_files=service.most_bytes + _FORM)
    return app


class OwnPagesOnly:
    """Where no key is needed, refuses what a page from elsewhere has a browser on this machine send."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Receive, send: Any) -> None:
        """See ASGI."""
        headers = dict(scope.get("headers", ()))
        host, origin = headers.get(b"host", b"").decode("latin-1"), headers.get(b"origin", b"").decode("latin-1")
        # A name of somebody else's may be made to lead here.
        named = _name_in(host)
        if scope["type"] == "http" and (not is_local(named) or (origin and origin.partition("://")[2] != host)):
            why = (
                f"Without API keys only this machine's own pages may ask, not {origin or host}; flexirl key makes one."
            )
            await JSONResponse(ApiError(403, why).body, 403)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _name_in(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def is_local(name: str) -> bool:
    """True for a name or an address of this machine alone."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


class BodyLimit:
    """Refuses bodies that are too long before they are read, whatever their header says of their length."""

    def __init__(self, app: Any, most: int, of_files: int) -> None:
        self._app, self._most, self._of_files = app, most, of_files

    async def __call__(self, scope: Any, receive: Receive, send: Any) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most = self._of_files if scope["path"] == "/v1/files" else self._most
        refusal = ApiError(413, f"The body has more than {most:,} bytes; send less.", code="too_large")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > most:
            await JSONResponse(refusal.body, 413, {"connection": "close"})(scope, receive, send)
            return
        read = 0

        async def counted() -> MutableMapping[str, Any]:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most:
                raise refusal
            return message

        await self._app(scope, counted, send)
