"""Program: draws one scenario and describes it: `python -m flexirl.workload workload=medium_bursty`.

Prints a table, and writes workload.json and workload.png into the run's folder.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from numpy.typing import NDArray
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from flexirl.errors import UserError
from flexirl.workloads.config import from_config
from flexirl.workloads.scenario import SLO, ServiceTime
from flexirl.workloads.statistics import gap_cv, index_of_dispersion, peak_to_mean
from flexirl.workloads.trace import DEFERRED, IMMEDIATE, Trace

CLASSES = {"immediate": IMMEDIATE, "deferred": DEFERRED}
LENGTHS = ("prompt_tokens", "output_tokens", "image_tokens")
PERCENTILES = (5, 50, 95, 99)


def token_service_time_s(rows: np.ndarray) -> NDArray[np.float64]:
    """Seconds of an engine that costs 20 microseconds per prompt token and 300 per output token."""
    return rows["prompt_tokens"] * 20e-6 + rows["output_tokens"] * 300e-6


def describe(trace: Trace, duration_s: float, service_time_s: ServiceTime = token_service_time_s) -> dict[str, Any]:
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
    }
    for key, label in labels.items():
        lines.append(f"{label:28}" + "".join(f"{_number(figures[key]):>14}" for figures in classes.values()))
    for column in LENGTHS:
        for statistic in ("mean", *(f"p{p}" for p in PERCENTILES), "max"):
            cells = [figures.get(column, {}).get(statistic) for figures in classes.values()]
            if any(cell is not None for cell in cells):
                label = f"{column.replace('_', ' ')}, {statistic}"
                lines.append(f"{label:28}" + "".join(f"{_number(cell):>14}" for cell in cells))
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def plot(trace: Trace, duration_s: float, path: Path) -> None:
    """Arrivals over time and histograms of lengths, as a PNG."""
    # Imported here: loading it takes longer than everything else, and only a finished run needs it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2)
    arrivals = figure.add_subplot(grid[0, :])
    bins = 200
    for name, request_class in CLASSES.items():
        times = trace.of_class(request_class)["arrival_s"]
        if len(times):
            count, edges = np.histogram(times, bins, (0.0, duration_s))
            arrivals.stairs(count / np.diff(edges), edges, label=name, fill=name == "immediate", alpha=0.8)
    arrivals.set(title=f"{trace.name}: arrivals", xlabel="time (s)", ylabel="requests/s", yscale="symlog")
    arrivals.set_ylim(bottom=0)
    for column, axes in zip(
        ("prompt_tokens", "output_tokens"), (figure.add_subplot(grid[1, i]) for i in (0, 1)), strict=True
    ):
        top = math.log10(max(10, int(trace.rows[column].max()))) if len(trace) else 1.0
        for name, request_class in CLASSES.items():
            tokens = trace.of_class(request_class)[column]
            if len(tokens):
                axes.hist(
                    tokens,
                    np.logspace(0, top, 60).tolist(),
                    weights=np.full(len(tokens), 1 / len(tokens)),
                    alpha=0.6,
                    label=name,
                )
        axes.set(xscale="log", xlabel=column.replace("_", " "), ylabel="share of requests")
    if len(trace):
        arrivals.legend(loc="upper right")
    figure.savefig(path, dpi=110)


def run(config: DictConfig) -> None:
    """Draws, prints and writes; raises UserError for bad configuration."""
    scenario = from_config(config.workload)
    try:
        slo = SLO(float(config.slo.ttft_s), float(config.slo.tpot_s))
        seed = int(config.seed)
    except (TypeError, ValueError) as error:
        raise (
            error if isinstance(error, UserError) else UserError(f"seed and slo should be numbers ({error}).")
        ) from None
    if seed < 0:
        raise UserError(f"seed={seed} is out of range; a seed is 0 or more.")
    trace = scenario.draw(seed, token_service_time_s, slo)
    duration_s = scenario.length_s(token_service_time_s)
    summary = {**describe(trace, duration_s), "seed": seed}
    print(table(summary))
    folder = Path(HydraConfig.get().runtime.output_dir)
    (folder / "workload.json").write_text(json.dumps(summary, indent=1) + "\n")
    plot(trace, duration_s, folder / "workload.png")
    print(f"written to {folder}")


@hydra.main(version_base="1.3", config_path="conf", config_name="workload_stats")
def _hydra_main(config: DictConfig) -> None:
    try:
        run(config)
    except UserError as error:
        _fail(error)


def _fail(error: Exception) -> None:
    # Hydra's messages span lines and end in places to look that mean nothing to a user.
    message = re.split("Config search path:|See https:", str(error))[0]
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """Entry point: exits with 2 and one sentence where the user got something wrong."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what it would print, so that we can say it in a sentence
    try:
        _hydra_main()
    except (HydraException, OmegaConfBaseException) as error:
        _fail(error)


if __name__ == "__main__":
    main()
