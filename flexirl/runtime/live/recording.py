"""Traces of execution: every iteration of a live engine as a Chrome trace, and how the engine stood as a timeline.

The trace (`trace.json`) opens in Perfetto or chrome://tracing: iterations with what they computed, the host's work
before and after, changed decisions, and counters. The timeline (`timeline.csv`) has the columns of
`simulation.TIMELINE`, so whatever reads the surrogate's reads the engine's.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from flexirl.errors import UserError
from flexirl.policies.interface.decision import FIGURES
from flexirl.runtime.simulator.simulation import TIMELINE, timeline_row

if TYPE_CHECKING:
    from flexirl.runtime.live.step import Step

_PROCESS = 1
_ITERATIONS, _HOST, _DECISIONS = 1, 2, 3  # tracks
_TRACKS = {_ITERATIONS: "iterations", _HOST: "host", _DECISIONS: "decisions"}


class Recording:
    """Writes `trace.json` and `timeline.csv` into a folder as iterations come; a context manager.

    Give `Recording(folder)` to a live engine as `Options(on_step=...)`. Both files are written line by line: what has
    happened so far is there if the process dies (Perfetto reads an unclosed trace).
    """

    def __init__(self, folder: Path) -> None:
        self._trace = open(folder / "trace.json", "w")
        self._timeline = open(folder / "timeline.csv", "w", newline="")
        self._rows = csv.writer(self._timeline)
        self._rows.writerow(TIMELINE.names or ())
        self._decision: np.ndarray | None = None
        self._trace.write("[")
        for track, name in _TRACKS.items():
            self._event(ph="M", name="thread_name", tid=track, args={"name": name})

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._trace.write("{}]\n")
        self._trace.close()
        self._timeline.close()

    def __call__(self, step: Step) -> None:
        """Writes one iteration."""
        features = {name: step.features[name].item() for name in step.features.dtype.names or ()}
        name = "abandoned" if step.abandoned else "mixed" if features["prefill_tokens"] else "decode"
        tokens = dict(zip(step.requests, step.tokens, strict=True))
        self._span(_ITERATIONS, name, step.began_s, step.elapsed_s, {**features, "tokens": tokens})
        self._span(_HOST, "prepare", step.began_s, step.prepare_s, {})
        after_s = step.began_s + step.prepare_s + step.execute_s
        self._span(_HOST, "finish", after_s, step.finish_s, {"model_s": step.forward_s})
        changed = {
            field: step.decision[field].item()
            for field in FIGURES
            if self._decision is None or step.decision[field] != self._decision[field]
        }
        if changed:
            # JSON has no infinity.
            finite = {field: value if abs(value) < float("inf") else "unlimited" for field, value in changed.items()}
            self._event(ph="i", s="t", name="decision", tid=_DECISIONS, ts=_microseconds(step.began_s), args=finite)
            self._decision = step.decision
        row = timeline_row(step.state)
        self._rows.writerow(row)
        stands = dict(zip(TIMELINE.names or (), row, strict=True))
        for counter in ("waiting", "running", "kv_share"):
            values = {of: stands[f"{of}_{counter}"] for of in ("immediate", "deferred")}
            self._event(ph="C", name=counter, ts=_microseconds(stands["now_s"]), args=values)

    def _span(self, track: int, name: str, began_s: float, elapsed_s: float, args: dict[str, Any]) -> None:
        times = {"ts": _microseconds(began_s), "dur": _microseconds(elapsed_s)}
        self._event(ph="X", name=name, tid=track, **times, args=args)

    def _event(self, **fields: Any) -> None:
        self._trace.write(json.dumps({"pid": _PROCESS, **fields}) + ",\n")


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def read_timeline(path: Path) -> np.ndarray:
    """The timeline in a CSV file: an array of `TIMELINE`; raises UserError for a missing file or other columns."""
    try:
        with open(path, newline="") as file:
            names, *rows = csv.reader(file)
        if tuple(names) != TIMELINE.names:
            raise UserError(f"{path} has columns {', '.join(names)}; a timeline has {', '.join(TIMELINE.names or ())}.")
        return np.array([tuple(map(float, row)) for row in rows], TIMELINE)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable timeline ({error}).") from None
