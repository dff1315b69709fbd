"""The report from a fixed set of results: everything is in it, and what it says follows from the numbers."""

from __future__ import annotations

import csv
import html
import json
import re
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from flexirl.benchmarks.report import findings, study_claims, write_report
from flexirl.benchmarks.results import Benchmark, collect
from flexirl.benchmarks.runs import UPPER_BOUND, Job
from flexirl.benchmarks.statistics import Sensitivity, revenue_scores
from flexirl.benchmarks.suites import Cell
from flexirl.runtime.scheduler.accounts import PERCENTILES
from flexirl.runtime.simulator.simulation import TIMELINE

STRENGTH = {"good": 0.9, "bad": 0.5, "immediate_only": 0.6, "deferred_only": 0.2}


def fixed_benchmark(bound: bool = True) -> Benchmark:
    """Two suites with figures made up by a formula: `good` earns 0.9 of the bound, `bad` 0.5."""
    labels = [
        {"outer": outer, "inner": inner, "load": load}
        for outer, inner, load in product(("uniform", "zipf"), ("uniform", "zipf"), (0.5, 1.0))
    ]
    cells = [Cell("distributions", place, (f"workload.load={place['load']}",), 2) for place in labels]
    cells += [Cell("bursts", {"workload": "<wild>", "load": load}, (), 2) for load in (0.3, 0.6)]
    jobs, results = [], []
    for cell in cells:
        load = float(cell.labels["load"])
        for policy, strength in STRENGTH.items():
            rows = [row_of(policy, load, strength, seed) for seed in range(2)]
            series = {"time_s": [1.0, 2.0], "ttft_s": [0.1, None], "tpot_s": [0.01, 0.02]}
            timeline = {name: np.linspace(0, 1, 5).astype(TIMELINE[name]).tolist() for name in TIMELINE.names or ()}
            jobs.append(Job(cell, policy, 0))
            results.append({"rows": rows, "timeline": timeline, "series": series})
        if bound:
            jobs.append(Job(cell, UPPER_BOUND, 0))
            results.append({"upper_bounds": [1000.0, 1000.0]})
    return collect(jobs, results, ["Suite traces was left out: it needs suite.folder=PATH."])


def row_of(policy: str, load: float, strength: float, seed: int) -> dict[str, object]:
    """A leaderboard row."""
    row: dict[str, object] = {
        "policy": policy, "workload": "w", "engine": "e", "load": load, "seed": seed,
        "revenue_per_s": 1000.0 * strength, "immediate_attainment": 1.0 if strength > load else 0.5,
        "prompt_tokens_per_s": 100.0 * load, "output_tokens_per_s": 10.0 * load, "deferred_on_time": None,
        "deferred_tokens_per_s": 10.0 * strength, "jain_fairness": 1.0, "unservable": 0.0, "unservable_work": 0.0,
        "cut_short": 0.0,
    }  # fmt: skip
    for name, scale in (("ttft", load), ("tpot", 0.01 * load)):
        row[f"{name}_mean_s"] = scale
        row |= {f"{name}_p{p}_s": scale * p / 50 for p in PERCENTILES}
    return row


class Page(HTMLParser):
    """What a page refers to, and whether its tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A written report."""
    folder = tmp_path_factory.mktemp("report")
    write_report(fixed_benchmark(), folder)
    return folder


def test_the_page_holds_everything(folder: Path) -> None:
    page = Page()
    text = (folder / "report.html").read_text()
    page.feed(text)
    assert not page.open
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert pictures == sorted(f"{name}.png" for name in (
        "leaderboard", "wins", "suites", "frontier", "latency_distributions", "latency_bursts", "heatmap",
        "distributions", "course", "timeline_best", "timeline_worst",
    ))  # fmt: skip
    assert len(page.links) == len(pictures) and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "&lt;wild&gt;" in text and "<wild>" not in text
    assert "Suite traces was left out" in text and "python -m flexirl.evaluate workload.load=0.5" in text


