"""What Prometheus is told: latencies and promises by class, tokens, refusals, and what the engine does when asked."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from flexirl.runtime.live.requests import Completion, Request
    from flexirl.workloads.slo import SLO

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 300, 1800, 7200, 86400)
_RECENT = 1000  # requests of a class that percentiles are of
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 5)


class Metrics:
    """Counts for one service; `text` is what `/metrics` answers."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, help_: str, *labels: str) -> Counter:
            return Counter(f"flexirl_{name}", help_, labels, registry=self._registry)

        def histogram(name: str, help_: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"flexirl_{name}", help_, ["class"], buckets=buckets, registry=self._registry)

        self._requests = counter("requests", "Requests that have ended, by how.", "class", "finish_reason")
        self._promises = counter("promises", "Immediate requests that have ended, by their promise.", "kept")
        self._tokens = counter("tokens", "Tokens of requests that have ended.", "class", "kind")
        self._refused = counter("refused", "Requests that were refused at once.", "reason")
        self._restarts = counter("engine_restarts", "Times the engine was made anew after it failed.")
        self._lines = counter("batch_lines", "Lines of batches that have ended.", "outcome")
        self._ttft = histogram("ttft_seconds", "Time to first token.", _SECONDS)
        self._tpot = histogram("tpot_seconds", "Mean time per further token.", _TOKEN_SECONDS)
        self._e2e = histogram("e2e_seconds", "Time from arrival to the end.", _SECONDS)
        self._recent: dict[str, deque[tuple[float, ...]]] = {
            name: deque(maxlen=_RECENT) for name in ("immediate", "deferred")
        }

    def completed(self, request: Request, completion: Completion, slo: SLO) -> None:
        """A request has ended."""
        name = "immediate" if request.immediate else "deferred"
        self._requests.labels(name, completion.finish_reason).inc()
        output = len(completion.token_ids)
        self._tokens.labels(name, "prompt").inc(len(request.prompt))
        self._tokens.labels(name, "cached").inc(completion.cached_tokens)
        self._tokens.labels(name, "output").inc(output)
        tpot_s = None
        if completion.ttft_s is not None:
            self._ttft.labels(name).observe(completion.ttft_s)
            if output > 1:
                tpot_s = (completion.e2e_s - completion.ttft_s) / (output - 1)
                self._tpot.labels(name).observe(tpot_s)
        self._e2e.labels(name).observe(completion.e2e_s)
        late = completion.ttft_s is None and completion.e2e_s > (request.ttft_s or slo.ttft_s)
        if completion.finish_reason == "cancelled" and not (request.immediate and late):
            return  # whoever goes before the promise is broken has not been let down
        kept = completion.ttft_s is not None and completion.finish_reason in ("stop", "length")
        if request.immediate:
            kept = kept and (completion.ttft_s or 0.0) <= (request.ttft_s or slo.ttft_s)
            kept = kept and (tpot_s or 0.0) <= (request.tpot_s or slo.tpot_s)
            self._promises.labels(str(kept).lower()).inc()
        figures = (completion.ttft_s, tpot_s, completion.e2e_s, kept)
        self._recent[name].append(tuple(np.nan if figure is None else float(figure) for figure in figures))

    def summary(self) -> dict[str, Any]:
        """Of the last requests of each class: how many, percentiles in seconds, share that was as promised."""
        return {name: _percentiles(np.array(list(recent))) for name, recent in self._recent.items() if recent}

    def refused(self, reason: str) -> None:
        """A request was refused before it reached the engine."""
        self._refused.labels(reason).inc()

    def restarted(self) -> None:
        """The engine was made anew."""
        self._restarts.inc()

    def line_ended(self, outcome: str, count: int) -> None:
        """Lines of batches have ended."""
        self._lines.labels(outcome).inc(count)

    def watch(self, figures: Callable[[], dict[str, Any]]) -> None:
        """Adds an engine's figures, read whenever somebody asks for metrics."""
        self._registry.register(_Figures(figures))

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)


def _percentiles(recent: np.ndarray) -> dict[str, Any]:
    """recent: (n, 4) of ttft_s, tpot_s, e2e_s, kept; NaN where there is none."""
    figures: dict[str, Any] = {"requests": len(recent), "kept": float(recent[:, 3].mean())}
    for column, name in enumerate(("ttft_s", "tpot_s", "e2e_s")):
        known = recent[:, column][~np.isnan(recent[:, column])]
        figures[name] = {f"p{q}": float(np.percentile(known, q)) for q in (50, 90, 99)} if len(known) else None
    return figures


class _Figures(Collector):
    def __init__(self, figures: Callable[[], dict[str, Any]]) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        """One gauge for each number, by class where it is one of a class."""
        figures = self._figures()
        classes = figures.pop("classes", {})
        for name in next(iter(classes.values()), {}):
            gauge = GaugeMetricFamily(f"flexirl_engine_{name}", f"{name} of a class of requests.", labels=["class"])
            for class_name, values in classes.items():
                gauge.add_metric([class_name], values[name])
            yield gauge
        for name, value in figures.items():
            if isinstance(value, int | float):
                yield GaugeMetricFamily(f"flexirl_engine_{name}", f"{name} of the engine.", value=value)
