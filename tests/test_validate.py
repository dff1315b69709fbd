"""The validation program: a record made by the surrogate itself must come out without difference."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexirl.errors import UserError
from flexirl.policies.registry import make_policy
from flexirl.programs.validate import compare
from flexirl.runtime.fitting.host_time import first_third, with_host_time
from flexirl.runtime.fitting.operators import fit_profile, read_lengths
from flexirl.runtime.fitting.recorded_engine import is_asynchronous
from flexirl.runtime.fitting.replay import Record, Served, replay
from flexirl.runtime.fitting.requests import read_requests

ROOT = Path(__file__).parents[1]
RECORDED = ROOT.parent / "shared" / "real_vllm" / "rtx4090-llama-3.1-8b"
FIGURES = [(metric, name) for metric in ("ttft", "tpot", "e2e") for name in ("mean", "p50", "p90", "p95", "p99")]
LAYERS = ("embedding", "final_layernorm", "layernorm", "qkv_proj", "o_proj", "gate_up_proj", "down_proj")
CLOCK_S = 5000.0  # where the record's own clock stands at the first arrival


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flexirl.validate", f"hydra.run.dir={tmp_path / 'out'}", *arguments],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip


def meta(asynchronous: bool) -> dict[str, Any]:
    return {
        "model": "some/model",
        "layers": 4,
        "engine_kwargs": {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 200},
        "kv_cache": {"num_gpu_blocks": 30, "block_size": 16, "enable_prefix_caching": True},
        "resolved_config": {"scheduler_config": {"async_scheduling": asynchronous}},
    }


def write_requests(folder: Path, rows: list[dict[str, float]]) -> None:
    (folder / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder whose recorded times are the surrogate's; its cache is small enough to queue and preempt."""
    folder = tmp_path / "tiny"
    (folder / "operators").mkdir(parents=True)
    (folder / "meta.json").write_text(json.dumps(meta(asynchronous=True)))
    (folder / "timeseries.csv").write_text("t,running,waiting,kv_cache_pct\n1.0,4,2,50.0\n2.0,0,0,0.0\n")
    dense = [f"{layer},{tokens},{20 + tokens}" for layer in LAYERS for tokens in (1, 64)]
    (folder / "operators" / "dense.csv").write_text("\n".join(["layer,tokens,time_us", *dense]) + "\n")
    sequences = [f"lm_head,{count},{30 + count}" for count in (1, 8)]
    (folder / "operators" / "per_sequence.csv").write_text("\n".join(["layer,sequences,time_us", *sequences]) + "\n")
    attention = [
        f"{chunk},{computed},{decodes},{context},{5 + 0.1 * chunk + 0.01 * chunk * computed + 0.02 * decodes * context}"
        for chunk in (0, 16, 64)
        for computed in ((0, 64) if chunk else (0,))
        for decodes in (0, 1, 8)
        for context in ((16, 128) if decodes else (0,))
        if chunk or decodes
    ]
    header = "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us"
    (folder / "operators" / "attention.csv").write_text("\n".join([header, *attention]) + "\n")

    random = np.random.default_rng(1)
    rows: list[dict[str, float]] = [
        {"input_toks": int(prompt), "output_toks": int(output), "arrival_time": 1e9 + at, "queued_ts": 0.0,
         "first_token_ts": 1.0, "last_token_ts": 2.0}
        for prompt, output, at in zip(
            random.integers(20, 120, 60), random.integers(2, 60, 60), np.cumsum(random.exponential(0.02, 60)),
            strict=True,
        )
    ]  # fmt: skip
    write_requests(folder, rows)
    record = Record.read(folder)
    served, _ = replay(make_policy("vllm_fcfs"), fit_profile(folder), record.trace, record.asynchronous)
    for row, *times in zip(rows, served.queued_s, served.first_token_s, served.last_token_s, strict=True):
        row["queued_ts"], row["first_token_ts"], row["last_token_ts"] = (CLOCK_S + time for time in times)
    write_requests(folder, rows)
    return folder


