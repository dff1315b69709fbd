"""What a comparison says in words, against figures made up here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_rel

from flexirl.benchmarks.suites import composed
from flexirl.experiments.answer import answer_in_words, lead, training_in_words, workload_in_words
from flexirl.experiments.configuration import load_task
from flexirl.workloads.readers import read_trace


def rows_of(**revenues: list[float]) -> list[dict[str, Any]]:
    figures = {
        "ttft_p99_s": 0.5, "immediate_attainment": 0.9, "deferred_tokens_per_s": 100.0, "deferred_on_time": None,
        "tpot_p99_s": 0.05, "preemptions": 0, "kv_utilisation": 0.5, "workload": "mine",
    }  # fmt: skip
    return [
        {"policy": name, "seed": seed, "revenue_per_s": value, "value_per_s": value, **figures}
        for name, values in revenues.items()
        for seed, value in enumerate(values)
    ]


def test_the_lead_is_a_paired_difference_with_students_interval() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(100, 30, 6)  # arrivals differ far more than policies
    mine = base + rng.normal(3, 1, 6)
    found = lead(rows_of(a=mine.tolist(), b=base.tolist()), "a", "b")
    interval = ttest_rel(mine, base).confidence_interval(0.95)
    assert found.half_width is not None
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx(tuple(interval))


def test_who_earns_most_by_how_much_and_how_to_run_it() -> None:
    rows = rows_of(vllm_priority=[100, 100], qoserve=[110, 110], mine=[120, 122], immediate_only=[500, 500])
    said = answer_in_words(rows, {"mine": Path("out dir/mine.onnx")})
    assert said[0] == "mine earns most."
    assert said[1].startswith("Against vllm_priority +21.0% of value, +- 12.7% (95% interval).")
    assert said[2].startswith("Against the best rule, qoserve, +10.0% of value")
    assert said[-1].endswith("prompts=FILE.jsonl 'policy=out dir/mine.onnx'")


def test_what_training_was_good_for_is_said() -> None:
    worth = [0.5, 0.55, 0.54]
    history = [
        {"steps": 100.0 * i, "worth_share": share, "value_per_s": 10_000 * share} for i, share in enumerate(worth)
    ]
    assert training_in_words(history) == (
        "Training raised what validation earns by 10.0% in 100 decisions: value per second went from 5,000 to 5,500."
    )
    assert training_in_words(history[:1]).startswith("Training earned nothing")
    assert training_in_words([history[1], history[0], history[2]]).startswith("Training earned nothing")


def test_what_so_few_runs_do_not_show_is_said() -> None:
    said = answer_in_words(rows_of(vllm_priority=[100, 100], edf=[90, 130]), {})
    assert "no difference that so few runs show" in said[1]
    assert "on a single run" in answer_in_words(rows_of(vllm_priority=[100], edf=[130]), {})[1]
    same = answer_in_words(rows_of(vllm_priority=[100, 100], edf=[100.1, 100.2]), {})
    assert len(same) == 1 and "earn the same" in same[0]


def test_a_log_is_described_before_it_is_played(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    lines = [f"{1.7e9 + i},1000,200,{'batch' if i % 3 == 0 else 'chat'}" for i in range(600)]
    path.write_text("\n".join(["ts,prompt_tokens,completion_tokens,class", *lines]) + "\n")
    task = load_task(composed(["workload=trace", f"workload.path={path}"]))
    rows = read_trace(path).rows
    share = task.service_time_s(rows[rows["request_class"] == 0]).sum() / 600
    said = workload_in_words(task)
    assert said[0].startswith("mine.csv: 400 immediate requests in 600 s, which need ")
    assert f"need {share:.0%} of h100-llama-3.1-8b, and 200 deferred ones" in said[0]
    assert said[1:] == ["Each run is 200 s from a random place of it."]
    path.write_text("ts,prompt_tokens,completion_tokens\n" + "".join(f"{i},1000,200\n" for i in range(600)))
    said = workload_in_words(load_task(composed(["workload=trace", f"workload.path={path}", "workload.load=0.5"])))
    assert "need 50%, as workload.load says" in said[1] and "is made up" in said[-1]
    assert workload_in_words(load_task(composed(["workload=tiny"]))) == []
