"""Fidelity: the surrogate held against the live engine, policy by policy on the same traces."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import kendalltau

from flexirl.evaluation import Row, summarise

# What is set side by side: throughputs, promises kept, latencies, preemptions.
FIGURES = (
    "revenue_per_s", "immediate_attainment", "immediate_goodput_tokens_per_s", "deferred_tokens_per_s",
    "ttft_mean_s", "ttft_p50_s", "ttft_p99_s", "tpot_mean_s", "tpot_p50_s", "tpot_p99_s", "preemptions",
    "step_time_mean_s", "iterations",
)  # fmt: skip


def side_by_side(live: Sequence[Row], surrogate: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows of policy, figure, live, surrogate and difference (a share of the live figure; None where that is 0)."""
    theirs = {row["policy"]: row for row in summarise(surrogate)}
    rows = []
    for mine in summarise(live):
        for figure in FIGURES:
            measured, simulated = mine[figure], theirs[mine["policy"]][figure]
            known = measured is not None and simulated is not None and measured != 0
            rows.append(
                {
                    "policy": mine["policy"], "figure": figure, "live": measured, "surrogate": simulated,
                    "difference": simulated / measured - 1 if known else None,
                }
            )  # fmt: skip
    return rows


def rank_agreement(live: Sequence[Row], surrogate: Sequence[Row]) -> float:
    """Kendall's tau between the orders of the policies by revenue: 1 is the same order, -1 the reverse."""
    theirs = {row["policy"]: row["revenue_per_s"] for row in summarise(surrogate)}
    mine = {row["policy"]: row["revenue_per_s"] for row in summarise(live)}
    return float(kendalltau(list(mine.values()), [theirs[policy] for policy in mine]).statistic)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text, a block per policy."""
    lines = [f"{'':34}{'live':>14}{'surrogate':>14}{'difference':>12}"]
    policy = None
    for row in rows:
        if row["policy"] != policy:
            policy = row["policy"]
            lines.append(policy)
        numbers = ["-" if row[name] is None else f"{row[name]:,.4g}" for name in ("live", "surrogate")]
        difference = "-" if row["difference"] is None else f"{row['difference']:+.1%}"
        lines.append(f"  {row['figure']:32}{numbers[0]:>14}{numbers[1]:>14}{difference:>12}")
    return "\n".join(lines)


def write_fidelity(rows: Sequence[dict[str, Any]], tau: float, folder: Path) -> None:
    """fidelity.json: the rows, and how far the orders of the policies agree."""
    (folder / "fidelity.json").write_text(json.dumps({"rows": list(rows), "kendall_tau": tau}, indent=1) + "\n")
