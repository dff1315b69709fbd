"""Policies compared on the same arrivals: the leaderboard and its files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flexirl.envs.fleet import Fleet, Task
from flexirl.envs.rollout import play
from flexirl.experiments.seeds import COMPARISON_SEED, TUNING_SEED
from flexirl.policies.heuristics.base import Heuristic, tune
from flexirl.policies.interface.policy import Policy
from flexirl.policies.registry import make_policy
from flexirl.progress import progress_bar
from flexirl.runtime.profile.capacity import in_words, shares_lost
from flexirl.runtime.profile.pace import at_pace
from flexirl.runtime.simulator.simulation import Run, simulate
from flexirl.workloads.trace import DEFERRED, IMMEDIATE, Trace

if TYPE_CHECKING:
    from flexirl.runtime.live.executor import Executor

ANCHORS = ("immediate_only", "deferred_only")

Row = dict[str, Any]


# Runs a policy on a trace, with a seed for what the trace leaves open.
Runner = Callable[[Policy, Task, Trace, int], Run]


def interval_s(policy: Policy, task: Task) -> float:
    """Seconds between decisions: those a checkpoint was trained with, or the task's."""
    return getattr(policy, "interval_s", None) or task.interval_s


def on_surrogate(policy: Policy, task: Task, trace: Trace, seed: int) -> Run:
    """One run on the surrogate engine."""
    return simulate(
        policy, task.engine, trace, task.slo, task.duration_s(), task.scenario.warmup_s, interval_s(policy, task), seed,
        task.prices,
    )  # fmt: skip


def on_surrogate_at(pace: float) -> Runner:
    """Runs on the surrogate whose iterations take `pace` times as long, on the same arrivals."""

    def run(policy: Policy, task: Task, trace: Trace, seed: int) -> Run:
        return on_surrogate(policy, replace(task, engine=at_pace(task.engine, pace)), trace, seed)

    return run


def on_live(executor: Executor) -> Runner:
    """Runs on a live engine with this executor."""
    from flexirl.runtime.live.run import run_live  # PyTorch with it

    def run(policy: Policy, task: Task, trace: Trace, seed: int) -> Run:
        return run_live(
            policy, executor, trace, task.slo, task.duration_s(), task.scenario.warmup_s, interval_s(policy, task),
            seed, task.prices,
        )  # fmt: skip

    return run


@dataclass(frozen=True)
class Comparison:
    """Leaderboard rows (one per policy and seed) and, per policy, its run on the first seed.

    searched: rules with the knobs that were searched for this comparison.
    """

    rows: list[Row]
    first_runs: dict[str, Run]
    searched: dict[str, Heuristic]


def compare(
    task: Task,
    names: Sequence[str],
    seeds: int,
    tuning_task: Task | None = None,
    base_seed: int = 0,
    runner: Runner = on_surrogate,
    progress: bool = True,
) -> Comparison:
    """Runs every policy on `seeds` episodes of the task; the anchors always run, since figures refer to them.

    tuning_task: where knobs that are searched per scenario are searched; the task itself, on other seeds, by default.
    runner: the engine; the surrogate, or a live one; progress: shows a bar. Raises UserError for an unknown policy.
    """
    names = list(dict.fromkeys([*names, *ANCHORS]))
    policies = [make_policy(name) for name in names]
    traces = episodes(task, seeds, base_seed)
    rows: list[Row] = []
    first_runs: dict[str, Run] = {}
    searched: dict[str, Heuristic] = {}
    with progress_bar(len(policies) * seeds, " runs", progress, desc="comparing", leave=False) as bar:
        for policy in policies:
            bar.set_postfix_str(policy.name, refresh=False)
            ready = tune(policy, TuningEpisodes(tuning_task or task, base_seed), task.slo, base_seed)
            if isinstance(ready, Heuristic) and ready != policy:
                searched[policy.name] = ready
            for i, trace in enumerate(traces):
                run = run_policy(ready, task, trace, i, runner)
                rows.append(row_of(policy, task, trace, i, run))
                if i == 0:
                    first_runs[policy.name] = run
                bar.update()
    relate_to_anchors(rows)
    return Comparison(rows, first_runs, searched)


def episodes(task: Task, seeds: int, base_seed: int) -> list[Trace]:
    """The arrivals on which policies are compared, one trace per seed."""
    return [task.draw(COMPARISON_SEED + base_seed * 1000 + i) for i in range(seeds)]


def row_of(policy: Policy, task: Task, trace: Trace, seed: int, run: Run) -> Row:
    """A leaderboard row, still without what relates it to the anchors."""
    return {
        "policy": policy.name, "workload": task.scenario.name, "engine": task.engine.name,
        "load": load_of(task, trace), "seed": seed,
        **shares_lost(task.engine, trace.as_asked().of_class(IMMEDIATE)), **run.figures,
    }  # fmt: skip


def run_policy(policy: Policy, task: Task, trace: Trace, seed: int, runner: Runner = on_surrogate) -> Run:
    """One run; the anchor `deferred_only` runs on the trace without its immediate requests."""
    if policy.name == "deferred_only":
        trace = trace.only(DEFERRED)
    return runner(policy, task, trace, seed)


def load_of(task: Task, trace: Trace) -> float:
    """The immediate demand of a trace as a share of the engine's capacity."""
    rows = trace.rows[trace.rows["request_class"] != DEFERRED]
    return float(task.service_time_s(rows).sum() / task.duration_s()) if len(rows) else 0.0


