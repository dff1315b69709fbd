"""The report's figures, drawn from the rows and courses of a benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from flexirl.benchmarks import statistics
from flexirl.benchmarks.results import Benchmark
from flexirl.benchmarks.statistics import Scores
from flexirl.experiments.comparison import Row
from flexirl.experiments.plots import (
    DEFERRED_COLOUR,
    IMMEDIATE_COLOUR,
    NEUTRAL,
    label_points,
    new_figure,
    timeline_figure,
)

# As many colours as there are rules, in three lightnesses, so that neighbours differ in print too.
PALETTE = (
    "#2a6f97", "#e07a3f", "#3a9d5d", "#8e5ea2", "#c0392b", "#7f6a4f", "#d98cb3", "#4d4d4d", "#b5a642", "#17a2b8",
    "#1b3a57", "#f2b134", "#9fc5a8", "#a0a0a0",
)  # fmt: skip
MARKERS = "osD^vP"
LATENCIES = (("ttft_p50_s", "TTFT, P50 (s)"), ("ttft_p99_s", "TTFT, P99 (s)"), ("tpot_p50_s", "TPOT, P50 (s)"),
             ("tpot_p99_s", "TPOT, P99 (s)"))  # fmt: skip


def all_figures(benchmark: Benchmark, revenue: Scores, reference: str) -> dict[str, Figure]:
    """Every figure that the rows allow, by file name.

    reference: the policy that stands for the engine in figures on how requests arrive.
    """
    rows = benchmark.rows
    figures = {
        "leaderboard": leaderboard(revenue),
        "wins": win_matrix(revenue),
        "suites": by_suite(revenue),
    }
    mixed = [row for row in rows if row["deferred_share_of_deferred_only"] is not None]
    if mixed:
        figures["frontier"] = frontier(mixed, revenue.policies)
    for suite in dict.fromkeys(row["suite"] for row in rows):
        found = against_load([row for row in rows if row["suite"] == suite], revenue.policies, suite)
        if found is not None:
            figures[f"latency_{suite}"] = found
    distributions = [row for row in rows if row["suite"] == "distributions" and row["policy"] == reference]
    if distributions:
        figures["heatmap"] = heatmap(distributions)
        figures["distributions"] = by_distribution(distributions)
        figures["course"] = over_time(benchmark, reference)
    leader = revenue.policies[0]
    by_scenario = np.nanmean(revenue.values[0], axis=1)
    for name, number in (("best", by_scenario.argmax()), ("worst", by_scenario.argmin())):
        suite, scenario = revenue.scenarios[number]
        timeline = _records(benchmark.courses[suite, scenario, leader]["timeline"])
        figures[f"timeline_{name}"] = timeline_figure(
            timeline, f"{leader}: its {name} scenario, {suite}, {scenario} (score {by_scenario[number]:.3f})"
        )
    return figures


def _colours(policies: Sequence[str]) -> dict[str, str]:
    ordered = sorted(policies)
    return {name: PALETTE[ordered.index(name) % len(PALETTE)] for name in policies}


def leaderboard(revenue: Scores) -> Figure:
    """Mean scores with their confidence intervals, best on top."""
    figure = new_figure(7.5, 0.3 * len(revenue.policies) + 0.9)
    axes = figure.subplots()
    means, intervals = revenue.mean(), revenue.interval()
    places = np.arange(len(means))[::-1]
    errors = np.abs(intervals.T - means)
    axes.errorbar(means, places, xerr=errors, fmt="o", color=IMMEDIATE_COLOUR, ecolor=NEUTRAL, capsize=3, markersize=5)
    axes.set_yticks(places, revenue.policies)
    axes.set_ylim(-0.6, len(means) - 0.4)
    axes.set(xlabel=f"{revenue.meaning} (mean over suites; bars: 95% bootstrap interval)")
    axes.grid(axis="x", color="#e5e5e5", linewidth=0.6)
    return figure


def win_matrix(revenue: Scores) -> Figure:
    """How often the row's policy earns more than the column's."""
    shares = statistics.wins(revenue)
    size = 0.48 * len(revenue.policies) + 2.2
    figure = new_figure(size + 0.6, size)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="RdBu", vmin=0, vmax=1)
    for (i, j), share in np.ndenumerate(shares):
        if i != j:
            axes.text(j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=7,
                      color="white" if abs(share - 0.5) > 0.35 else "black")  # fmt: skip
    axes.set_xticks(range(len(shares)), revenue.policies, rotation=60, ha="right")
    axes.set_yticks(range(len(shares)), revenue.policies)
    figure.colorbar(image, ax=axes, shrink=0.7, label="share won by the row")
    return figure


def by_suite(revenue: Scores) -> Figure:
    """Mean score of every policy in every suite."""
    values = revenue.by_suite
    figure = new_figure(0.85 * len(revenue.suites) + 3.2, max(0.33 * len(revenue.policies) + 1.6, 3.6))
    axes = figure.subplots()
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color="black" if value > 0.6 else "white")
    axes.set_xticks(range(len(revenue.suites)), revenue.suites, rotation=35, ha="right")
    axes.set_yticks(range(len(values)), revenue.policies)
    figure.colorbar(image, ax=axes, label=revenue.meaning)
    return figure


def frontier(mixed: Sequence[Row], policies: Sequence[str]) -> Figure:
    """Immediate attainment against deferred throughput, means over rows of scenarios with deferred work."""
    figure = new_figure(7.5, 4.6)
    axes = figure.subplots()
    points: dict[str, tuple[float, float]] = {}
    for name in (*policies, "immediate_only"):
        mine = [row for row in mixed if row["policy"] == name]
        attainment = statistics.mean_of(mine, "immediate_attainment")
        if attainment is not None:
            points[name] = (statistics.mean_of(mine, "deferred_share_of_deferred_only") or 0.0, attainment)
    best = [name for name, at in points.items() if not any(o[0] > at[0] and o[1] > at[1] for o in points.values())]
    edge = sorted(points[name] for name in best)
    axes.plot([x for x, _ in edge], [y for _, y in edge], color=DEFERRED_COLOUR, linewidth=1, label="frontier")
    for name, (x, y) in points.items():
        axes.scatter(x, y, color=IMMEDIATE_COLOUR if name in best else NEUTRAL, s=24, zorder=3)
    axes.set(xlabel="deferred tokens, share of deferred_only", ylabel="immediate attainment")
    axes.legend(fontsize=8, loc="lower left")
    label_points(axes, points)
    return figure


def against_load(rows: Sequence[Row], policies: Sequence[str], suite: str) -> Figure | None:
    """Latency percentiles against load, median over the scenarios of one load; None without several loads."""
    rows = [row for of in statistics.families(rows).values() for row in of]
    loads = sorted({row["labels"]["load"] for row in rows})
    if len(loads) < 2:
        return None
    figure = new_figure(10, 5.6)
    panels = figure.subplots(2, 2, sharex=True)
    colours = _colours(policies)
    for axes, (name, label) in zip(panels.flat, LATENCIES, strict=True):
        for i, policy in enumerate(policies):
            values = []
            for load in loads:
                at = [row[name] for row in rows if row["policy"] == policy and row["labels"]["load"] == load]
                known = [value for value in at if value is not None]
                values.append(float(np.median(known)) if known else np.nan)
            marker = MARKERS[i % len(MARKERS)]
            axes.plot(loads, values, color=colours[policy], marker=marker, markersize=3, linewidth=1.1, label=policy)
        axes.set(ylabel=label, yscale="log" if name.startswith("ttft") else "linear")
        axes.grid(color="#e5e5e5", linewidth=0.5)
    for axes in panels[1]:
        axes.set_xlabel("load (immediate demand, share of capacity)")
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=8, loc="outside right upper", title=suite)
    return figure


def heatmap(rows: Sequence[Row]) -> Figure:
    """P99 of TTFT by outer and inner distribution, one panel per load."""
    pairs = [row for row in rows if "outer" in row["labels"]]
    loads = sorted({row["labels"]["load"] for row in pairs})
    outer, inner = (list(dict.fromkeys(row["labels"][side] for row in pairs)) for side in ("outer", "inner"))
    figure = new_figure(2.5 * len(loads) + 1.6, 3.6)
    for panel, load in zip(np.atleast_1d(figure.subplots(1, len(loads), sharey=True)), loads, strict=True):
        values = np.full((len(outer), len(inner)), np.nan)
        for i, one in enumerate(outer):
            for j, other in enumerate(inner):
                chosen = (row for row in pairs if row["labels"] == {"outer": one, "inner": other, "load": load})
                values[i, j] = statistics.mean_of(chosen, "ttft_p99_s") or np.nan
        panel.imshow(np.log(values), cmap="magma_r")
        middle = (np.nanmin(values) * np.nanmax(values)) ** 0.5
        for (i, j), value in np.ndenumerate(values):
            panel.text(j, i, f"{value:.2g}" if value < 10 else f"{value:.0f}", ha="center", va="center", fontsize=7,
                       color="white" if value > middle else "black")  # fmt: skip
        panel.set_xticks(range(len(inner)), inner, rotation=60, ha="right", fontsize=8)
        panel.set_yticks(range(len(outer)), outer, fontsize=8)
        panel.set(title=f"load {load:g}", xlabel="inner")
    figure.axes[0].set_ylabel("outer")
    figure.suptitle("P99 of TTFT (s); colours are scaled within each load")
    return figure


DISTRIBUTION_FIGURES = (
    ("prompt_tokens_per_s", "prompt tokens per s"), ("output_tokens_per_s", "generated tokens per s"),
    *((f"{name}_{figure}_s", f"{name.upper()}, {figure.upper() if figure != 'mean' else figure} (s)")
      for name in ("ttft", "tpot") for figure in ("mean", "p50", "p90", "p95", "p99")),
)  # fmt: skip


def by_distribution(rows: Sequence[Row]) -> Figure:
    """Throughput and latency against load, one line per distribution; pairs by their outer one."""
    figure = new_figure(13, 8)
    panels = figure.subplots(3, 4, sharex=True)
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        labels = row["labels"]
        kinds.setdefault(f"outer {labels['outer']}" if "outer" in labels else f"single {labels['single']}", []).append(
            row
        )
    for axes, (name, label) in zip(panels.flat, DISTRIBUTION_FIGURES, strict=True):
        for i, (kind, mine) in enumerate(kinds.items()):
            loads = sorted({row["labels"]["load"] for row in mine})
            values = [statistics.mean_of((r for r in mine if r["labels"]["load"] == load), name) for load in loads]
            style = "-" if kind.startswith("outer") else "--"
            axes.plot(loads, [np.nan if v is None else v for v in values], style, color=PALETTE[i], label=kind,
                      marker=MARKERS[i % len(MARKERS)], markersize=3, linewidth=1.1)  # fmt: skip
        axes.set(title=label, xscale="log", yscale="log" if name.startswith("ttft") else "linear")
        axes.title.set_fontsize(9)
        axes.set_xticks(loads, [f"{load:g}" for load in loads], minor=False)
        axes.minorticks_off()
    for axes in panels[-1]:
        axes.set_xlabel("load")
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=8, loc="outside lower center", ncols=5)
    return figure


def over_time(benchmark: Benchmark, policy: str) -> Figure:
    """Mean TTFT and TPOT by time of arrival at the middle load, by outer distribution with an even inner one."""
    cells = [
        cell for cell in benchmark.cells if cell.suite == "distributions" and cell.labels.get("inner") == "uniform"
    ]
    loads = sorted({cell.labels["load"] for cell in cells}, key=float)
    load = loads[len(loads) // 2]
    figure = new_figure(10, 3.2)
    panels = figure.subplots(1, 2)
    for i, cell in enumerate(cell for cell in cells if cell.labels["load"] == load):
        series = benchmark.courses[cell.suite, cell.name, policy]["series"]
        for axes, name in zip(panels, ("ttft_s", "tpot_s"), strict=True):
            values = [np.nan if value is None else value for value in series[name]]
            axes.plot(series["time_s"], values, color=PALETTE[i], label=str(cell.labels["outer"]), linewidth=1.1)
    for axes, label in zip(panels, ("mean TTFT (s)", "mean TPOT (s)"), strict=True):
        axes.set(xlabel="time of arrival (s)", ylabel=label, yscale="log")
    panels[1].legend(fontsize=8, title=f"outer, load {load:g}")
    return figure


def _records(columns: Mapping[str, Sequence[float]]) -> np.ndarray:
    """Columns as a structured array."""
    arrays = {name: np.asarray(column) for name, column in columns.items()}
    records = np.empty(len(next(iter(arrays.values()))), [(name, array.dtype) for name, array in arrays.items()])
    for name, array in arrays.items():
        records[name] = array
    return records
