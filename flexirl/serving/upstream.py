"""A server elsewhere as a backend: vLLM with the plug-in, or anything that speaks OpenAI's interface.

Immediate requests are handed on as they are. That one is deferred, or promised something else, travels as vLLM's
`vllm_xargs`, in which the plug-in reads class, window and promise, and as `priority`, which vLLM's own scheduler reads.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator
from typing import Any

import aiohttp

from flexirl.errors import UserError
from flexirl.serving.backend import Terms
from flexirl.serving.errors import ApiError
from flexirl.workloads.trace import DEFERRED

_CONNECT_S = 10.0
_LOOK_S = 5.0  # between two looks at the server's health
_LONGEST_EVENT = 4 << 20  # bytes of a streamed event
_LONGEST_S = 3600.0  # that an answer is waited for


class UpstreamBackend:
    """See `Backend`. url: of the server, without /v1; key: a bearer token, None for none; hints: whether the server
    takes `priority` and `vllm_xargs`; others are told with OpenAI's `service_tier`, which knows less."""

    def __init__(self, url: str, key: str | None = None, hints: bool = True) -> None:
        self.models: tuple[str, ...] = ()
        self.trouble: str | None = "The server behind has not been asked yet."
        self._url, self._hints, self._open = url.rstrip("/").removesuffix("/v1"), hints, {"immediate": 0, "deferred": 0}
        self._headers = {} if key is None else {"authorization": f"Bearer {key}"}

    async def start(self) -> None:
        """See `Backend.start`."""
        timeout = aiohttp.ClientTimeout(total=_LONGEST_S, sock_connect=_CONNECT_S)
        connector = aiohttp.TCPConnector(limit=0)  # how many requests are open is not this one's to say
        self._session = aiohttp.ClientSession(
            headers=self._headers, timeout=timeout, connector=connector, read_bufsize=_LONGEST_EVENT
        )
        try:
            async with self._session.get(f"{self._url}/v1/models") as answer:
                answer.raise_for_status()
                self.models = tuple(str(entry["id"]) for entry in (await answer.json())["data"])
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError) as error:
            await self._session.close()
            raise UserError(f"upstream={self._url} does not list its models ({error}); start it first.") from None
        if not self.models:
            raise UserError(f"upstream={self._url} serves no model.")
        self.trouble = None
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def close(self) -> None:
        """See `Backend.close`."""
        self._watching.cancel()
        await self._session.close()

    async def _watch(self) -> None:
        while True:
            try:
                timeout = aiohttp.ClientTimeout(_LOOK_S)
                async with self._session.get(f"{self._url}/v1/models", timeout=timeout) as answer:
                    self.trouble = None if answer.ok else f"The server behind answers {answer.status}."
            except (aiohttp.ClientError, TimeoutError) as error:
                self.trouble = f"The server behind does not answer ({type(error).__name__})."
            await asyncio.sleep(_LOOK_S)

    async def answer(self, url: str, fields: dict[str, Any], terms: Terms) -> dict[str, Any]:
        """See `Backend.answer`."""
        try:
            with self._counted(terms):
                async with self._session.post(self._url + url, json=self._told(fields, terms)) as answer:
                    data = await answer.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _unreachable(error) from None
        if not answer.ok:
            raise _handed_on(answer, data)
        try:
            body = json.loads(data)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise ApiError(502, "The server behind answered something other than a JSON object.")
        return body

    async def stream(self, url: str, fields: dict[str, Any], terms: Terms) -> AsyncGenerator[dict[str, Any], None]:
        """See `Backend.stream`."""
        try:
            answer = await self._session.post(self._url + url, json=self._told(fields, terms))
            if not answer.ok:
                async with answer:
                    raise _handed_on(answer, await answer.read())
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _unreachable(error) from None
        chunks = self._chunks(answer, terms)
        await anext(chunks)  # from now on its end gives up the answer, even if nobody reads from it
        return chunks

    async def _chunks(self, answer: aiohttp.ClientResponse, terms: Terms) -> AsyncGenerator[dict[str, Any], None]:
        try:
            with self._counted(terms):
                yield {}
                async for line in answer.content:
                    data = line.removeprefix(b"data:").strip()
                    if data == b"[DONE]" or not line.startswith(b"data:"):
                        continue
                    yield json.loads(data)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise _unreachable(error) from None
        finally:
            answer.close()

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


def _unreachable(error: Exception) -> ApiError:
    return ApiError(502, f"The server behind does not answer ({type(error).__name__}: {error}).", retry_after_s=1)


def _handed_on(answer: aiohttp.ClientResponse, data: bytes) -> ApiError:
    """The error of the server behind as our own."""
    try:
        error = json.loads(data)
        error = error.get("error", error)
        message, code, param = str(error["message"]), error.get("code"), error.get("param")
    except (ValueError, KeyError, TypeError, AttributeError):
        message, code, param = f"The server behind answered {answer.status}.", None, None
    wait = answer.headers.get("retry-after", "")
    wait_s = int(wait) if wait.isdigit() else None
    return ApiError(answer.status, message, None if code is None else str(code), param, wait_s)
