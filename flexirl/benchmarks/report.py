"""The report: one HTML page with everything in it, and beside it the results, the tables as CSV and the figures as PNG.

All of its text follows from the results.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

import flexirl
from flexirl.benchmarks import statistics
from flexirl.benchmarks.figures import all_figures
from flexirl.benchmarks.results import Benchmark, write_results, write_table
from flexirl.benchmarks.statistics import Scores, Sensitivity
from flexirl.experiments.comparison import Row

REFERENCE = "immediate_only"  # for the study of distributions: the engine itself, with no rule for deferred work
SENSITIVE = ("ttft_mean_s", "ttft_p99_s", "tpot_mean_s", "tpot_p99_s", "prompt_tokens_per_s", "output_tokens_per_s")
MATTERS_LESS = 0.5  # of the greatest spread over distributions
CAPTIONS = {
    "leaderboard": "Mean score of every policy. Episodes are drawn anew within scenarios, scenarios within suites.",
    "wins": "Episodes in which the row's policy earns more than the column's, in percent; level ones count half.",
    "suites": "Mean score by suite.",
    "frontier": "Immediate attainment against deferred throughput, means over all scenarios with deferred work.",
    "heatmap": "How the pair of distributions sets the tail of TTFT.",
    "distributions": "Throughput and latency by distribution; pairs are averaged over their inner distribution.",
    "course": "Latency over time.",
    "timeline_best": "The leader where it comes closest to the measure.",
    "timeline_worst": "The leader where it is farthest from it.",
}

Table = list[dict[str, Any]]


def write_report(benchmark: Benchmark, folder: Path) -> None:
    """Writes report.html, results.json and .csv, the other tables as CSV, and the figures as PNG, into `folder`."""
    revenue = statistics.revenue_scores(benchmark.rows)
    tables = all_tables(benchmark, revenue)
    figures = all_figures(benchmark, revenue, REFERENCE)
    write_results(benchmark, folder)
    for name, table in tables.items():
        write_table(table, folder / f"{name}.csv")
    pictures = {name: _png(figure) for name, figure in figures.items()}
    for name, picture in pictures.items():
        (folder / f"{name}.png").write_bytes(picture)
    (folder / "report.html").write_text(_page(benchmark, revenue, tables, pictures), encoding="utf-8")


def all_tables(benchmark: Benchmark, revenue: Scores) -> dict[str, Table]:
    """The report's tables by name, as rows; a table without rows has nothing to say on this suite."""
    rows = benchmark.rows
    return {
        "leaderboard": _leaderboard(rows, revenue),
        "capacity": _capacity(rows, revenue.policies),
        "by_suite": [
            {"policy": name, **dict(zip(revenue.suites, values.tolist(), strict=True))}
            for name, values in zip(revenue.policies, revenue.by_suite, strict=True)
        ],
        "scenarios": _scenarios(rows, revenue),
        "not_served": _not_served(rows, revenue),
        "sensitivity": [
            {"load": one.load, "figure": one.figure, "spread of log": one.spread,
             **{f"outer {name}": effect for name, effect in one.outer.items()},
             **{f"inner {name}": effect for name, effect in one.inner.items()}}
            for one in statistics.sensitivities(rows, REFERENCE, SENSITIVE)
        ],
    }  # fmt: skip


def _leaderboard(rows: Sequence[Row], revenue: Scores) -> Table:
    table = []
    standing = zip(revenue.policies, revenue.mean(), revenue.interval(), revenue.behind_first(), strict=True)
    for name, mean, (low, high), (gap, least, most) in standing:
        mine = [row for row in rows if row["policy"] == name]
        figures = {
            "revenue/s": "revenue_per_s", "attainment": "immediate_attainment", "on time": "deferred_on_time",
            "deferred tok/s": "deferred_tokens_per_s", "of deferred_only": "deferred_share_of_deferred_only",
            "TTFT P99 s": "ttft_p99_s", "TPOT P99 s": "tpot_p99_s", "fairness": "jain_fairness",
        }  # fmt: skip
        figures_of = {title: statistics.mean_of(mine, figure) for title, figure in figures.items()}
        table.append(
            {
                "policy": name,
                "score": mean,
                "95%": _span(low, high),
                "behind first": gap,
                "95% of that": _span(least, most),
                **figures_of,
            }
        )
    return table


def _span(low: float, high: float) -> str:
    return f"{low:.3f} to {high:.3f}"


def _capacity(rows: Sequence[Row], policies: Sequence[str]) -> Table:
    found = statistics.capacities(rows)
    table = []
    for family in dict.fromkeys(entry["family"] for entry in found):
        of = {entry["policy"]: entry["capacity"] for entry in found if entry["family"] == family}
        table.append({"scenarios": family, **{name: of[name] for name in policies}})
    if len(table) > 1:
        table.append({"scenarios": "mean", **{name: float(np.mean([row[name] for row in table])) for name in policies}})
    return table


