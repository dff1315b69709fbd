"""The report: one HTML page with everything in it, and beside it the results, the tables as CSV and the figures as PNG.

All of its text follows from the results.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
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
    "wins": "Wins and losses over episodes, in percent.",
    "suites": "Mean score by suite.",
    "frontier": "Immediate attainment against deferred throughput, means over all scenarios with deferred work.",
    "heatmap": "How the pair of distributions sets the tail of TTFT.",
    "distributions": "Throughput and latency by distribution; pairs are averaged over their inner distribution.",
    "course": "Latency over time.",
    "timeline_best": "The leader where it comes closest to the measure.",
    "timeline_worst": "The leader where it is farthest from it.",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1040px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.7em; margin-bottom: 0.2em; } h2 { margin-top: 2em; border-bottom: 1px solid #ddd; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.87em; font-variant-numeric: tabular-nums; }
td, th { padding: 0.25em 0.7em; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap; }
th { border-bottom: 2px solid #888; } td:first-child, th:first-child { text-align: left; }
figure { margin: 1.2em 0; } img { max-width: 100%; } figcaption { color: #555; font-size: 0.9em; }
code { font-size: 0.85em; } summary { cursor: pointer; color: #2a6f97; }
"""

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
    suites = ", ".join(revenue.suites)
    episodes = len({(row["suite"], row["scenario"], row["seed"]) for row in benchmark.rows})
    parts = [
        f"<h1>Scheduling policies for mixed requests: {escape(suites)}</h1>",
        f"<p>{len(benchmark.cells)} scenarios, {episodes} episodes, {len(revenue.policies)} policies; FlexiRL "
        f"{flexirl.__version__}, seed {benchmark.seed}. Score: {escape(revenue.meaning)}. Knobs that a rule leaves "
        "open (dials, latency budget) were searched for each scenario on other episodes.</p>",
        *(f"<p><strong>{escape(sentence)}</strong></p>" for sentence in benchmark.skipped),
        _list(findings(revenue)),
        "<h2>Leaderboard</h2>", _table(tables["leaderboard"]), _figures(pictures, "leaderboard", "wins"),
        "<h2>By suite</h2>", _figures(pictures, "suites"),
    ]  # fmt: skip
    if "frontier" in pictures:
        parts += ["<h2>Both classes</h2>", _figures(pictures, "frontier")]
    if tables["capacity"]:
        parts += [
            "<h2>Capacity</h2>",
            "<p>Highest load tried at which, as at every lower one, at least 99% of the immediate promises are kept; 0 "
            "where not even the lowest is.</p>",
            _table(tables["capacity"]),
        ]
    latency = [name for name in pictures if name.startswith("latency_")]
    if latency:
        parts += ["<h2>Latency against load</h2>", _figures(pictures, *latency)]
    if tables["sensitivity"]:
        parts += [
            "<h2>How requests arrive</h2>",
            f"<p>Policy {REFERENCE}. Factors are relative to the mean over all pairs.</p>",
            _list(study_claims(statistics.sensitivities(benchmark.rows, REFERENCE, SENSITIVE))),
            _figures(pictures, "heatmap", "distributions", "course"), _table(tables["sensitivity"]),
        ]  # fmt: skip
    commands = "\n".join(cell.command(benchmark.seed) for cell in benchmark.cells)
    parts += [
        "<h2>Timelines</h2>", _figures(pictures, "timeline_best", "timeline_worst"),
        "<h2>Scenarios</h2>", _table(tables["scenarios"]),
        f"<details><summary>Commands that run each scenario alone</summary><pre>{escape(commands)}</pre></details>",
    ]  # fmt: skip
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>FlexiRL benchmark: {escape(suites)}</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _list(sentences: Sequence[str]) -> str:
    return "<ul>" + "\n".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _figures(pictures: dict[str, bytes], *names: str) -> str:
    return "\n".join(
        f'<figure><img alt="{name}" src="data:image/png;base64,{base64.b64encode(pictures[name]).decode()}">'
        f"<figcaption>{escape(CAPTIONS.get(name, 'Median over the scenarios of a load.'))}</figcaption></figure>"
        for name in names
    )


def _table(rows: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    lines = ["".join(f"<td>{_cell(value)}</td>" for value in row.values()) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return escape(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # No version or date in the file: the same results make the same bytes.
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()
