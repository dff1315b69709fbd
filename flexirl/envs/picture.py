"""What an episode looks like: queues, KV cache and batch over time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMMEDIATE_COLOUR, DEFERRED_COLOUR, NEUTRAL = "#2a6f97", "#e07a3f", "#8a8a8a"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches."""
    # Most of what a command takes to start, and only its end needs it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _lighter(colour: str) -> tuple[float, float, float, float]:
    from matplotlib.colors import to_rgba

    return to_rgba(colour, 0.4)


def timeline_figure(timeline: np.ndarray, title: str) -> Figure:
    """Queues, KV cache and batch composition over simulated time, from an array of `simulation.TIMELINE`."""
    figure = new_figure(9, 6)
    queues, cache, batch = figure.subplots(3, 1, sharex=True)
    now = timeline["now_s"]
    queues.plot(now, timeline["immediate_waiting"], color=IMMEDIATE_COLOUR, label="immediate")
    queues.plot(now, timeline["deferred_waiting"], color=DEFERRED_COLOUR, label="deferred")
    queues.set(ylabel="waiting requests", yscale="symlog", title=title)
    queues.set_ylim(bottom=0)
    cache.stackplot(
        now, timeline["immediate_kv_share"], timeline["immediate_idle_share"], timeline["deferred_kv_share"],
        timeline["deferred_idle_share"],
        colors=[IMMEDIATE_COLOUR, _lighter(IMMEDIATE_COLOUR), DEFERRED_COLOUR, _lighter(DEFERRED_COLOUR)],
        labels=["immediate, in use", "kept for it", "deferred, in use", "kept for it"],
    )  # fmt: skip
    cache.set(ylabel="share of KV cache", ylim=(0, 1))
    cache.legend(loc="lower right", fontsize=8, ncols=4)
    batch.stackplot(
        now, timeline["immediate_running"], timeline["deferred_running"], colors=[IMMEDIATE_COLOUR, DEFERRED_COLOUR]
    )
    batch.set(ylabel="running requests", xlabel="time on the engine's clock (s)")
    chunk = batch.twinx()
    chunk.plot(now, timeline["prefill_tokens"], color=NEUTRAL, linewidth=0.6, label="prefill tokens an iteration")
    chunk.set_ylabel("prefill tokens")
    chunk.legend(loc="upper right", fontsize=8)
    queues.legend(loc="upper right", fontsize=8)
    return figure
