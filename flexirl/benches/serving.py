"""Program: what serving over HTTP costs: `python -m flexirl.bench serving [--quick] [--output PATH.json]`.

The tiny model on a CPU, PyTorch on one thread, server and clients on one machine. What a streamed token and a line of a
batch cost beside the same requests on the engine alone; and how long immediate requests wait with and without a full
queue of batches behind them, by policy.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from flexirl.benches.figures import Row, report
from flexirl.policies.registry import make_policy
from flexirl.runtime.live.engine import LiveEngine
from flexirl.runtime.live.options import Options
from flexirl.runtime.live.requests import Completion, Request, Update
from flexirl.runtime.live.sampling import Sampling
from flexirl.runtime.models.executor import ModelExecutor, fit_profile
from flexirl.runtime.models.loading import load_model
from flexirl.runtime.profile.engine import load_profile
from flexirl.serving.bodies import TEXT
from flexirl.workloads.slo import SLO
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

POLICIES = ("keep_cache", "pretrained", "vllm_priority")
STREAMS, STREAMED_TOKENS = 16, 128
LINES, LINE_TOKENS = 400, 16
PROMPT_TOKENS = 64
RATE_PER_S, ANSWER_TOKENS = 3.0, 24  # of immediate requests beside batches
QUEUE = 5000  # lines of a full queue
_START_S = 120.0


@contextmanager
def server(policy: str) -> Iterator[str]:
    """A server in a process of its own: its URL."""
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        words = [f"policy={policy}", f"server.port={port}", "server.data_dir=data", "server.drain_s=1"]
        command = [sys.executable, "-m", "flexirl.serve", *words, "hydra.run.dir=run", "refuse_after=null"]
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL) as process:
            url = f"http://127.0.0.1:{port}"
            try:
                _wait_for(url, process)
                yield url
            finally:
                process.terminate()


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    until_s = time.monotonic() + _START_S
    while time.monotonic() < until_s and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=1).is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.1)
    raise RuntimeError("the server did not start")


def _prompt(rng: np.random.Generator) -> list[int]:
    return [int(token) for token in rng.integers(0, 256, PROMPT_TOKENS)]


def _body(prompt: Sequence[int], max_tokens: int, **more: Any) -> dict[str, Any]:
    return {"prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **more}


async def _stream(client: httpx.AsyncClient, body: dict[str, Any]) -> list[float]:
    """When each event of an answer came, in seconds since it was asked for."""
    began_s, came_s = time.perf_counter(), []
    async with client.stream("POST", TEXT, json=body | {"stream": True}) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                came_s.append(time.perf_counter() - began_s)
    return came_s


async def _streams(url: str, prompts: Sequence[Sequence[int]]) -> float:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        await _stream(client, _body(prompts[0], 4))
        began_s = time.perf_counter()
        await asyncio.gather(*(_stream(client, _body(prompt, STREAMED_TOKENS)) for prompt in prompts))
        return time.perf_counter() - began_s


def _submit(client: httpx.Client, prompts: Sequence[Sequence[int]], max_tokens: int) -> str:
    lines = [
        json.dumps({"custom_id": str(i), "method": "POST", "url": TEXT, "body": _body(prompt, max_tokens)})
        for i, prompt in enumerate(prompts)
    ]
    upload = {"file": ("in.jsonl", "\n".join(lines).encode())}
    file = client.post("/v1/files", data={"purpose": "batch"}, files=upload).raise_for_status().json()
    fields = {"input_file_id": file["id"], "endpoint": TEXT, "completion_window": "24h"}
    return str(client.post("/v1/batches", json=fields).raise_for_status().json()["id"])


def _batch_s(url: str, prompts: Sequence[Sequence[int]]) -> float:
    with httpx.Client(base_url=url, timeout=60) as client:
        began_s = time.perf_counter()
        batch_id = _submit(client, prompts, LINE_TOKENS)
        while client.get(f"/v1/batches/{batch_id}").json()["status"] != "completed":
            time.sleep(0.01)
        return time.perf_counter() - began_s


class _Alone:
    """The engine in this process, without a server."""

    def __init__(self) -> None:
        model = load_model("tiny")
        executor = ModelExecutor(model, fit_profile(model, load_profile("cpu-tiny")))
        self._ended = threading.Semaphore(0)
        options = Options(tokenizer=model.tokenizer, on_end=self._end)
        self._engine = LiveEngine(executor, make_policy(POLICIES[0]), SLO(ttft_s=1.0, tpot_s=0.05), options)
        self._thread = threading.Thread(target=self._engine.run)
        self._thread.start()
        self._number = 0
        self.seconds([[1, 2, 3]], 4, listen=True)

    def _end(self, _: Completion) -> None:
        self._ended.release()

    def seconds(self, prompts: Sequence[Sequence[int]], max_tokens: int, listen: bool) -> float:
        """How long these requests take together."""

        def hear(_: Update) -> None:
            """As little as can be done with a token."""

        began_s = time.perf_counter()
        for prompt in prompts:
            self._number += 1
            self._engine.add_request(
                Request(
                    str(self._number), prompt, max_tokens, IMMEDIATE if listen else DEFERRED,
                    Sampling(ignore_eos=True), listener=hear if listen else None,
                )
            )  # fmt: skip
        for _ in prompts:
            self._ended.acquire()
        return time.perf_counter() - began_s

    def stop(self) -> None:
        """Ends its thread."""
        self._engine.stop()
        self._thread.join()


def overhead(repeats: int) -> Iterator[Row]:
    """What the way over HTTP, and through files and database, adds; alone and served in turns, medians."""
    rng = np.random.default_rng(0)
    alone, streamed, alone_lines, batched = [], [], [], []
    engine = _Alone()
    with server(POLICIES[0]) as url:
        for _ in range(repeats):  # new prompts each time, or they would be found in the cache
            alone.append(engine.seconds([_prompt(rng) for _ in range(STREAMS)], STREAMED_TOKENS, listen=True))
            streamed.append(asyncio.run(_streams(url, [_prompt(rng) for _ in range(STREAMS)])))
            alone_lines.append(engine.seconds([_prompt(rng) for _ in range(LINES)], LINE_TOKENS, listen=False))
            batched.append(_batch_s(url, [_prompt(rng) for _ in range(LINES)]))
    engine.stop()
    tokens = STREAMS * STREAMED_TOKENS
    yield Row("engine_alone_tokens_per_s", tokens / float(np.median(alone)), "tokens/s")
    yield Row("streamed_tokens_per_s", tokens / float(np.median(streamed)), "tokens/s")
    added_s = float(np.median(streamed) - np.median(alone)) / tokens
    yield Row("added_per_streamed_token", 1e6 * added_s, "microseconds")
    yield Row("engine_alone_requests_per_s", LINES / float(np.median(alone_lines)), "requests/s")
    yield Row("batch_lines_per_s", LINES / float(np.median(batched)), "lines/s")
    yield Row("added_per_batch_line", 1e3 * float(np.median(batched) - np.median(alone_lines)) / LINES, "milliseconds")


async def _visit(url: str, seconds: float, seed: int) -> tuple[list[float], list[float]]:
    """Immediate requests that arrive as a Poisson process: times to first token, and per further one."""
    rng = np.random.default_rng(seed)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None)) as client:
        began_s, tasks, at_s = time.perf_counter(), [], 0.0
        while (at_s := at_s + rng.exponential(1 / RATE_PER_S)) < seconds:
            await asyncio.sleep(max(began_s + at_s - time.perf_counter(), 0.0))
            tasks.append(asyncio.create_task(_stream(client, _body(_prompt(rng), ANSWER_TOKENS))))
        answers = await asyncio.gather(*tasks)
    return [came[0] for came in answers], [(came[-1] - came[0]) / (ANSWER_TOKENS - 1) for came in answers]


def beside_batches(seconds: float) -> Iterator[Row]:
    """Immediate requests with nothing else to do, then with a full queue behind them; and what is done of it."""
    rng = np.random.default_rng(1)
    for policy in POLICIES:
        with server(policy) as url:
            asyncio.run(_visit(url, 3.0, seed=0))
            figures = {"alone": asyncio.run(_visit(url, seconds, seed=1))}
            with httpx.Client(base_url=url, timeout=60) as client:
                batch_id = _submit(client, [_prompt(rng) for _ in range(QUEUE)], LINE_TOKENS)
                while client.get(f"/v1/batches/{batch_id}").json()["request_counts"]["completed"] == 0:
                    time.sleep(0.05)
                before = client.get(f"/v1/batches/{batch_id}").json()["request_counts"]["completed"]
                began_s = time.perf_counter()
                figures["full_queue"] = asyncio.run(_visit(url, seconds, seed=1))
                after = client.get(f"/v1/batches/{batch_id}").json()["request_counts"]["completed"]
                lines_per_s = (after - before) / (time.perf_counter() - began_s)
        for name, (ttft_s, tpot_s) in figures.items():
            for percent in (50, 99):
                yield Row(
                    f"{policy}_{name}_ttft_p{percent}", 1e3 * float(np.percentile(ttft_s, percent)), "milliseconds"
                )
            yield Row(f"{policy}_{name}_tpot_p99", 1e3 * float(np.percentile(tpot_s, 99)), "milliseconds")
        yield Row(f"{policy}_lines_per_s_beside", lines_per_s, "lines/s")


def run(quick: bool) -> Iterator[Row]:
    """All figures."""
    yield from overhead(1 if quick else 5)
    yield from beside_batches(8.0 if quick else 40.0)


def main(arguments: Sequence[str]) -> None:
    """Does what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m flexirl.bench serving", description="Measures the server.")
    parser.add_argument("--quick", action="store_true", help="shorter")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench_serving.json"), help="where figures go")
    options = parser.parse_args(arguments)
    report(run(options.quick), options.output)
