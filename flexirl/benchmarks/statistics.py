"""What the rows of a benchmark say: scores with confidence intervals, wins and losses, capacity, sensitivity.

A row is one of leaderboard.json plus suite, scenario, labels (of the suite's axes), upper_bound_revenue_per_s and
share_of_upper_bound (both None where the bound was not asked for).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from flexirl.experiments.comparison import ANCHORS, Row

RESAMPLES, INTERVAL = 2000, (2.5, 97.5)
KEPT = 0.99  # attainment that counts as keeping the promise
TIE = 1e-3  # revenues that differ by less than this share of the larger are level


@dataclass(frozen=True)
class Scores:
    """Policies by scenario and seed, as one array.

    values: float64 (policies, scenarios, seeds), NaN where a scenario has fewer seeds; policies: names, best first;
    scenarios: (suite, scenario); meaning: what the values are, in words.
    """

    values: np.ndarray
    policies: list[str]
    scenarios: list[tuple[str, str]]
    meaning: str

    @cached_property
    def by_suite(self) -> np.ndarray:
        """Mean over the scenarios of each suite: float64 (policies, suites), suites in order of appearance."""
        by_scenario = np.nanmean(self.values, axis=2)
        return np.stack([by_scenario[:, self.of_suite(suite)].mean(axis=1) for suite in self.suites], axis=1)

    @property
    def suites(self) -> list[str]:
        """Names of the suites."""
        return list(dict.fromkeys(suite for suite, _ in self.scenarios))

    def of_suite(self, suite: str) -> np.ndarray:
        """Numbers of a suite's scenarios."""
        return np.flatnonzero([name == suite for name, _ in self.scenarios])

    def mean(self) -> np.ndarray:
        """Mean over suites, of each the mean over its scenarios, of each the mean over its seeds: (policies,)."""
        return self.by_suite.mean(axis=1)

    def interval(self) -> np.ndarray:
        """95% confidence interval of `mean`: float64 (policies, 2)."""
        return np.percentile(self._resampled, INTERVAL, axis=0).T

    def behind_first(self) -> np.ndarray:
        """How far each mean lies below the first policy's, and the 95% interval of that: float64 (policies, 3).

        Paired: all policies stand on the same draws, so what is common to them, how hard a scenario is, cancels.
        """
        gaps = self._resampled[:, :1] - self._resampled
        means = self.mean()
        return np.column_stack([means[0] - means, np.percentile(gaps, INTERVAL, axis=0).T])

    @cached_property
    def _resampled(self) -> np.ndarray:
        """Means of bootstrap samples: float64 (RESAMPLES, policies).

        The percentile bootstrap (Efron, 1979), clustered: scenarios are drawn anew within each suite, then seeds within
        each scenario, the same ones for every policy.
        """
        rng = np.random.default_rng(0)
        means = np.zeros((RESAMPLES, len(self.policies)))
        seeds = (~np.isnan(self.values[0])).sum(axis=1)
        for number in range(RESAMPLES):
            for suite in self.suites:
                members = self.of_suite(suite)
                drawn = rng.choice(members, len(members))
                columns = (rng.random((len(drawn), self.values.shape[2])) * seeds[drawn, None]).astype(int)
                counted = np.arange(self.values.shape[2]) < seeds[drawn, None]
                picked = np.where(counted, self.values[:, drawn[:, None], columns], 0.0)
                means[number] += (picked.sum(axis=2) / seeds[drawn]).mean(axis=1) / len(self.suites)
        return means


def scores(rows: Sequence[Row], figure: Callable[[Row], float | None], meaning: str) -> Scores:
    """`figure` of every row, in the order of the policies' means; scenarios where a policy has none are left out."""
    found: dict[tuple[str, str], dict[str, list[float | None]]] = {}
    for row in rows:
        policies = found.setdefault((row["suite"], row["scenario"]), {})
        policies.setdefault(row["policy"], []).append(figure(row))
    names = list(dict.fromkeys(row["policy"] for row in rows))
    whole = {place: of for place, of in found.items() if all(None not in of.get(name, [None]) for name in names)}
    width = max((len(values) for of in whole.values() for values in of.values()), default=0)
    values = np.full((len(names), len(whole), width), np.nan)
    for s, of in enumerate(whole.values()):
        for p, name in enumerate(names):
            values[p, s, : len(of[name])] = of[name]
    unordered = Scores(values, names, list(whole), meaning)
    if not whole:
        return unordered
    order = np.argsort(-unordered.mean(), kind="stable")
    return Scores(values[order], [names[i] for i in order], list(whole), meaning)


