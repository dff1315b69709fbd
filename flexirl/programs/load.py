"""Program: plays a workload against a server: `python -m flexirl.load url=http://127.0.0.1:8000 workload=tiny`."""

from __future__ import annotations

import asyncio
import csv
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
from omegaconf import DictConfig

from flexirl.envs.fleet import Task
from flexirl.errors import UserError
from flexirl.experiments.comparison import Row, episodes, load_of, table, write_leaderboard
from flexirl.experiments.configuration import load_task
from flexirl.experiments.program import output_folder
from flexirl.experiments.records import record_run
from flexirl.experiments.values import count_of, seed_of
from flexirl.progress import progress_bar
from flexirl.runtime.profile.capacity import shares_lost
from flexirl.serving.load import Play, figures
from flexirl.serving.tenants import read_key
from flexirl.workloads.trace import IMMEDIATE, Trace

_ANSWER_S = 600.0  # waited for


def run(config: DictConfig) -> None:
    """Plays, prints and writes; raises UserError for bad configuration, and for a server that does not answer."""
    folder, seed = output_folder(), seed_of(config.seed)
    task, tokens = load_task(config), count_of(config.tokens, "tokens")
    key = read_key(config.key_file)
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    (trace,) = episodes(task, 1, seed)
    record_run(config, "load", folder)
    with progress_bar(len(trace), " requests", config.progress) as progress:
        name, play, seen = asyncio.run(
            _play(str(config.url), headers, config.name, trace, task.duration_s(), tokens, seed, progress.update)
        )
    row = row_of(name, task, trace, seed, play, seen)
    print(table([row]))
    write_leaderboard([row], folder)
    with open(folder / "requests.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(seen.dtype.names or ())
        writer.writerows(seen.tolist())
    print(f"{row['refused']} requests were refused; written to {folder}")


async def _play(
    url: str,
    headers: dict[str, str],
    name: str | None,
    trace: Trace,
    duration_s: float,
    tokens: int,
    seed: int,
    told: Callable[[int], object],
) -> tuple[str, Play, np.ndarray]:
    """The name of the row, the play, and what was seen in it."""
    limits, timeout = httpx.Limits(max_connections=None), httpx.Timeout(_ANSWER_S, connect=10.0)
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=timeout) as client:
        try:
            models = (await client.get("/v1/models")).raise_for_status().json()["data"]
            policy = await client.get("/admin/policy")
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError) as error:
            raise UserError(f"url={url} does not list its models ({error}); start a server there.") from None
        if name is None:
            name = str(policy.json()["policy"]) if policy.is_success else "server"
        play = Play(client, str(models[0]["id"]), trace, duration_s, tokens, seed, told)
        return name, play, await play.run()


def row_of(name: str, task: Task, trace: Trace, seed: int, play: Play, seen: np.ndarray) -> Row:
    """The row of the leaderboard."""
    first: dict[str, Any] = {
        "policy": name, "workload": task.scenario.name, "engine": "server", "load": load_of(task, trace), "seed": seed,
    }  # fmt: skip
    lost = shares_lost(task.engine, trace.as_asked().of_class(IMMEDIATE))
    return {**first, **lost, **figures(play, seen, task.slo, task.scenario.warmup_s, task.prices)}
