"""Scores, intervals, wins, capacity and sensitivity against cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from flexirl.benchmarks import statistics
from flexirl.experiments.comparison import Row


def row(policy: str, scenario: str, seed: int, revenue: float, suite: str = "s", **more: object) -> Row:
    """A row with what the statistics read."""
    return {
        "suite": suite, "scenario": scenario, "labels": {"load": float(more.pop("load", 0.5))}, "policy": policy,  # type: ignore[arg-type]
        "seed": seed, "revenue_per_s": revenue, "share_of_upper_bound": None, "immediate_attainment": 1.0, **more,
    }  # fmt: skip


def test_scores_average_seeds_then_scenarios_then_suites() -> None:
    rows = [
        row("a", "x", 0, 10), row("a", "x", 1, 20), row("a", "y", 0, 30), row("a", "z", 0, 5, "t"),
        row("b", "x", 0, 20), row("b", "x", 1, 10), row("b", "y", 0, 15), row("b", "z", 0, 10, "t"),
        row("immediate_only", "x", 0, 99),
    ]  # fmt: skip
    scores = statistics.revenue_scores(rows)
    assert scores.policies == ["b", "a"] and scores.suites == ["s", "t"]
    by_policy = dict(zip(scores.policies, scores.by_suite.tolist(), strict=True))
    assert by_policy == {"a": [(0.75 + 1) / 2, 0.5], "b": [(0.75 + 0.5) / 2, 1.0]}
    assert scores.mean() == pytest.approx([(0.625 + 1) / 2, (0.875 + 0.5) / 2])


def test_with_a_bound_scores_are_shares_of_it() -> None:
    rows = [row(name, "x", 0, 1, share_of_upper_bound=share) for name, share in (("a", 0.4), ("b", 0.6))]
    scores = statistics.revenue_scores(rows)
    assert scores.policies == ["b", "a"] and scores.mean().tolist() == [0.6, 0.4]


def test_the_interval_covers_the_true_mean_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(80):
        values = 0.5 + 0.1 * rng.standard_normal((1, 30, 2))
        places = [("s", str(i)) for i in range(30)]
        low, high = statistics.Scores(values, ["a"], places, "").interval()[0]
        covered += low <= 0.5 <= high
    assert 0.88 <= covered / 80 <= 1.0


def test_a_constant_lead_is_certain_however_much_scenarios_differ() -> None:
    hard = np.linspace(0.1, 0.8, 10)
    values = np.stack([hard + 0.1, hard])[:, :, None]
    scores = statistics.Scores(values, ["a", "b"], [("s", str(i)) for i in range(10)], "")
    assert scores.behind_first() == pytest.approx(np.array([[0, 0, 0], [0.1, 0.1, 0.1]]))
    low, high = scores.interval()[0]
    assert high - low > 0.1


def test_wins() -> None:
    values = np.array([[[10.0, 10.0], [10.0, np.nan]], [[9.0, 10.001], [11.0, np.nan]]])
    scores = statistics.Scores(values, ["a", "b"], [("s", "x"), ("s", "y")], "")
    assert statistics.wins(scores) == pytest.approx(np.array([[0.5, 0.5], [0.5, 0.5]]))
    values[1, 0, 0] = 12.0
    assert statistics.wins(scores) == pytest.approx(np.array([[0.5, 1 / 6], [5 / 6, 0.5]]))


def test_capacity_ends_at_the_first_load_that_is_not_kept() -> None:
    kept = {0.3: 1.0, 0.6: 0.992, 0.9: 0.98, 1.2: 1.0}
    rows = [row("a", str(load), 0, 1, load=load, immediate_attainment=kept[load]) for load in (0.9, 0.3, 1.2, 0.6)]
    assert statistics.capacities(rows) == [{"family": "s", "policy": "a", "capacity": 0.6, "highest": 1.2}]
    rows[1]["immediate_attainment"] = 0.5
    assert statistics.capacities(rows)[0]["capacity"] == 0.0


def test_sensitivity_separates_outer_from_inner() -> None:
    """TTFT is a product of a factor of the outer and one of the inner distribution."""
    outer, inner = {"zipf": 4.0, "uniform": 1.0}, {"zipf": 9.0, "uniform": 1.0}
    rows = [
        row("a", f"{o}{i}", 0, 1, "distributions", ttft_mean_s=outer[o] * inner[i])
        | {"labels": {"outer": o, "inner": i, "load": 0.5}}
        for o in outer for i in inner
    ]  # fmt: skip
    (found,) = statistics.sensitivities(rows, "a", ["ttft_mean_s"])
    assert found.outer == pytest.approx({"zipf": 2.0, "uniform": 0.5})
    assert found.inner == pytest.approx({"zipf": 3.0, "uniform": 1 / 3})
    assert found.spread == pytest.approx(np.std(np.log([36, 4, 9, 1])))