def revenue_scores(rows: Sequence[Row]) -> Scores:
    """Revenue as a share of the upper bound, or, where no bound was asked for, of the best policy's in the episode.

    The anchors are left out: they serve one class as if the other were not there.
    """
    judged = without_anchors(rows)
    if all(row["share_of_upper_bound"] is not None for row in judged):
        return scores(judged, lambda row: row["share_of_upper_bound"], "revenue, share of the upper bound")
    best: dict[tuple[str, str, int], float] = {}
    for row in judged:
        episode = (row["suite"], row["scenario"], row["seed"])
        best[episode] = max(best.get(episode, 0.0), row["revenue_per_s"])

    def share(row: Row) -> float:
        return row["revenue_per_s"] / (best[row["suite"], row["scenario"], row["seed"]] or 1.0)

    return scores(judged, share, "revenue, share of the best policy's")


def without_anchors(rows: Iterable[Row]) -> list[Row]:
    """The rows of policies that serve both classes, or all of them where there is no such policy."""
    rows = list(rows)
    return [row for row in rows if row["policy"] not in ANCHORS] or rows


def wins(revenue: Scores) -> np.ndarray:
    """Share of the episodes in which the row's policy earns more than the column's: float64 (policies, policies).

    Level ones count half.
    """
    earned = revenue.values.reshape(len(revenue.policies), -1)
    earned = earned[:, ~np.isnan(earned[0])]
    difference = earned[:, None] - earned[None]
    level = np.abs(difference) <= TIE * np.maximum(np.abs(earned[:, None]), np.abs(earned[None]))
    return np.where(level, 0.5, difference > 0).mean(axis=2)


def families(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of scenarios that differ in their load alone, by what they share; those without a load are left out."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if isinstance(row["labels"].get("load"), float):
            rest = ", ".join(f"{axis} {label}" for axis, label in row["labels"].items() if axis != "load")
            found.setdefault(f"{row['suite']}: {rest}" if rest else row["suite"], []).append(row)
    return {name: of for name, of in found.items() if len({row["labels"]["load"] for row in of}) > 1}


def capacities(rows: Sequence[Row]) -> list[Row]:
    """Per family and policy, the highest load at which, as at all lower ones, at least 99% of promises are kept.

    Entries: family, policy, capacity (0 where not even the lowest load is kept), highest (load tried).
    """
    found = []
    for family, of in families(rows).items():
        loads = sorted({row["labels"]["load"] for row in of})
        for policy in dict.fromkeys(row["policy"] for row in of):
            capacity = 0.0
            for load in loads:
                kept = mean_of(
                    (row for row in of if row["policy"] == policy and row["labels"]["load"] == load), KEPT_BY
                )
                if kept is None or kept < KEPT:
                    break
                capacity = load
            found.append({"family": family, "policy": policy, "capacity": capacity, "highest": loads[-1]})
    return found


KEPT_BY = "immediate_attainment"


def mean_of(rows: Iterable[Row], figure: str) -> float | None:
    """Mean of a figure over the rows that have it."""
    known = [row[figure] for row in rows if row[figure] is not None]
    return float(np.mean(known)) if known else None


@dataclass(frozen=True)
class Sensitivity:
    """How much a figure depends on how requests arrive, at one load.

    spread: standard deviation of the logarithm of the figure over all distributions; effects: by outer and inner
    distribution, its mean over the distributions paired with it, relative to the mean over all pairs.
    """

    load: float
    figure: str
    spread: float
    outer: dict[str, float]
    inner: dict[str, float]


def sensitivities(rows: Sequence[Row], policy: str, figures: Sequence[str]) -> list[Sensitivity]:
    """Of one policy in the suite `distributions`, at each load at which the figure is defined everywhere."""
    mine = [row for row in rows if row["suite"] == "distributions" and row["policy"] == policy]
    found = []
    for load in sorted({row["labels"]["load"] for row in mine}):
        for figure in figures:
            values = {
                place: mean_of((row for row in mine if tuple(row["labels"].items()) == place), figure)
                for place in dict.fromkeys(
                    tuple(row["labels"].items()) for row in mine if row["labels"]["load"] == load
                )
            }
            if not all(values.values()):  # nobody got that far, or nothing was done
                continue
            logs = {place: float(np.log(value)) for place, value in values.items() if value}
            pairs = {(dict(place)["outer"], dict(place)["inner"]): v for place, v in logs.items() if len(place) == 3}
            middle = np.mean(list(pairs.values()))
            effects = [
                {
                    name: float(np.exp(np.mean([v for pair, v in pairs.items() if pair[side] == name]) - middle))
                    for name in dict.fromkeys(pair[side] for pair in pairs)
                }
                for side in (0, 1)
            ]
            found.append(Sensitivity(load, figure, float(np.std(list(logs.values()))), *effects))
    return found
