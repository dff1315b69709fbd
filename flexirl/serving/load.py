"""Plays a trace against a server, as its clients would: immediate requests as streams, deferred ones as batches.

Prompts are token numbers to /v1/completions. Where the trace says that prompts begin alike, they do; a turn of a
conversation is sent when the answer before it has come. What a client cannot see (when a line of a batch was answered)
is taken from how many were, when it asked.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from flexirl.errors import UserError
from flexirl.runtime.scheduler.accounts import Prices, of_requests
from flexirl.runtime.scheduler.state import FINISHED, FUTURE, REJECTED, WAITING
from flexirl.serving.batch_input import MOST_LINES
from flexirl.serving.bodies import TEXT
from flexirl.workloads.slo import SLO
from flexirl.workloads.trace import DEFERRED, IMMEDIATE, Trace

_LOOK_S = 0.5  # between two looks at a batch
_ENDLESS = "24h"  # window of deferred requests that have none

# What was seen of a request; the names are those of the scheduler's records, so that the accounts read both.
RECORD = np.dtype(
    [
        ("request_class", "i4"),
        ("tenant", "i4"),
        ("prompt_tokens", "i4"),
        ("output_tokens", "i4"),
        ("generated", "i4"),  # output tokens that came
        ("cached_tokens", "i4"),  # of the prompt, as the server says
        ("status", "i4"),
        ("missed", "i4"),  # 1: the promise was broken
        ("arrival_s", "f8"),  # seconds since the start, as all times; inf where it has not happened
        ("ttft_deadline_s", "f8"),
        ("deadline_s", "f8"),
        ("first_token_s", "f8"),
        ("finish_s", "f8"),
    ]
)


@dataclass
class Play:
    """One run against the server of `client`; tokens: numbers below this are tokens of the model.

    told: called with how many further requests have ended. `records` are what was seen, a row per request of the trace.
    """

    client: httpx.AsyncClient
    model: str
    trace: Trace
    duration_s: float
    tokens: int
    seed: int
    told: Callable[[int], object]

    def __post_init__(self) -> None:
        rows = self.trace.rows
        self.records = np.zeros(len(rows), RECORD)
        for name in ("request_class", "tenant", "prompt_tokens", "output_tokens"):
            self.records[name] = rows[name]
        for name in ("arrival_s", "ttft_deadline_s", "deadline_s", "first_token_s", "finish_s"):
            self.records[name] = np.inf
        self.records["status"] = FUTURE

    async def run(self) -> np.ndarray:
        """Plays for `duration_s` seconds of wall time: `records` (of `RECORD`) at their end, of what had arrived."""
        loop = asyncio.get_running_loop()
        self._began_s = loop.time()
        self._ended = [loop.create_future() for _ in self.trace.rows]
        immediate = np.flatnonzero(self.trace.rows["request_class"] == IMMEDIATE).tolist()
        tasks = [loop.create_task(self._visit(r)) for r in immediate]
        tasks += [loop.create_task(self._submit(group)) for group in self._groups()]
        await asyncio.sleep(max(self._began_s + self.duration_s - loop.time(), 0.0))
        faults = [task.exception() for task in tasks if task.done() and not task.cancelled()]
        seen = self.records[self.records["status"] != FUTURE].copy()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for fault in faults:
            if fault is not None:
                raise fault
        return seen

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time() - self._began_s

    def _arrive(self, r: int) -> None:
        row, record = self.trace.rows[r], self.records[r]
        record["status"], record["arrival_s"] = WAITING, self._now_s()
        record["ttft_deadline_s"] = record["arrival_s"] + row["ttft_slo_s"]
        record["deadline_s"] = record["arrival_s"] + row["window_s"]

    # ---------------------------------------------------------------------------------------------------- immediate

    async def _visit(self, r: int) -> None:
        """One immediate request, from its arrival to its end."""
        row, record = self.trace.rows[r], self.records[r]
        if row["follows"]:
            await self._ended[r - int(row["follows"])]
            await asyncio.sleep(float(row["delay_s"]))
        else:
            await asyncio.sleep(max(float(row["arrival_s"]) - self._now_s(), 0.0))
        self._arrive(r)
        body = self._body(r) | {"stream": True, "stream_options": {"include_usage": True}}
        try:
            async with self.client.stream("POST", TEXT, json=body) as answer:
                if not answer.is_success:
                    record["status"], record["finish_s"] = REJECTED, self._now_s()
                    record["missed"] = 1
                    return
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        self._hear(r, json.loads(line[6:]))
        except httpx.HTTPError:
            pass  # it stays without an end
        if record["generated"] > 0:
            self._finish(r)

    def _hear(self, r: int, chunk: dict[str, Any]) -> None:
        record = self.records[r]
        if chunk.get("choices") and record["first_token_s"] == np.inf:
            record["first_token_s"] = self._now_s()
        usage = chunk.get("usage")
        if usage:
            record["generated"] = usage["completion_tokens"]
            record["cached_tokens"] = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0

    def _finish(self, r: int) -> None:
        """An answer has come to its end: whether it came as promised."""
        row, record = self.trace.rows[r], self.records[r]
        record["status"], record["finish_s"] = FINISHED, self._now_s()
        due_s = record["first_token_s"] + float(row["tpot_slo_s"]) * (record["generated"] - 1)
        record["deadline_s"] = min(record["deadline_s"], due_s)
        late = record["first_token_s"] > record["ttft_deadline_s"] or record["finish_s"] > record["deadline_s"]
        record["missed"] = int(late)
        self._ended[r].set_result(None)
        self.told(1)

    # ----------------------------------------------------------------------------------------------------- deferred

    def _groups(self) -> Iterator[list[int]]:
        """Deferred requests that come together and are due together, as many as a batch may have."""
        rows = self.trace.rows
        groups: dict[tuple[float, float], list[int]] = {}
        for r in np.flatnonzero(rows["request_class"] == DEFERRED).tolist():
            groups.setdefault((float(rows["arrival_s"][r]), float(rows["window_s"][r])), []).append(r)
        for group in groups.values():
            for first in range(0, len(group), MOST_LINES):
                yield group[first : first + MOST_LINES]

    async def _submit(self, group: list[int]) -> None:
        """A batch, from its upload until its end or that of the run, when it is cancelled."""
        row = self.trace.rows[group[0]]
        await asyncio.sleep(max(float(row["arrival_s"]) - self._now_s(), 0.0))
        lines = await asyncio.to_thread(self._lines, group)
        for r in group:
            self._arrive(r)
        upload = {"file": ("load.jsonl", lines)}
        file = await self._call("POST", "/v1/files", data={"purpose": "batch"}, files=upload)
        window = _ENDLESS if row["window_s"] == np.inf else f"{max(int(row['window_s']), 1)}s"
        fields = {"input_file_id": file["id"], "endpoint": TEXT, "completion_window": window}
        batch = await self._call("POST", "/v1/batches", json=fields)
        answered, failed = 0, 0
        try:
            while answered + failed < len(group):
                await asyncio.sleep(_LOOK_S)
                batch = await self._call("GET", f"/v1/batches/{batch['id']}")
                counts = batch["request_counts"]
                # Which ones were answered is told at the end only; up to then they count in their order.
                for r in group[answered : counts["completed"]]:
                    self._answered(r)
                answered, failed = counts["completed"], counts["failed"]
                if batch["status"] in ("failed", "expired", "cancelled"):
                    return
        finally:
            if answered + failed < len(group):
                await self.client.post(f"/v1/batches/{batch['id']}/cancel")

    def _answered(self, r: int) -> None:
        record = self.records[r]
        record["status"], record["finish_s"] = FINISHED, self._now_s()
        record["generated"] = record["output_tokens"]
        record["missed"] = int(record["finish_s"] > record["deadline_s"])
        self.told(1)

    async def _call(self, method: str, url: str, **request: Any) -> dict[str, Any]:
        answer = await self.client.request(method, url, **request)
        if not answer.is_success:
            raise UserError(f"The server answered {answer.status_code} to {method} {url}: {answer.text[:200]}")
        fields: dict[str, Any] = answer.json()
        return fields

    def _lines(self, group: list[int]) -> bytes:
        lines = ({"custom_id": str(r), "method": "POST", "url": TEXT, "body": self._body(r)} for r in group)
        return "\n".join(map(json.dumps, lines)).encode()

    # ------------------------------------------------------------------------------------------------------- prompts

    def _body(self, r: int) -> dict[str, Any]:
        row = self.trace.rows[r]
        return {
            "model": self.model, "prompt": self.prompt(r), "max_tokens": int(row["output_tokens"]),
            "temperature": 0, "ignore_eos": True,
        }  # fmt: skip

    def prompt(self, r: int) -> list[int]:
        """Token numbers: the same as in other prompts as far as the trace says so, else its own."""
        row = self.trace.rows[r]
        length, end = int(row["prompt_tokens"]), 0
        parts = []
        first = int(row["content_first"])
        for content in self.trace.contents[first : first + int(row["content_count"])]:
            parts.append(self._draw(int(content["origin"]), min(int(content["end"]), length) - end))
            end = min(int(content["end"]), length)
        parts.append(self._draw((self.seed, r), length - end))
        return [int(token) for token in np.concatenate(parts)]

    def _draw(self, seed: int | tuple[int, int], count: int) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, self.tokens, max(count, 0))


def figures(play: Play, seen: np.ndarray, slo: SLO, since_s: float, prices: Prices) -> dict[str, Any]:
    """A row of the leaderboard, as far as clients can know it; None where they cannot."""
    span_s = play.duration_s - since_s
    row: dict[str, Any] = dict(of_requests(seen, since_s, play.duration_s, slo.patience, prices))
    answered = seen[(seen["request_class"] == IMMEDIATE) & (seen["status"] == FINISHED)]
    prompt = int(answered["prompt_tokens"].sum())
    done = seen[(seen["request_class"] == DEFERRED) & (seen["status"] == FINISHED) & (seen["finish_s"] >= since_s)]
    row["deferred_tokens_per_s"] = int((done["prompt_tokens"] + done["output_tokens"]).sum()) / span_s
    row["immediate_cached"] = int(answered["cached_tokens"].sum()) / prompt if prompt else None
    row["refused"] = int((seen["status"] == REJECTED).sum())
    row["preemptions"] = row["kv_utilisation"] = None
    return row