class TuningEpisodes:
    """The episodes of a task on which knobs are searched; see `flexirl.policies.heuristics.base.Episodes`."""

    def __init__(self, task: Task, base_seed: int, seeds: int = 3) -> None:
        self._task, self._seeds = task, seeds
        self._seed = TUNING_SEED + base_seed * 1000
        self._traces: list[Trace] = []

    def attainment(self, policy: Policy) -> float:
        """Share of immediate promises that a policy keeps, averaged over the episodes."""
        if not self._traces:
            self._traces = [self._task.draw(self._seed + i) for i in range(self._seeds)]
        runs = [run_policy(policy, self._task, trace, i) for i, trace in enumerate(self._traces)]
        return _mean([run.figures["immediate_attainment"] for run in runs]) or 0.0

    def worths(self, settings: np.ndarray) -> np.ndarray:
        """Worth of constant dial settings, as `worth_of_dials` has it: (n, dials) to (n,)."""
        return worth_of_dials([self._task], settings, self._seeds, self._seed)


def worth_of_dials(tasks: Sequence[Task], settings: np.ndarray, episodes: int, seed: int) -> np.ndarray:
    """Mean `worth_share` of constant dial settings over so many episodes of the tasks: (n, dials) to (n,)."""
    fleet = Fleet([replace(task, action="dials") for task in tasks], episodes * len(settings), len(settings), episodes)
    actions = np.tile(settings, (episodes, 1))
    shares = [figures["worth_share"] for figures in play(fleet, seed, lambda _: actions).figures]
    fleet.close()
    return np.reshape(shares, (episodes, len(settings))).mean(axis=0)


def relate_to_anchors(rows: list[Row]) -> None:
    """Adds to the rows of one comparison, anchors among them, how they stand to the anchor of the same seed."""
    anchors = {(row["policy"], row["seed"]): row for row in rows if row["policy"] in ANCHORS}
    for row in rows:
        immediate, deferred = (anchors[name, row["seed"]] for name in ANCHORS)
        row["deferred_share_of_deferred_only"] = _ratio(row["deferred_tokens_per_s"], deferred["deferred_tokens_per_s"])
        for name in ("ttft_p99", "tpot_p99"):
            row[f"{name}_over_immediate_only"] = _ratio(row[f"{name}_s"], immediate[f"{name}_s"])


def _ratio(value: float | None, reference: float | None) -> float | None:
    return value / reference if value is not None and reference else None


def _mean(values: Sequence[float | int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def summarise(rows: Sequence[Row]) -> list[Row]:
    """One row per policy, the mean of each figure over seeds, most value first; `revenue_std` over seeds beside."""
    summary: list[Row] = []
    for policy in dict.fromkeys(row["policy"] for row in rows):
        mine = [row for row in rows if row["policy"] == policy]
        merged: Row = {"policy": policy, "seeds": len(mine)}
        for name, value in mine[0].items():
            if name not in ("policy", "seed"):
                merged[name] = value if isinstance(value, str) else _mean([row[name] for row in mine])
        merged["revenue_std"] = float(np.std([row["revenue_per_s"] for row in mine]))
        summary.append(merged)
    return sorted(summary, key=lambda row: -row["value_per_s"])


COLUMNS = (
    ("policy", "policy", "{}"),
    ("value/s", "value_per_s", "{:,.0f}"),
    ("revenue/s", "revenue_per_s", "{:,.0f}"),
    ("attainment", "immediate_attainment", "{:.3f}"),
    ("given up", "given_up", "{:.3f}"),
    ("TTFT p99 s", "ttft_p99_s", "{:.2f}"),
    ("deferred tok/s", "deferred_tokens_per_s", "{:,.0f}"),
    ("on time", "deferred_on_time", "{:.3f}"),
    ("cached", "immediate_cached", "{:.3f}"),
    ("TPOT p99 s", "tpot_p99_s", "{:.4f}"),
    ("preempt.", "preemptions", "{:,.0f}"),
    ("KV use", "kv_utilisation", "{:.2f}"),
)


def table(rows: Sequence[Row]) -> str:
    """The leaderboard as text, means over seeds."""
    cells = [[title for title, _, _ in COLUMNS]]
    for row in summarise(rows):
        cells.append(["-" if row[name] is None else form.format(row[name]) for _, name, form in COLUMNS])
    name_width, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
    lines = [
        "  ".join([name.ljust(name_width), *(cell.rjust(width) for cell, width in zip(rest, widths, strict=True))])
        for name, *rest in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *footnotes(rows)])


def footnotes(rows: Sequence[Row]) -> list[str]:
    """What of the requests the engine could not serve, in sentences; the same for all policies."""
    first = [row for row in rows if row["policy"] == rows[0]["policy"]]
    lost = {name: _mean([row[name] for row in first]) or 0.0 for name in ("unservable", "unservable_work", "cut_short")}
    return in_words(lost, "the immediate requests")


def write_leaderboard(rows: Sequence[Row], folder: Path) -> None:
    """leaderboard.json and leaderboard.csv: every row, policy by policy and seed by seed."""
    (folder / "leaderboard.json").write_text(json.dumps(list(rows), indent=1) + "\n")
    with open(folder / "leaderboard.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