def _scenarios(rows: Sequence[Row], revenue: Scores) -> Table:
    """Per scenario: the bound, the best policy, and every policy's score."""
    means = np.nanmean(revenue.values, axis=2)
    table = []
    for number, (suite, scenario) in enumerate(revenue.scenarios):
        mine = [row for row in rows if (row["suite"], row["scenario"]) == (suite, scenario)]
        table.append(
            {
                "scenario": f"{suite}: {scenario}",
                "upper bound/s": statistics.mean_of(mine, "upper_bound_revenue_per_s"),
                "best": revenue.policies[int(means[:, number].argmax())],
                **dict(zip(revenue.policies, means[:, number].tolist(), strict=True)),
            }
        )
    return table


def _not_served(rows: Sequence[Row], revenue: Scores) -> Table:
    """Scenarios with requests that the engine cannot hold or finish, and their shares; the same for every policy."""
    figures = {"unservable": "unservable", "of service time": "unservable_work", "cut short": "cut_short"}
    table = []
    for suite, scenario in revenue.scenarios:
        mine = [row for row in rows if (row["suite"], row["scenario"]) == (suite, scenario)]
        shares = {title: statistics.mean_of(mine, figure) for title, figure in figures.items()}
        if any(shares.values()):
            table.append({"scenario": f"{suite}: {scenario}", **shares})
    return table


def findings(revenue: Scores) -> list[str]:
    """What the results say, in sentences."""
    means, intervals = revenue.mean(), revenue.interval()
    first = revenue.policies[0]
    said = [
        f"{first} has the highest score, {means[0]:.3f} (95% interval {intervals[0][0]:.3f} to {intervals[0][1]:.3f})."
    ]
    if len(means) > 1:
        gap, least, most = revenue.behind_first()[1]
        said.append(
            f"It is {gap:.3f} ahead of {revenue.policies[1]} (95% interval of the difference {least:.3f} to {most:.3f}"
            f", which {'excludes' if least > 0 else 'includes'} zero)."
        )
        best = np.nanmean(revenue.values, axis=2)
        ahead = int((best[0] >= best[1:].max(axis=0)).sum())
        said.append(f"It is best, or level with the best, in {ahead} of {best.shape[1]} scenarios; its lowest score "
                    f"relative to the best policy there is {(best[0] / best.max(axis=0)).min():.3f}.")  # fmt: skip
    return said


def study_claims(found: Sequence[Sensitivity]) -> list[str]:
    """The study's two claims against the numbers, for each latency that it looked at.

    Influence of a distribution: how far it moves the figure from the mean over all pairs, as |log|, averaged over the
    loads and over its two places, outer and inner.
    """
    said = []
    for figure in dict.fromkeys(one.figure for one in found):
        mine = [one for one in found if one.figure == figure]
        influence = {
            name: float(np.mean([abs(np.log(side[name])) for one in mine for side in (one.outer, one.inner)]))
            for name in mine[0].outer
        }
        ranked = sorted(influence, key=lambda name: -influence[name])
        place = ranked.index("uniform") + 1 if "uniform" in ranked else 0
        spreads = [one.spread for one in mine]
        less = spreads[-1] < MATTERS_LESS * max(spreads)
        said += [
            f"{figure}: the most influential distribution is {ranked[0]}, which moves it by a factor of "
            f"{np.exp(influence[ranked[0]]):.2f} on average"
            + (f"; uniform is number {place} of {len(ranked)} ({np.exp(influence['uniform']):.2f})." if place else "."),
            f"{figure}: over distributions, the logarithm deviates by {spreads[0]:.2f} at load {mine[0].load:g}, by "
            f"{max(spreads):.2f} at most and by {spreads[-1]:.2f} at load {mine[-1].load:g}; at the last of these the "
            f"distribution {'matters less than half as much as where it matters most' if less else 'still matters'}.",
        ]
    return said


def _page(benchmark: Benchmark, revenue: Scores, tables: dict[str, Table], pictures: dict[str, bytes]) -> str:
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, undefined=StrictUndefined,
        keep_trailing_newline=True,
    )  # fmt: skip
    templates.filters |= {"cell": _cell, "base64": lambda data: base64.b64encode(data).decode()}
    return templates.get_template("report.html.jinja").render(
        benchmark=benchmark, revenue=revenue, tables=tables, pictures=pictures, captions=CAPTIONS,
        version=flexirl.__version__, reference=REFERENCE, suites=", ".join(revenue.suites),
        episodes=len({(row["suite"], row["scenario"], row["seed"]) for row in benchmark.rows}),
        findings=findings(revenue),
        claims=study_claims(statistics.sensitivities(benchmark.rows, REFERENCE, SENSITIVE)),
    )  # fmt: skip


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # No version or date in the file: the same results make the same bytes.
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()
