"""Program: draws one scenario and describes it: `python -m flexirl.workload workload=medium_bursty`.

Prints a table, and writes workload.json and workload.png into the run's folder.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from flexirl.experiments.configuration import load_engine, load_slo
from flexirl.experiments.program import output_folder
from flexirl.experiments.values import seed_of
from flexirl.runtime.profile.capacity import ServiceTime, in_words, shares_lost
from flexirl.workloads.config import from_config
from flexirl.workloads.statistics import gap_cv, index_of_dispersion, peak_to_mean
from flexirl.workloads.trace import DEFERRED, IMMEDIATE, Trace

CLASSES = {"immediate": IMMEDIATE, "deferred": DEFERRED}
LENGTHS = ("prompt_tokens", "output_tokens", "image_tokens")
PERCENTILES = (5, 50, 95, 99)


def describe(trace: Trace, duration_s: float, service_time_s: ServiceTime) -> dict[str, Any]:
    """Statistics of a trace, per request class; times in seconds, lengths in tokens, None where undefined."""
    classes: dict[str, Any] = {}
    for name, request_class in CLASSES.items():
        rows = trace.of_class(request_class)
        if len(rows) == 0:
            continue
        times = rows["arrival_s"]
        figures: dict[str, Any] = {
            "requests": len(rows),
            "rate_per_s": len(rows) / duration_s,
            "peak_to_mean_400_bins": peak_to_mean(times, duration_s),
            **{f"dispersion_{w}s": index_of_dispersion(times, duration_s, w) for w in (1, 10, 60)},
            "gap_cv": gap_cv(times),
            "demand": float(service_time_s(rows).sum()) / duration_s,
            "waits_for_answer": float((rows["follows"] > 0).mean()),
            "said_before": float(rows["prefix_tokens"].sum() / rows["prompt_tokens"].sum()),
            **shares_lost(service_time_s.engine, rows),
        }
        for column in LENGTHS:
            if column != "image_tokens" or rows[column].any():
                figures[column] = {
                    "mean": float(rows[column].mean()),
                    **{f"p{p}": float(np.percentile(rows[column], p)) for p in PERCENTILES},
                    "max": int(rows[column].max()),
                }
        classes[name] = _without_nan(figures)
    return {"workload": trace.name, "duration_s": duration_s, "tenants": trace.num_tenants, "classes": classes}


def _without_nan(figures: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in figures.items()}


def table(summary: dict[str, Any]) -> str:
    """The figures of `describe` as aligned text, one column per request class."""
    classes = summary["classes"]
    lines = [
        f"{summary['workload']}: {summary['duration_s']:.6g} s, {summary['tenants']} tenant(s)",
        f"{'':28}" + "".join(f"{name:>14}" for name in classes),
    ]
    labels = {
        "requests": "requests",
        "rate_per_s": "rate, requests/s",
        "demand": "demand, share of the engine",
        "peak_to_mean_400_bins": "peak to mean, 400 bins",
        "dispersion_1s": "index of dispersion, 1 s",
        "dispersion_10s": "index of dispersion, 10 s",
        "dispersion_60s": "index of dispersion, 60 s",
        "gap_cv": "cv of gaps",
        "waits_for_answer": "wait for an answer, share",
        "said_before": "prompt said before, share",
    }
    for key, label in labels.items():
        lines.append(f"{label:28}" + "".join(f"{_number(figures[key]):>14}" for figures in classes.values()))
    for column in LENGTHS:
        for statistic in ("mean", *(f"p{p}" for p in PERCENTILES), "max"):
            cells = [figures.get(column, {}).get(statistic) for figures in classes.values()]
            if any(cell is not None for cell in cells):
                label = f"{column.replace('_', ' ')}, {statistic}"
                lines.append(f"{label:28}" + "".join(f"{_number(cell):>14}" for cell in cells))
    for name, figures in classes.items():
        lines += in_words(figures, f"the {name} requests")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def plot(trace: Trace, duration_s: float, path: Path) -> None:
    """Arrivals over time and histograms of lengths, as a PNG."""
    # Imported here: loading it takes longer than everything else, and only a finished run needs it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, 2)
    for row, (name, request_class) in enumerate(CLASSES.items()):
        count, edges = np.histogram(trace.of_class(request_class)["arrival_s"], 200, (0.0, duration_s))
        arrivals = figure.add_subplot(grid[row, :])
        arrivals.stairs(count / np.diff(edges), edges, fill=True, color=f"C{row}")
        arrivals.set(title=f"{trace.name}: {name} arrivals", ylabel="requests/s", xlim=(0, duration_s))
        arrivals.set_ylim(bottom=0)
    arrivals.set_xlabel("time (s)")
    for column, axes in zip(
        ("prompt_tokens", "output_tokens"), (figure.add_subplot(grid[2, i]) for i in (0, 1)), strict=True
    ):
        top = math.log10(max(10, int(trace.rows[column].max()))) if len(trace) else 1.0
        for row, (name, request_class) in enumerate(CLASSES.items()):
            tokens = trace.of_class(request_class)[column]
            if len(tokens):
                share = np.full(len(tokens), 1 / len(tokens))
                axes.hist(
                    tokens, np.logspace(0, top, 60).tolist(), weights=share, alpha=0.6, color=f"C{row}", label=name
                )
        axes.set(xscale="log", xlabel=column.replace("_", " "), ylabel="share of requests")
        axes.legend()
    figure.savefig(path, dpi=110)


def run(config: DictConfig) -> None:
    """Draws, prints and writes; raises UserError for bad configuration."""
    scenario = from_config(config.workload)
    slo = load_slo(config.slo)
    seed = seed_of(config.seed)
    service_time_s = ServiceTime(load_engine(config.engine))
    trace = scenario.draw(seed, service_time_s, slo)
    duration_s = scenario.length_s(service_time_s)
    summary = {**describe(trace, duration_s, service_time_s), "seed": seed}
    print(table(summary))
    folder = output_folder()
    (folder / "workload.json").write_text(json.dumps(summary, indent=1) + "\n")
    plot(trace, duration_s, folder / "workload.png")
    print(f"written to {folder}")
