"""Surrogate and live engine side by side, on rows made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flexirl.experiments.fidelity import FIGURES, rank_agreement, side_by_side, table, write_fidelity
from flexirl.experiments.plots import plot_fidelity


def rows(**revenue: float) -> list[dict[str, Any]]:
    """A row per policy, all of whose figures are 10 but for revenue, and preemptions, which are 0."""
    return [
        {
            "policy": policy,
            "seed": 0,
            **dict.fromkeys(FIGURES, 10.0),
            "preemptions": 0,
            "revenue_per_s": value,
            "value_per_s": value,
        }
        for policy, value in revenue.items()
    ]


ENGINES = ("live", "surrogate")
LIVE = rows(a=100.0, b=80.0, c=50.0, d=10.0)


@pytest.mark.parametrize(
    "surrogate, tau",
    [
        ({"a": 90.0, "b": 70.0, "c": 60.0, "d": 11.0}, 1.0),
        ({"d": 90.0, "c": 70.0, "b": 60.0, "a": 11.0}, -1.0),
        ({"b": 90.0, "a": 70.0, "c": 60.0, "d": 11.0}, 4 / 6),  # 5 pairs in order, 1 reversed
    ],
)
def test_agreement_of_orders(surrogate: dict[str, float], tau: float) -> None:
    assert rank_agreement(LIVE, rows(**surrogate)) == pytest.approx(tau)


def test_differences_are_shares_of_the_first_figure(tmp_path: Path) -> None:
    compared = side_by_side(LIVE, rows(a=110.0, b=60.0, c=50.0, d=10.0))
    assert len(compared) == 4 * len(FIGURES)
    by_key = {(row["policy"], row["figure"]): row for row in compared}
    assert by_key["a", "revenue_per_s"]["difference"] == pytest.approx(0.1)
    assert by_key["b", "revenue_per_s"]["difference"] == pytest.approx(-0.25)
    assert by_key["a", "preemptions"]["difference"] is None
    assert "+10.0%" in table(compared, ENGINES)
    write_fidelity(compared, ENGINES, 0.5, [1.1, 0.9], tmp_path)
    assert json.loads((tmp_path / "fidelity.json").read_text())["kendall_tau"] == 0.5
    plot_fidelity(compared, ENGINES, tmp_path / "fidelity.png")
    assert (tmp_path / "fidelity.png").stat().st_size > 5_000
