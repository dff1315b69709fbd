"""Whose promise counts as kept: of every request that ended, and of those whose client left too."""

from __future__ import annotations

import pytest

from flexirl.runtime.live.requests import Completion, Request
from flexirl.serving.metrics import Metrics
from flexirl.workloads.slo import SLO
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

PROMISE = SLO(ttft_s=1.0, tpot_s=0.1)


@pytest.mark.parametrize(
    ("finish_reason", "tokens", "ttft_s", "e2e_s", "kept"),
    [
        ("length", 11, 0.9, 1.8, True),
        ("stop", 11, 0.9, 2.0, False),  # 0.11 s a token
        ("length", 11, 1.1, 2.0, False),
        ("error", 0, None, 0.5, False),
        ("cancelled", 0, None, 0.5, None),  # left before anything was broken
        ("cancelled", 3, 0.5, 0.6, None),
        ("cancelled", 0, None, 1.5, False),  # waited in vain, then left
    ],
)
def test_a_promise(finish_reason: str, tokens: int, ttft_s: float | None, e2e_s: float, kept: bool | None) -> None:
    metrics = Metrics()
    completion = Completion("a", list(range(tokens)), finish_reason, ttft_s, e2e_s)
    metrics.completed(Request("a", [1, 2], 11, IMMEDIATE), completion, PROMISE)
    lines = [line for line in metrics.text().decode().splitlines() if line.startswith("flexirl_promises_total")]
    assert lines == ([] if kept is None else [f'flexirl_promises_total{{kept="{str(kept).lower()}"}} 1.0'])
    assert [figures["kept"] for figures in metrics.summary().values()] == ([] if kept is None else [float(kept)])


def test_deferred_requests_promise_nothing_by_the_second() -> None:
    metrics = Metrics()
    metrics.completed(Request("a", [1], 2, DEFERRED), Completion("a", [1, 2], "length", 500.0, 600.0), PROMISE)
    assert "flexirl_promises_total{" not in metrics.text().decode()
    assert metrics.summary()["deferred"]["kept"] == 1.0
