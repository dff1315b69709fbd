"""A benchmark's results: every run's row, the upper bound beside it, and the courses that figures show."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexirl.benchmarks.runs import UPPER_BOUND, Job, Result
from flexirl.benchmarks.suites import Cell
from flexirl.experiments.comparison import Row, relate_to_anchors


@dataclass(frozen=True)
class Benchmark:
    """rows: as in `flexirl.benchmarks.statistics`; courses: of the first seed, by suite, scenario and policy."""

    cells: list[Cell]
    rows: list[Row]
    courses: dict[tuple[str, str, str], Result]
    seed: int
    skipped: list[str]


def collect(jobs: Sequence[Job], results: Sequence[Result], skipped: Sequence[str] = ()) -> Benchmark:
    """Joins the runs of each scenario: to the anchors, and to the upper bound where it was solved for."""
    rows: list[Row] = []
    courses: dict[tuple[str, str, str], Result] = {}
    cells = list(dict.fromkeys((job.cell.suite, job.cell.name) for job in jobs))
    by_cell: dict[tuple[str, str], list[tuple[Job, Result]]] = {cell: [] for cell in cells}
    for job, result in zip(jobs, results, strict=True):
        by_cell[job.cell.suite, job.cell.name].append((job, result))
    for (suite, scenario), done in by_cell.items():
        bounds = next((result["upper_bounds"] for job, result in done if job.policy == UPPER_BOUND), None)
        mine = []
        for job, result in done:
            if job.policy == UPPER_BOUND:
                continue
            for row in result["rows"]:
                bound = bounds[row["seed"]] if bounds else None
                mine.append(
                    {
                        "suite": suite, "scenario": scenario, "labels": job.cell.labels, **row,
                        "upper_bound_revenue_per_s": bound,
                        "share_of_upper_bound": row["revenue_per_s"] / bound if bound else None,
                    }
                )  # fmt: skip
            courses[suite, scenario, result["rows"][0]["policy"]] = {
                name: result[name] for name in ("timeline", "series")
            }
        relate_to_anchors(mine)
        rows += mine
    unique = {(job.cell.suite, job.cell.name): job.cell for job in jobs}
    return Benchmark(list(unique.values()), rows, courses, jobs[0].seed, list(skipped))


def write_results(benchmark: Benchmark, folder: Path) -> None:
    """results.json and results.csv: every row."""
    (folder / "results.json").write_text(json.dumps(benchmark.rows, indent=1) + "\n")
    write_table([{**row, "labels": json.dumps(row["labels"])} for row in benchmark.rows], folder / "results.csv")


def write_table(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Rows with the same entries as CSV; nothing is written where there are none."""
    if rows:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
