"""The pictures: one episode's timeline, a training run's curve, policies side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flexirl.envs.picture import DEFERRED_COLOUR, IMMEDIATE_COLOUR, NEUTRAL, new_figure, timeline_figure
from flexirl.runtime.profile.engine import EngineProfile
from flexirl.runtime.profile.step_time import COEFFICIENTS, design_matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from flexirl.runtime.live.step import Step


def plot_timeline(timeline: np.ndarray, title: str, path: Path) -> None:
    """Writes `timeline_figure` to a PNG file."""
    timeline_figure(timeline, title).savefig(path)


def plot_history(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Validation figures over training beside those of the start; `history` as of `policies.training.Training`."""
    figure = new_figure(9, 3.2)
    steps = [row["steps"] for row in history]
    panels = (
        ("value_per_s", "value per s"),
        ("immediate_attainment", "attainment"),
        ("deferred_tokens_per_s", "deferred tokens per s"),
    )
    for axes, (name, label) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.plot(steps, [row[name] for row in history], marker="o", markersize=3, color=IMMEDIATE_COLOUR)
        axes.axhline(history[0][name], color=NEUTRAL, linestyle="--", linewidth=1)
        axes.set(xlabel="decisions played", ylabel=label)
    figure.suptitle("validation on arrivals not trained on; dashed: the start")
    figure.savefig(path)


def plot_comparison(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Value per policy, and attainment against deferred throughput; `rows` as of leaderboard.json."""
    policies = sorted({row["policy"] for row in rows}, key=lambda name: np.mean(_values(rows, name, "value_per_s")))
    figure = new_figure(11, 0.3 * len(policies) + 1.5)
    bars, frontier = figure.subplots(1, 2, width_ratios=[3, 2])
    means = [np.mean(_values(rows, name, "value_per_s")) for name in policies]
    spread = [np.std(_values(rows, name, "value_per_s")) for name in policies]
    colours = [IMMEDIATE_COLOUR if name.startswith("learned") else NEUTRAL for name in policies]
    bars.barh(policies, means, xerr=spread, color=colours, error_kw={"elinewidth": 1})
    bars.set(xlabel="value per s (price units; line: one standard deviation over seeds)")
    points = {
        name: (float(np.mean(_values(rows, name, "deferred_tokens_per_s"))), float(np.mean(attainment)))
        for name in policies
        if (attainment := _values(rows, name, "immediate_attainment"))
    }
    for name, (x, y) in points.items():
        frontier.scatter(x, y, color=colours[policies.index(name)], s=18)
    frontier.set(xlabel="deferred tokens per s", ylabel="immediate attainment", ylim=(-0.05, 1.1))
    label_points(frontier, points)
    figure.savefig(path)


def label_points(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Names points in a column beside the axes, in their order from top to bottom, so that no name covers another."""
    ranked = sorted(points, key=lambda name: -points[name][1])
    for name, height in zip(ranked, np.linspace(1.0, 0.0, max(len(ranked), 2)), strict=False):
        axes.annotate(
            name, points[name], (1.04, height), textcoords="axes fraction", fontsize=7, va="center",
            arrowprops={"arrowstyle": "-", "color": NEUTRAL, "linewidth": 0.4},
        )  # fmt: skip


def _values(rows: Sequence[Mapping[str, Any]], policy: str, name: str) -> list[float]:
    return [row[name] for row in rows if row["policy"] == policy and row[name] is not None]


def plot_calibration(
    features: np.ndarray, times_s: np.ndarray, profile: EngineProfile, steps: Sequence[Step], predicted_s: np.ndarray,
    folder: Path,
) -> None:  # fmt: skip
    """calibration.png: predicted against measured iterations, those fitted and those of the engine's own run."""
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    figure = new_figure(9, 4.2)
    coefficients = np.array([profile.values[name] for name in COEFFICIENTS])
    panels = (
        ("drawn iterations", times_s, design_matrix(features) @ coefficients, features),
        ("the engine's own run", np.array([step.elapsed_s for step in steps]), predicted_s,
         np.array([step.features for step in steps])),
    )  # fmt: skip
    for axes, (title, actual_s, expected_s, records) in zip(figure.subplots(1, 2), panels, strict=True):
        mixed = records["prefill_tokens"] > 0
        axes.plot([actual_s.min(), actual_s.max()], [actual_s.min(), actual_s.max()], color=NEUTRAL, linewidth=0.8)
        axes.scatter(actual_s[~mixed], expected_s[~mixed], s=8, color=IMMEDIATE_COLOUR, label="decodes alone")
        axes.scatter(actual_s[mixed], expected_s[mixed], s=8, color=DEFERRED_COLOUR, label="with a prefill chunk")
        axes.set(title=title, xlabel="measured seconds", ylabel="predicted seconds", xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(NullFormatter())  # theirs would overlap
        axes.legend(fontsize=8)
    figure.savefig(folder / "calibration.png")


def plot_fidelity(rows: Sequence[Mapping[str, Any]], engines: Sequence[str], path: Path) -> None:
    """Differences between two engines, a row of dots per figure; `rows` of `fidelity.side_by_side`."""
    figures = list(dict.fromkeys(row["figure"] for row in rows))[::-1]
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    figure = new_figure(9, 0.32 * len(figures) + 1.4)
    axes = figure.subplots()
    for i, policy in enumerate(policies):
        mine = [row for row in rows if row["policy"] == policy and row["difference"] is not None]
        shares = [100 * row["difference"] for row in mine]
        axes.scatter(shares, [figures.index(row["figure"]) for row in mine], s=22, color=f"C{i}", label=policy)
    axes.axvline(0.0, color=NEUTRAL, linewidth=0.8)
    axes.set_yticks(range(len(figures)), figures)
    axes.set(xlabel=f"{engines[1]} against {engines[0]}, % (log beyond 10)")
    axes.set_xscale("symlog", linthresh=10)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path)
