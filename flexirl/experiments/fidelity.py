"""Fidelity: two engines held against each other, policy by policy on the same traces.

The surrogate against the live engine says how well it stands in for it; the live engine against itself, how far two
runs on this machine differ anyway.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexirl.experiments.comparison import Row, summarise

# What is set side by side: throughputs, promises kept, latencies, preemptions.
FIGURES = (
    "revenue_per_s", "immediate_attainment", "immediate_goodput_tokens_per_s", "deferred_tokens_per_s",
    "ttft_mean_s", "ttft_p50_s", "ttft_p99_s", "tpot_mean_s", "tpot_p50_s", "tpot_p99_s", "preemptions",
    "step_time_mean_s", "iterations",
)  # fmt: skip


def side_by_side(first: Sequence[Row], second: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows of policy, figure, first and second value, and difference (a share of the first; None where that is 0)."""
    theirs = {row["policy"]: row for row in summarise(second)}
    rows = []
    for mine in summarise(first):
        for figure in FIGURES:
            one, other = mine[figure], theirs[mine["policy"]][figure]
            known = one is not None and other is not None and one != 0
            rows.append(
                {
                    "policy": mine["policy"], "figure": figure, "first": one, "second": other,
                    "difference": other / one - 1 if known else None,
                }
            )  # fmt: skip
    return rows


def rank_agreement(first: Sequence[Row], second: Sequence[Row]) -> float:
    """Kendall's tau between the orders of the policies by revenue: 1 is the same order, -1 the reverse."""
    from scipy.stats import kendalltau  # a second to import, which whoever compares nothing need not wait

    theirs = {row["policy"]: row["revenue_per_s"] for row in summarise(second)}
    mine = {row["policy"]: row["revenue_per_s"] for row in summarise(first)}
    return float(kendalltau(list(mine.values()), [theirs[policy] for policy in mine]).statistic)


def table(rows: Sequence[dict[str, Any]], engines: Sequence[str]) -> str:
    """The rows as text, a block per policy; engines: the names of the first and the second."""
    lines = [f"{'':34}{engines[0]:>14}{engines[1]:>14}{'difference':>12}"]
    policy = None
    for row in rows:
        if row["policy"] != policy:
            policy = row["policy"]
            lines.append(policy)
        numbers = ["-" if row[name] is None else f"{row[name]:,.4g}" for name in ("first", "second")]
        difference = "-" if row["difference"] is None else f"{row['difference']:+.1%}"
        lines.append(f"  {row['figure']:32}{numbers[0]:>14}{numbers[1]:>14}{difference:>12}")
    return "\n".join(lines)


def write_fidelity(
    rows: Sequence[dict[str, Any]], engines: Sequence[str], tau: float, paces: Sequence[float], folder: Path
) -> None:
    """fidelity.json: the engines, the rows, how far the orders of the policies agree, the machine's paces."""
    found = {"engines": list(engines), "rows": list(rows), "kendall_tau": tau, "paces": list(paces)}
    (folder / "fidelity.json").write_text(json.dumps(found, indent=1) + "\n")