def test_a_record_made_by_the_surrogate_shows_no_difference(tmp_path: Path, folder: Path) -> None:
    ran = run(tmp_path, f"run={folder}")
    assert ran.returncode == 0, ran.stderr
    rows = json.loads((tmp_path / "out" / "validation.json").read_text())
    assert [(row["metric"], row["statistic"]) for row in rows] == FIGURES
    assert all(
        set(row) == {"metric", "statistic", "real", "surrogate", "difference", "without", "spread"} for row in rows
    )
    assert [row["surrogate"] for row in rows] == pytest.approx([row["real"] for row in rows], rel=1e-9)
    assert [row["difference"] for row in rows] == pytest.approx([0.0] * len(rows), abs=1e-9)
    assert (tmp_path / "out" / "validation.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "profile.json").read_text())["name"] == "tiny"
    assert "does not say which prompts began alike" in ran.stdout


def test_differences_are_shares_of_the_recorded_figure() -> None:
    queued, tokens = np.array([0.0, 1.0]), np.array([11, 1])
    real = Served(queued, np.array([2.0, 3.0]), np.array([4.0, 3.0]), tokens)
    ours = Served(queued, np.array([2.5, 3.0]), np.array([5.5, 3.0]), tokens)
    rows = {(row["metric"], row["statistic"]): row for row in compare(real, ours, real, [real, ours])}
    assert all(row["without"] == 0 for row in rows.values())
    assert rows["ttft", "mean"]["difference"] == pytest.approx(0.125)  # (2.5 + 2) / (2 + 2) - 1
    assert rows["tpot", "p50"]["difference"] == pytest.approx(0.5)  # 0.3 s against 0.2 s; one token has no TPOT
    assert rows["e2e", "mean"]["difference"] == pytest.approx(0.25)  # (5.5 + 2) / (4 + 2) - 1
    assert rows["e2e", "mean"]["spread"] == pytest.approx(0.125)  # half of the way between 3 and 3.75, over 3


def test_asynchronous_scheduling_costs_a_lone_request_nothing_and_a_later_one_an_iteration(folder: Path) -> None:
    record = Record.read(folder)
    trace = type(record.trace)(record.trace.rows[:2].copy(), "two", 1)
    engine, policy = fit_profile(folder), make_policy("vllm_fcfs")
    trace.rows["arrival_s"] = 0.0, 0.5 * replay(policy, engine, trace, False)[0].first_token_s[0]
    together, ahead = (replay(policy, engine, trace, asynchronous)[0] for asynchronous in (False, True))
    assert ahead.first_token_s[0] == together.first_token_s[0]
    assert ahead.queued_s[1] == together.queued_s[1] > trace.rows["arrival_s"][1]
    assert ahead.ttft_s[1] > together.ttft_s[1]


@pytest.mark.skipif(not RECORDED.is_dir(), reason="the recorded run is not beside the repository")
def test_the_recorded_run_is_followed(tmp_path: Path) -> None:
    ran = run(tmp_path, f"run={RECORDED}")
    assert ran.returncode == 0, ran.stderr
    rows = json.loads((tmp_path / "out" / "validation.json").read_text())
    assert [(row["metric"], row["statistic"]) for row in rows] == FIGURES
    means = [abs(row["difference"]) for row in rows if row["statistic"] == "mean"]
    assert max(means) < 0.03


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "run= is missing"),
        (("run=nowhere",), "nowhere does not exist"),
        (("rum=nowhere",), "Could not override 'rum'"),
    ],
)
def test_bad_arguments_are_one_sentence_and_exit_code_2(tmp_path: Path, arguments: tuple[str], message: str) -> None:
    ran = run(tmp_path, *arguments)
    assert ran.returncode == 2
    assert message in ran.stderr and "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("meta.json", None, "does not exist"),
        ("meta.json", "{", "is not valid JSON"),
        ("requests.jsonl", None, "does not exist"),
        ("requests.jsonl", "", "at least one request"),
        ("requests.jsonl", "[1]\n", "needs one JSON object a line"),
        ("requests.jsonl", '{"input_toks": 5}\n', "needs one JSON object a line"),
        ("timeseries.csv", None, "does not exist"),
        ("timeseries.csv", "t,running\n1,2\n", "needs numbers in the columns"),
    ],
)
def test_bad_files_are_named(folder: Path, name: str, text: str | None, message: str) -> None:
    path = folder / name
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        Record.read(folder)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"last_token_ts": 0.0}, "before its first and last token"),
        ({"first_token_ts": float("nan")}, "before its first and last token"),
        ({"output_toks": 0}, "an output has at least 1 token"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, folder: Path, change: dict[str, float], message: str) -> None:
    rows = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    write_requests(folder, [*rows, {**rows[-1], **change}])
    ran = run(tmp_path, f"run={folder}")
    assert ran.returncode == 2
    assert message in ran.stderr and "Traceback" not in ran.stderr


