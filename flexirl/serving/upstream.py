"""A server elsewhere as a backend: vLLM with the plug-in, or anything that speaks OpenAI's interface.

Immediate requests are handed on as they are. That one is deferred, or promised something else, travels as vLLM's
`vllm_xargs`, in which the plug-in reads class, window and promise, and as `priority`, which vLLM's own scheduler reads.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from typing import Any

import httpx

from flexirl.errors import UserError
from flexirl.serving.backend import Terms
from flexirl.serving.errors import ApiError
from flexirl.workloads.trace import DEFERRED

_CONNECT_S = 10.0
_LOOK_S = 5.0  # between two looks at the server's health
_LONGEST_S = 3600.0  # that an answer is waited for


class UpstreamBackend:
    """See `Backend`. url: of the server, without /v1; key: a bearer token, None for none; hints: whether the server
    takes `priority` and `vllm_xargs`; others are told with OpenAI's `service_tier`, which knows less."""

    def __init__(self, url: str, key: str | None = None, hints: bool = True, most: int = 4096) -> None:
        self.models: tuple[str, ...] = ()
        self.trouble: str | None = "The server behind has not been asked yet."
        self._url, self._hints, self._open = url.rstrip("/").removesuffix("/v1"), hints, {"immediate": 0, "deferred": 0}
        limits = httpx.Limits(max_connections=most, max_keepalive_connections=most)
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        timeout = httpx.Timeout(_LONGEST_S, connect=_CONNECT_S)
        self._client = httpx.AsyncClient(base_url=self._url, headers=headers, limits=limits, timeout=timeout)

    async def start(self) -> None:
        """See `Backend.start`."""
        try:
            answer = await self._client.get("/v1/models")
            answer.raise_for_status()
            self.models = tuple(str(entry["id"]) for entry in answer.json()["data"])
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
            raise UserError(f"upstream={self._url} does not list its models ({error}); start it first.") from None
        if not self.models:
            raise UserError(f"upstream={self._url} serves no model.")
        self.trouble = None
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def close(self) -> None:
        """See `Backend.close`."""
        self._watching.cancel()
        await self._client.aclose()

    async def _watch(self) -> None:
        while True:
            try:
                answer = await self._client.get("/v1/models", timeout=_LOOK_S)
                self.trouble = None if answer.is_success else f"The server behind answers {answer.status_code}."
            except httpx.HTTPError as error:
                self.trouble = f"The server behind does not answer ({type(error).__name__})."
            await asyncio.sleep(_LOOK_S)

    async def answer(self, url: str, fields: dict[str, Any], terms: Terms) -> dict[str, Any]:
        """See `Backend.answer`."""
        try:
            with self._counted(terms):
                answer = await self._client.post(url, json=self._told(fields, terms))
        except httpx.HTTPError as error:
            raise _unreachable(error) from None
        if not answer.is_success:
            raise _handed_on(answer.status_code, answer.content, answer.headers)
        try:
            body = answer.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise ApiError(502, "The server behind answered something other than a JSON object.")
        return body

    async def stream(self, url: str, fields: dict[str, Any], terms: Terms) -> AsyncIterator[dict[str, Any]]:
        """See `Backend.stream`."""
        request = self._client.build_request("POST", url, json=self._told(fields, terms))
        try:
            answer = await self._client.send(request, stream=True)
        except httpx.HTTPError as error:
            raise _unreachable(error) from None
        if not answer.is_success:
            data = await answer.aread()
            await answer.aclose()
            raise _handed_on(answer.status_code, data, answer.headers)
        return self._chunks(answer, terms)

    async def _chunks(self, answer: httpx.Response, terms: Terms) -> AsyncIterator[dict[str, Any]]:
        try:
            with self._counted(terms):
                async for line in answer.aiter_lines():
                    data = line.removeprefix("data:").strip()
                    if data == "[DONE]" or not line.startswith("data:"):
                        continue
                    yield json.loads(data)
        except httpx.HTTPError as error:
            raise _unreachable(error) from None
        finally:
            await answer.aclose()

    def _counted(self, terms: Terms) -> _Counted:
        return _Counted(self._open, "deferred" if terms.request_class == DEFERRED else "immediate")

    def _told(self, fields: dict[str, Any], terms: Terms) -> dict[str, Any]:
        """The body, with what the scheduler behind is to know."""
        deferred = terms.request_class == DEFERRED
        if not self._hints:
            return {**fields, "service_tier": "flex"} if deferred else fields
        fields = {name: value for name, value in fields.items() if name != "service_tier"}
        said: dict[str, Any] = {"flexirl_class": "deferred"} if deferred else {}
        for name in ("ttft_s", "tpot_s", "window_s"):
            value = getattr(terms, name)
            if value is not None and math.isfinite(value):
                said[f"flexirl_{name}"] = value
        if not said:
            return fields
        given = fields.get("vllm_xargs")
        return {
            **fields,
            "priority": int(deferred),
            "vllm_xargs": {**(given if isinstance(given, dict) else {}), **said},
        }

    def figures(self) -> dict[str, Any]:
        """See `Backend.figures`."""
        return {"policy": "of the server behind", "classes": {name: {"open": n} for name, n in self._open.items()}}


class _Counted:
    def __init__(self, counts: dict[str, int], name: str) -> None:
        self._counts, self._name = counts, name

    def __enter__(self) -> None:
        self._counts[self._name] += 1

    def __exit__(self, *_: object) -> None:
        self._counts[self._name] -= 1


def _unreachable(error: httpx.HTTPError) -> ApiError:
    return ApiError(502, f"The server behind does not answer ({type(error).__name__}: {error}).", retry_after_s=1)


def _handed_on(status: int, data: bytes, headers: httpx.Headers) -> ApiError:
    """The error of the server behind as our own."""
    try:
        error = json.loads(data)
        error = error.get("error", error)
        message, code, param = str(error["message"]), error.get("code"), error.get("param")
    except (ValueError, KeyError, TypeError, AttributeError):
        message, code, param = f"The server behind answered {status}.", None, None
    wait = headers.get("retry-after", "")
    return ApiError(status, message, None if code is None else str(code), param, int(wait) if wait.isdigit() else None)