def test_results_and_tables(folder: Path) -> None:
    rows = json.loads((folder / "results.json").read_text())
    assert len(rows) == 10 * 4 * 2
    assert {row["share_of_upper_bound"] for row in rows if row["policy"] == "good"} == {0.9}
    assert all({"suite", "scenario", "labels", "ttft_p99_over_immediate_only"} <= set(row) for row in rows)
    tables = {}
    for name in ("results", "leaderboard", "capacity", "by_suite", "scenarios", "sensitivity"):
        with open(folder / f"{name}.csv", newline="") as file:
            tables[name] = list(csv.DictReader(file))
    assert len(tables["results"]) == len(rows) and len(tables["scenarios"]) == 10
    assert [row["policy"] for row in tables["leaderboard"]] == ["good", "bad"]
    assert [float(row["score"]) for row in tables["leaderboard"]] == pytest.approx([0.9, 0.5])
    capacities = {row["scenarios"]: row["good"] for row in tables["capacity"]}
    assert (
        capacities["bursts: workload <wild>"] == "0.6" and capacities["distributions: outer zipf, inner zipf"] == "0.5"
    )


def test_the_same_results_make_the_same_page(folder: Path, tmp_path: Path) -> None:
    write_report(fixed_benchmark(), tmp_path)
    assert (tmp_path / "report.html").read_bytes() == (folder / "report.html").read_bytes()


def test_without_a_bound_policies_are_held_against_the_best(tmp_path: Path) -> None:
    write_report(fixed_benchmark(bound=False), tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "share of the best policy's" in html.unescape(text) and "upper bound." not in text
    with open(tmp_path / "leaderboard.csv", newline="") as file:
        assert [float(row["score"]) for row in csv.DictReader(file)] == pytest.approx([1.0, 5 / 9])


def test_findings_follow_from_the_rows() -> None:
    said = findings(revenue_scores(fixed_benchmark().rows))
    assert said[0] == "good has the highest score, 0.900 (95% interval 0.900 to 0.900)."
    assert said[1].startswith("It is 0.400 ahead of bad") and said[1].endswith("which excludes zero).")
    assert "in 10 of 10 scenarios" in said[2]


def test_the_studys_claims_may_come_out_either_way() -> None:
    even, strong = {"uniform": 1.0, "zipf": 1.0}, {"uniform": 4.0, "zipf": 0.9}
    held = study_claims([Sensitivity(0.5, "ttft", 1.0, strong, even), Sensitivity(4.0, "ttft", 0.1, even, even)])
    assert "most influential distribution is uniform" in held[0] and "uniform is number 1 of 2" in held[0]
    assert "matters less than half as much" in held[1]
    strong = {"uniform": 1.0, "zipf": 3.0}
    refuted = study_claims([Sensitivity(0.5, "ttft", 0.5, strong, even), Sensitivity(4.0, "ttft", 1.0, strong, even)])
    assert "most influential distribution is zipf" in refuted[0] and "uniform is number 2 of 2" in refuted[0]
    assert "still matters" in refuted[1]
    assert re.search(r"factor of 1\.73", refuted[0])  # sqrt(3): 3 by one side, 1 by the other


def test_without_deferred_work_there_is_no_frontier(tmp_path: Path) -> None:
    benchmark = fixed_benchmark()
    for row in benchmark.rows:
        row["deferred_share_of_deferred_only"] = None
    write_report(benchmark, tmp_path)
    assert not (tmp_path / "frontier.png").exists() and "Both classes" not in (tmp_path / "report.html").read_text()


def test_what_an_engine_cannot_serve_is_said(folder: Path, tmp_path: Path) -> None:
    assert "cannot serve" not in (folder / "report.html").read_text() and not (folder / "not_served.csv").exists()
    benchmark = fixed_benchmark()
    for row in benchmark.rows:
        if row["suite"] == "bursts":
            row |= {"unservable": 0.05, "unservable_work": 0.39}
    write_report(benchmark, tmp_path)
    assert "Requests that the engine cannot serve" in (tmp_path / "report.html").read_text()
    with open(tmp_path / "not_served.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["scenario"] for row in table] == [f"bursts: workload <wild>, load {load}" for load in (0.3, 0.6)]
    assert {(row["unservable"], row["of service time"], row["cut short"]) for row in table} == {("0.05", "0.39", "0.0")}