def test_a_request_that_cannot_fit_is_named(tmp_path: Path, folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    write_requests(folder, [*rows, {**rows[-1], "input_toks": 190, "output_toks": 20}])
    ran = run(tmp_path, f"run={folder}")
    assert ran.returncode == 2
    assert "190 + 20 tokens does not fit the engine" in ran.stderr and "Traceback" not in ran.stderr


ABORTED: list[dict[str, Any]] = [
    {"first_token_ts": None, "last_token_ts": None, "output_toks": 0},
    {"last_token_ts": None},
    {"first_token_ts": 0.0, "last_token_ts": 0.0, "output_toks": 0},
]


@pytest.mark.parametrize("change", ABORTED)
def test_an_aborted_request_is_left_out_and_its_line_named(
    folder: Path, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    whole = Record.read(folder)
    write_requests(folder, [*rows[:30], {**rows[30], **change}, *rows[30:]])
    with caplog.at_level(logging.WARNING):
        record = Record.read(folder)
    assert (record.trace.rows == whole.trace.rows).all()
    assert (record.served.last_token_s == whole.served.last_token_s).all()
    assert "1 requests (1.6%) were aborted (line 31) and are left out" in caplog.text
    assert fit_profile(folder, count=50).values == fit_profile(folder, count=50).values


def test_too_many_aborted_requests_are_refused(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    write_requests(folder, [*rows, *({**row, **ABORTED[0]} for row in rows[:12])])
    with pytest.raises(
        UserError, match=r"12 requests \(16.7%\) were aborted \(line 61, .*, 70, \.\.\.\); .* at most 5%"
    ):
        Record.read(folder)


@pytest.mark.parametrize(
    "change", [{"input_toks": "many"}, {"prefix_tokens": [1]}, {"output_toks": 1.5}, {"arrival_time": {}}]
)
def test_a_bad_line_is_named_by_its_number(folder: Path, change: dict[str, Any]) -> None:
    rows = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    write_requests(folder, [*rows[:4], {**rows[4], **change}, *rows[5:]])
    with pytest.raises(UserError, match="line 5"):
        Record.read(folder)


def test_separators_inside_strings_do_not_end_lines(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({**row, "note": "a\u2028b\u0085c"}, ensure_ascii=False) + "\n" for row in rows)
    (folder / "requests.jsonl").write_text(text, encoding="utf-8")
    assert len(Record.read(folder).trace) == len(rows) == len(read_lengths(folder))


def test_host_time_is_found_by_the_first_third_and_tells_of_the_rest(folder: Path) -> None:
    """Of a record that the surrogate made with 2 ms of the host an iteration."""
    record, engine, policy = Record.read(folder), fit_profile(folder), make_policy("vllm_fcfs")
    slow, _ = replay(policy, engine.replace(host_s=0.002), record.trace, record.asynchronous)
    part = first_third(len(record.trace))
    assert part.stop == 20
    # What became of the others must not matter.
    served = replace(slow, last_token_s=np.where(np.arange(60) < 20, slow.last_token_s, slow.last_token_s + 9))
    found = with_host_time(engine, replace(record, served=served), policy)
    assert float(found.values["host_s"]) == pytest.approx(0.002, rel=0.02)
    assert with_host_time(engine, record, policy) == engine  # none is missing


def test_what_a_record_does_not_say_is_given_or_derived(tmp_path: Path, folder: Path) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    seats = meta["engine_kwargs"]["max_num_seqs"]
    meta["kv_cache"].pop("num_gpu_blocks")
    meta["kv_cache"].pop("block_size")
    meta["engine_kwargs"]["max_model_len"] = None
    (folder / "meta.json").write_text(json.dumps(meta))
    ran = run(tmp_path, f"run={folder}")
    assert ran.returncode == 0, ran.stderr
    values = json.loads((tmp_path / "out" / "profile.json").read_text())["values"]
    longest = values["max_model_len"]["value"]
    assert longest == max(row["input_toks"] + row["output_toks"] for _, row in read_requests(folder))
    assert values["kv_blocks"]["value"] == -(-longest // 16) * seats and values["block_size"]["value"] == 16
    assert "kv_blocks" in ran.stdout and "not recorded" in ran.stdout
    ran = run(tmp_path, f"run={folder}", "engine.kv_blocks=50", "engine.block_size=32")
    assert ran.returncode == 0 and "kv_blocks 50: set by engine.kv_blocks" in ran.stdout


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ({"vllm_version": "0.19.0"}, True), ({"vllm_version": "0.9.2"}, False), ({}, False),
        ({"vllm_version": "0.19.0", "resolved_config": {"scheduler_config": {"async_scheduling": False}}}, False),
    ],
)  # fmt: skip
def test_scheduling_ahead_is_as_recorded_or_as_the_version_has_it(meta: dict[str, object], expected: bool) -> None:
    assert is_asynchronous(meta) is expected
