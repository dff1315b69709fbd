"""What a comparison says, in words: of the workload before it runs, of the policies when it has run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flexirl.envs.fleet import Task
from flexirl.experiments.comparison import ANCHORS, Row, summarise
from flexirl.policies.rules import rule_names
from flexirl.workloads.scenario import Recorded
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

BASELINE = "vllm_priority"
SAME = 0.005  # of the value: less between the best and the worst is no difference to speak of


def workload_in_words(task: Task) -> list[str]:
    """How much of the engine the workload asks for, and what of it is not recorded."""
    scenario, engine = task.scenario, task.engine.name
    stream = scenario.immediate
    if not isinstance(stream, Recorded):
        return []
    trace = stream.trace
    loads = {which: stream.own_load(which, task.service_time_s) for which in (IMMEDIATE, DEFERRED)}
    counts = {which: len(trace.of_class(which)) for which in loads}
    whole_s = stream.length_s(None, task.service_time_s)
    recorded_s = whole_s / stream.time_factor(task.service_time_s)
    said = [
        f"{trace.name}: {counts[IMMEDIATE]:,} immediate requests in {recorded_s:,.0f} s, which need "
        f"{loads[IMMEDIATE]:.0%} of {engine}, and {counts[DEFERRED]:,} deferred ones, which need {loads[DEFERRED]:.0%}."
    ]
    if stream.load is not None:
        said.append(
            f"Played in {whole_s:,.0f} s, so that immediate requests need {stream.load:.0%}, as workload.load says; "
            "null keeps the recorded times."
        )
    if scenario.duration_s is not None and scenario.duration_s < whole_s:
        said.append(f"Each run is {scenario.duration_s:,.0f} s from a random place of it.")
    else:
        said.append("Each run plays all of it: an interval over runs speaks of these arrivals, not of other days.")
    if scenario.invents_deferred:
        said.append("Deferred work is not recorded: what is deferred here is made up, by workload/deferred.")
    return said


class Lead(NamedTuple):
    """How much more one policy earns than another: mean over seeds, and half the width of its 95% interval."""

    mean: float
    half_width: float | None


def lead(rows: Sequence[Row], policy: str, other: str) -> Lead:
    """The difference in value per second, seed by seed, by Student's t; no interval for a single seed."""
    values = {(row["policy"], row["seed"]): row["value_per_s"] for row in rows}
    differences = [value - values[other, seed] for (name, seed), value in values.items() if name == policy]
    if len(differences) < 2:
        return Lead(float(np.mean(differences)), None)
    from scipy.stats import t  # takes a second to import

    width = float(t.ppf(0.975, len(differences) - 1) * np.std(differences, ddof=1) / np.sqrt(len(differences)))
    return Lead(float(np.mean(differences)), width)


def training_in_words(history: Sequence[Mapping[str, float]]) -> str:
    """What training was good for, by the validations of `Training.history`, the first of which is of the start."""
    start, best = history[0], max(history, key=lambda row: row["worth_share"])
    if best is start:
        return "Training earned nothing: no validation after it was above that of the start, which is what is exported."
    gained = best["worth_share"] / start["worth_share"] - 1 if start["worth_share"] > 0 else float("inf")
    return (
        f"Training raised what validation earns by {gained:.1%} in {best['steps']:,.0f} decisions: value per second "
        f"went from {start['value_per_s']:,.0f} to {best['value_per_s']:,.0f}."
    )


def answer_in_words(rows: Sequence[Row], files: Mapping[str, Path]) -> list[str]:
    """Who earns most, how much more than `vllm_priority` and than the best rule, what it costs, what to run next.

    files: of policies that are to be run from one, by name.
    """
    ranked = [row for row in summarise(rows) if row["policy"] not in ANCHORS]
    if not ranked:
        return []
    best = ranked[0]
    name = str(best["policy"])
    if best["value_per_s"] <= 0:
        return ["None of them earns anything: no request was served as promised."]
    if best["value_per_s"] - ranked[-1]["value_per_s"] < SAME * abs(best["value_per_s"]):
        return [f"All of them earn the same within {SAME:.1%}: where an engine has room for all, no policy matters."]
    said = [f"{name} earns most."]
    rules = [str(row["policy"]) for row in ranked if row["policy"] in rule_names()]
    others = {BASELINE: BASELINE} if BASELINE in rules else {}
    if rules:
        others.setdefault(rules[0], f"the best rule, {rules[0]},")
    for other, title in others.items():
        if other != name:
            said.append(_compared(rows, name, other, title))
    said += _cost(ranked, best)
    place = files.get(name, name)
    said.append(f"To run it: python -m flexirl.generate prompts=FILE.jsonl {shlex.quote(f'policy={place}')}")
    return said


def _compared(rows: Sequence[Row], name: str, other: str, title: str) -> str:
    found = lead(rows, name, other)
    base = float(np.mean([row["value_per_s"] for row in rows if row["policy"] == other])) or 1.0
    share = f"{found.mean / base:+.1%}"
    if found.half_width is None:
        return f"Against {title} {share} of value, on a single run: seeds=5 would tell how sure that is."
    sure = "" if abs(found.mean) > found.half_width else ": no difference that so few runs show"
    return f"Against {title} {share} of value, +- {found.half_width / base:.1%} (95% interval){sure}."


def _cost(ranked: Sequence[Row], best: Row) -> list[str]:
    """Latency of the best against the baseline's, where both are there."""
    base = next((row for row in ranked if row["policy"] == BASELINE), None)
    if base is None or base is best or best["ttft_p99_s"] is None or base["ttft_p99_s"] is None:
        return []
    return [
        f"TTFT P99 is {best['ttft_p99_s']:.2f} s where {BASELINE} has {base['ttft_p99_s']:.2f} s; promises kept "
        f"{best['immediate_attainment']:.1%} and {base['immediate_attainment']:.1%}; deferred tokens per second "
        f"{best['deferred_tokens_per_s']:,.0f} and {base['deferred_tokens_per_s']:,.0f}."
    ]
