"""Program: the surrogate against a recorded run of vLLM: `python -m flexirl.validate run=FOLDER`.

Fits a profile to the run's measured operator times, replays the run's arrivals and lengths under `vllm_fcfs` and
compares what requests got. The host's time per iteration, which operators do not tell, is fitted to the first third of
the requests; the others are compared, and of their latencies nothing enters the replay. Writes validation.json,
validation.png and profile.json into the run's folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from flexirl.errors import UserError
from flexirl.experiments.program import output_folder
from flexirl.experiments.values import count_of, flag_of
from flexirl.policies.registry import make_policy
from flexirl.progress import progress_bar
from flexirl.runtime.fitting.host_time import first_third, with_host_time
from flexirl.runtime.fitting.operators import fit_profile
from flexirl.runtime.fitting.replay import Record, Served, replay
from flexirl.runtime.profile.engine import EngineProfile, save_profile

METRICS = {"ttft": "ttft_s", "tpot": "tpot_s", "e2e": "e2e_s"}
PERCENTILES = (50, 90, 95, 99)
# A saturated engine admits in waves, and which wave a request joins may hang on a single block. Replays with slightly
# other caches show how far each figure moves for so little: no replay can be trusted to be closer than that.
_CACHE_SHARES = np.linspace(0.99, 1.01, 21)


def statistics(served: Served) -> dict[tuple[str, str], float]:
    """Seconds by (metric, statistic): mean and percentiles of TTFT, TPOT and end-to-end latency, where defined."""
    figures = {}
    for metric, name in METRICS.items():
        values = getattr(served, name)
        if len(values):
            figures[metric, "mean"] = float(values.mean())
            for p in PERCENTILES:
                figures[metric, f"p{p}"] = float(np.percentile(values, p))
    return figures


def compare(real: Served, surrogate: Served, bare: Served, others: list[Served]) -> list[dict[str, Any]]:
    """Rows of metric, statistic, real and surrogate (seconds), difference, without and spread (shares of the real).

    difference: surrogate over real, less 1; without: the same of `bare`, whose engine has no host time; spread:
    standard deviation over the `others`. None where real is 0.
    """
    ours, without = statistics(surrogate), statistics(bare)
    around = [statistics(other) for other in others]
    rows = []
    for key, seconds in statistics(real).items():
        spread = np.std([figures[key] for figures in around])
        rows.append(
            {
                "metric": key[0],
                "statistic": key[1],
                "real": seconds,
                "surrogate": ours[key],
                "difference": ours[key] / seconds - 1 if seconds else None,
                "without": without[key] / seconds - 1 if seconds else None,
                "spread": float(spread / seconds) if seconds else None,
            }
        )
    return rows


def neighbours(engine: EngineProfile, record: Record, progress: bool) -> list[Served]:
    """Replays with caches up to 1% smaller and larger, as far as every request still fits."""
    rows, block_size = record.trace.rows, int(engine.values["block_size"])
    least = -(-int((rows["prompt_tokens"] + rows["output_tokens"]).max()) // block_size)
    policy = make_policy("vllm_fcfs")
    blocks = np.maximum(np.round(_CACHE_SHARES * engine.values["kv_blocks"]).astype(int), least)
    others = []
    with progress_bar(len(blocks), " replays", progress, leave=False) as bar:
        for count in blocks:
            others.append(replay(policy, engine.replace(kv_blocks=int(count)), record.trace, record.asynchronous)[0])
            bar.update()
    return others


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of `compare` as aligned text, shares in percent."""
    lines = [
        f"{'metric':8}{'statistic':10}{'real, s':>12}{'surrogate, s':>14}{'difference':>12}{'without':>10}{'spread':>9}"
    ]
    for row in rows:
        none = row["difference"] is None
        shares = ["-" if none else f"{row[name]:+.2%}" for name in ("difference", "without")]
        shares.append("-" if none else f"{row['spread']:.2%}")
        lines.append(
            f"{row['metric']:8}{row['statistic']:10}{row['real']:>12.4g}{row['surrogate']:>14.4g}"
            f"{shares[0]:>12}{shares[1]:>10}{shares[2]:>9}"
        )
    return "\n".join(lines)


def plot(record: Record, series: np.ndarray, path: Path) -> None:
    """Running and waiting requests and KV use over time, recorded and replayed, as a PNG."""
    # Imported here: loading it takes longer than everything else, and only a finished run needs it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, 1, sharex=True)
    for axes, (column, label) in zip(
        panels,
        (("running", "running requests"), ("waiting", "waiting requests"), ("kv_share", "KV cache in use, share")),
        strict=True,
    ):
        axes.plot(record.series["now_s"], record.series[column], color="C0", label="vLLM, recorded")
        axes.plot(series["now_s"], series[column], color="C1", linestyle="--", label="surrogate")
        axes.set(ylabel=label, xlim=(0, None), ylim=(0, None))
    panels[0].set_title(record.trace.name)
    panels[0].legend()
    panels[-1].set_xlabel("time since the first arrival (s)")
    figure.savefig(path, dpi=110)


def run(config: DictConfig) -> None:
    """Fits, replays, prints and writes; raises UserError for a folder that is no recorded run."""
    if config.run is None:
        raise UserError("run= is missing; it names the folder of a recorded run.")
    record = Record.read(str(config.run))
    given = {
        name: None if value is None else count_of(value, f"engine.{name}") for name, value in config.engine.items()
    }
    engine = fit_profile(str(config.run), given={str(name): value for name, value in given.items()})
    policy = make_policy("vllm_fcfs")
    bare, _ = replay(policy, engine, record.trace, record.asynchronous)
    engine = with_host_time(engine, record, policy)
    surrogate, series = replay(policy, engine, record.trace, record.asynchronous)
    rest = slice(first_third(len(record.trace)).stop, None)
    around = neighbours(engine, record, flag_of(config.progress, "progress"))
    real, ours, without = (served.part(rest) for served in (record.served, surrogate, bare))
    rows = compare(real, ours, without, [other.part(rest) for other in around])
    print(f"{record.trace.name}: {len(record.trace)} requests")
    for name, where in engine.origin.items():
        if where.startswith(("not recorded", "set by")):
            print(f"{name} {engine.values[name]}: {where}")
    fit = engine.fit
    print(f"profile: mean error {fit['mape']:.2%}, 95th percentile {fit['p95_error']:.2%}, R2 {fit['r2']:.4f}")
    if rest.start:
        print(
            f"host time {1e3 * engine.values['host_s']:.3f} ms an iteration, by the first {rest.start} requests; the "
            "others follow, with it and without"
        )
    print(table(rows))
    if engine.values["prefix_caching"] and not record.trace.rows["prefix_tokens"].any():
        print("Prefix caching was on, but the record does not say which prompts began alike: none shares blocks.")
    folder = output_folder()
    (folder / "validation.json").write_text(json.dumps(rows, indent=1) + "\n")
    save_profile(engine, folder / "profile.json")
    plot(record, series, folder / "validation.png")
    print(f"written to {folder}")
