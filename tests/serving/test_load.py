"""The load generator sends what a trace says, when it says so, and sees what the server did."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import numpy as np
import pytest
from programs import error, run
from served import Served

from flexirl.runtime.models.loading import load_model
from flexirl.runtime.scheduler.accounts import Prices
from flexirl.runtime.scheduler.state import FINISHED
from flexirl.serving.load import Play, figures
from flexirl.workloads.slo import SLO
from flexirl.workloads.trace import CONTENT, DEFERRED, IMMEDIATE, Trace, empty_rows

SECONDS = 6.0


def trace() -> Trace:
    """A conversation of three turns, ten single requests, and six deferred ones in two batches."""
    rows = empty_rows(19)
    rows["prompt_tokens"], rows["output_tokens"], rows["max_tokens"] = 40, 8, 8
    rows["ttft_slo_s"], rows["tpot_slo_s"], rows["window_s"] = 1.0, 0.5, np.inf
    rows["arrival_s"] = np.linspace(0.0, 2.0, 19)
    contents = np.zeros(9, CONTENT)
    contents["origin"] = [7, 1, 2, 7, 1, 2, 7, 1, 2]
    contents["end"] = [24, 56, 90] * 3
    for turn, r in enumerate((0, 5, 10)):
        rows["prompt_tokens"][r] = (40, 80, 120)[turn]
        rows["content_first"][r], rows["content_count"][r] = 3 * turn, 3
        if turn:
            rows["follows"][r], rows["delay_s"][r] = 5, 0.1
    rows["request_class"][13:] = DEFERRED
    rows["ttft_slo_s"][13:] = rows["tpot_slo_s"][13:] = np.inf
    rows["arrival_s"][13:] = [1.0] * 4 + [1.5] * 2
    rows["window_s"][17:] = 60.0
    return Trace(rows, "a test", 1, contents=contents)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    served = Served(load_model("tiny"), tmp_path_factory.mktemp("load"))
    yield served
    served.close()


def test_what_clients_see_is_what_the_trace_says(served: Served) -> None:
    told: list[int] = []

    async def play() -> tuple[Play, np.ndarray]:
        async with httpx.AsyncClient(base_url=served.url, timeout=30) as client:
            play = Play(client, "tiny", trace(), SECONDS, 256, 0, told.append)
            return play, await play.run()

    play, seen = asyncio.run(play())  # type: ignore[assignment, func-returns-value, operator, misc]
    assert len(seen) == 19 == sum(told) and (seen["status"] == FINISHED).all()
    assert (seen["generated"] == 8).all() and not seen["missed"].any()
    assert (seen["first_token_s"][:13] <= seen["finish_s"][:13]).all()
    turns = seen[[0, 5, 10]]
    assert (turns["arrival_s"][1:] >= turns["finish_s"][:-1] + 0.1).all()
    others = np.setdiff1d(np.arange(13), [5, 10])
    assert np.abs(seen["arrival_s"][others] - play.trace.rows["arrival_s"][others]).max() < 0.5
    # Blocks have 16 tokens: of the turn before, all full ones that both prompts have.
    assert turns["cached_tokens"].tolist() == [0, 32, 80] and not seen["cached_tokens"][1:5].any()
    assert len({tuple(play.prompt(r)) for r in range(19)}) == 19 and play.prompt(10)[:90] != play.prompt(1)[:90]
    with httpx.Client(base_url=served.url) as client:
        batches = client.get("/v1/batches").json()["data"]
    assert sorted((batch["request_counts"]["total"], batch["completion_window"]) for batch in batches) == [
        (2, "60s"), (4, "24h")
    ]  # fmt: skip

    row = figures(play, seen, SLO(1.0, 0.5), 0.0, Prices())
    prompt, output = seen["prompt_tokens"], seen["output_tokens"]
    worth = np.where(seen["request_class"] == DEFERRED, 0.5, 1.0) * (prompt + 4 * output)
    assert row["value_per_s"] == row["revenue_per_s"] == pytest.approx(worth.sum() / SECONDS)
    assert row["immediate_attainment"] == row["deferred_on_time"] == 1.0 and row["refused"] == 0
    assert row["deferred_tokens_per_s"] == pytest.approx(6 * 48 / SECONDS)
    immediate = seen["request_class"] == IMMEDIATE
    assert row["immediate_cached"] == pytest.approx(112 / prompt[immediate].sum())
    waits = (seen["first_token_s"] - seen["arrival_s"])[immediate]
    assert row["ttft_p99_s"] == pytest.approx(np.percentile(waits, 99))


def test_the_program_writes_a_row(served: Served, tmp_path: Path) -> None:
    done = run(
        tmp_path, "load", f"url={served.url}", "workload=tiny", "workload.duration_s=3", "workload.warmup_s=0.5",
        "hydra.run.dir=.", "progress=false",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "qoserve" in done.stdout and "0 requests were refused" in done.stdout
    header = (tmp_path / "leaderboard.csv").read_text().splitlines()[0]
    assert {"policy", "value_per_s", "ttft_p99_s", "deferred_tokens_per_s"} <= set(header.split(","))
    assert (tmp_path / "requests.csv").read_text().count("\n") > 5
    assert "start a server there" in error(run(tmp_path, "load", "url=http://127.0.0.1:9", "hydra.run.dir=x"))
