"""The accounts of a run: every figure of the leaderboard, from the scheduler's state at the end.

Nothing is left out because it is still waiting: a request without its first token counts with the time it has waited
so far, and as missed once its promise can no longer be kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexirl.errors import UserError
from flexirl.runtime.scheduler.books import INPUT_SERVICE, OUTPUT_SERVICE
from flexirl.runtime.scheduler.state import FINISHED, FUTURE, REJECTED, State, itl_bin_edges
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

PERCENTILES = (50, 90, 95, 99)
_CACHED = ("admitted_prompt", "found_prompt")
# Of the figures of `of_requests`, those that come first in a row.
_FIRST = ("value_per_s", "revenue_per_s", "immediate_attainment", "given_up", "immediate_goodput_tokens_per_s")


@dataclass(frozen=True)
class Prices:
    """Price units per token; a deferred request pays `deferred` times what an immediate one does.

    given_up: an immediate request whose client gave up costs so many times what it would have paid.
    """

    prompt: float = 1.0
    output: float = 4.0
    deferred: float = 0.5
    given_up: float = 0.5

    def __post_init__(self) -> None:
        for name in ("prompt", "output", "deferred", "given_up"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise UserError(f"slo.prices.{name}={value} is out of range; a price is 0 or more.")

    def of(self, rows: np.ndarray) -> np.ndarray:
        """What each request (rows with request_class, prompt_tokens, output_tokens) pays if its promise is kept."""
        full = self.prompt * rows["prompt_tokens"] + self.output * rows["output_tokens"]
        return np.where(rows["request_class"] == DEFERRED, self.deferred, 1.0) * full


@dataclass(frozen=True)
class Snapshot:
    """The running totals at one moment, so that the accounts of a span are a difference."""

    scheduler: np.ndarray
    classes: np.ndarray
    itl_histogram: np.ndarray
    length_tenths: np.ndarray

    @classmethod
    def of(cls, state: State) -> Snapshot:
        """The totals now."""
        return cls(state.scheduler.copy(), state.classes.copy(), state.itl_histogram.copy(), state.length_tenths.copy())


def account(state: State, before: Snapshot, since_s: float, prices: Prices) -> dict[str, float | int | None]:
    """The leaderboard's figures for the span from `since_s` to the state's clock.

    Revenue counts the requests that finished in the span with their promise kept; value those that finished in it, late
    ones less, minus what it costs that clients gave up in it. Latencies and attainment count the immediate requests
    that arrived in it; `cached` is the share of prompt tokens, of requests first admitted in it, that the cache had;
    `deferred_below_p80` the share of deferred outputs that were shorter than the 80th percentile of what had been
    learned about them, 0.8 if that is right. Seconds, tokens, and price units per second; None where nothing is
    defined.
    """
    end_s = float(state.scheduler["now_s"][0])
    span_s = end_s - since_s
    requests = state.requests[state.requests["status"] != FUTURE]
    deferred_now, deferred_before = state.classes[DEFERRED], before.classes[DEFERRED]
    deferred_tokens = sum(int(deferred_now[name] - deferred_before[name]) for name in ("prompt_done", "output_done"))

    tokens = {
        name: int((state.classes[f"{name}_done"] - before.classes[f"{name}_done"]).sum())
        for name in ("prompt", "output")
    }

    def total(name: str) -> float:
        return (state.scheduler[name] - before.scheduler[name])[0].item()

    iterations, busy_s = total("iterations"), total("busy_s")
    told = of_requests(requests, since_s, end_s, float(state.scheduler["patience"][0]), prices)
    figures: dict[str, float | int | None] = {
        **{name: told.pop(name) for name in _FIRST},
        "prompt_tokens_per_s": tokens["prompt"] / span_s,
        "output_tokens_per_s": tokens["output"] / span_s,
        "deferred_tokens_per_s": deferred_tokens / span_s,
        **{name: told.pop(name) for name in list(told) if name != "e2e_p99_s"},
    }
    figures["itl_p99_s"] = histogram_percentile(state.itl_histogram - before.itl_histogram, 99)
    figures.update(told)
    for name, c in (("immediate", IMMEDIATE), ("deferred", DEFERRED)):
        admitted, found = (int(state.classes[column][c] - before.classes[column][c]) for column in _CACHED)
        figures[f"{name}_cached"] = found / admitted if admitted else None
    tenths = (state.length_tenths - before.length_tenths)[DEFERRED]
    figures["deferred_below_p80"] = float(tenths[:8].sum() / tenths.sum()) if tenths.sum() > 0 else None
    figures["evicted_blocks"] = int((state.classes["evicted_blocks"] - before.classes["evicted_blocks"]).sum())
    figures["preemptions"] = int((state.classes["preemptions"] - before.classes["preemptions"]).sum())
    figures["recomputed_tokens"] = int(total("recomputed_tokens"))
    figures["swapped_tokens"] = int(total("swapped_tokens"))
    figures["kv_utilisation"] = total("kv_block_s") / (busy_s * int(state.engine["kv_blocks"][0])) if busy_s else 0.0
    figures["step_time_mean_s"] = busy_s / iterations if iterations else None
    figures["iterations"] = int(iterations)
    figures["jain_fairness"] = jain_fairness(requests, len(state.tenants))
    figures["simulated_s"] = span_s
    return figures


def of_requests(
    requests: np.ndarray, since_s: float, end_s: float, patience: float, prices: Prices
) -> dict[str, float | int | None]:
    """The figures that follow from the requests alone, whoever has seen them: see `account`.

    requests: all that have arrived, with what `REQUEST` has of class, times, deadlines, tokens, status and `missed`.
    """
    span_s = end_s - since_s
    immediate = requests[(requests["request_class"] == IMMEDIATE) & (requests["arrival_s"] >= since_s)]
    windowed = requests[(requests["request_class"] == DEFERRED) & np.isfinite(requests["deadline_s"])]
    kept = (requests["status"] == FINISHED) & (requests["missed"] == 0)
    paid = requests[kept & (requests["finish_s"] >= since_s)]
    paid_immediate = paid[paid["request_class"] == IMMEDIATE]
    goodput_tokens = paid_immediate["prompt_tokens"] + paid_immediate["output_tokens"]
    ended = requests[(requests["status"] == FINISHED) & (requests["finish_s"] >= since_s)]
    gave_up = requests[gave_up_in(requests, patience, since_s, end_s)]
    value = float((prices.of(ended) * worth(ended, patience)).sum()) - prices.given_up * float(prices.of(gave_up).sum())
    figures: dict[str, float | int | None] = {
        "value_per_s": value / span_s,
        "revenue_per_s": float(prices.of(paid).sum()) / span_s,
        "immediate_attainment": _share_kept(immediate, end_s),
        "given_up": float(gave_up_in(immediate, patience, since_s, end_s).mean()) if len(immediate) else None,
        "immediate_goodput_tokens_per_s": float(goodput_tokens.sum()) / span_s,
        "deferred_on_time": _share_kept(windowed, end_s),
    }
    ttft_s, tpot_s, e2e_s = latencies(immediate, end_s)
    for name, values in (("ttft", ttft_s), ("tpot", tpot_s)):
        figures[f"{name}_mean_s"] = float(values.mean()) if len(values) else None
        for p in PERCENTILES:
            figures[f"{name}_p{p}_s"] = float(np.percentile(values, p)) if len(values) else None
    figures["e2e_p99_s"] = float(np.percentile(e2e_s, 99)) if len(e2e_s) else None
    return figures


def worth(requests: np.ndarray, patience: float) -> np.ndarray:
    """The share of its value that each finished request had, float64: 1 in time, falling to 0 as of `SLO`."""
    arrival_s = requests["arrival_s"]
    share = np.ones(len(requests))
    for due, had in (("ttft_deadline_s", "first_token_s"), ("deadline_s", "finish_s")):
        promised_s = requests[due] - arrival_s
        promised = np.isfinite(promised_s) & (requests["request_class"] == IMMEDIATE)
        ratio = (requests[had] - arrival_s)[promised] / promised_s[promised]
        share[promised] = np.minimum(share[promised], np.clip((patience - ratio) / (patience - 1), 0.0, 1.0))
    late = (requests["request_class"] == DEFERRED) & (requests["missed"] == 1)
    return np.where(late, 0.0, share)


def gave_up_in(requests: np.ndarray, patience: float, since_s: float, end_s: float) -> np.ndarray:
    """Whose patience ended in a span without a first token, bool; not those that ended otherwise before."""
    ends_s = requests["arrival_s"] + patience * (requests["ttft_deadline_s"] - requests["arrival_s"])
    waits = (requests["request_class"] == IMMEDIATE) & (requests["first_token_s"] > ends_s)
    waits &= requests["status"] != REJECTED
    return waits & (requests["finish_s"] >= ends_s) & (since_s <= ends_s) & (ends_s < end_s)


def latencies(requests: np.ndarray, end_s: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """TTFT, TPOT and end-to-end latency in seconds (float64 arrays; TPOT only of requests with a second token).

    What has not happened by `end_s` counts as happening then, a lower bound: dropping it would flatter whoever lets
    requests wait.
    """
    first_s = np.minimum(requests["first_token_s"], end_s)
    finish_s = np.where(requests["status"] == FINISHED, requests["finish_s"], end_s)
    further = np.where(requests["status"] == FINISHED, requests["output_tokens"], requests["generated"] + 1) - 1
    timed = (requests["generated"] > 0) & (further > 0)
    tpot_s = (finish_s[timed] - first_s[timed]) / further[timed]
    return first_s - requests["arrival_s"], tpot_s, finish_s - requests["arrival_s"]


def _share_kept(requests: np.ndarray, end_s: float) -> float | None:
    """Share of the promises that were kept among those decided by `end_s`."""
    finished = requests["status"] == FINISHED
    overdue = (requests["first_token_s"] > requests["ttft_deadline_s"]) & (requests["ttft_deadline_s"] < end_s)
    overdue |= requests["deadline_s"] < end_s
    missed = (requests["missed"] == 1) | (~finished & overdue)
    decided = missed.sum() + (finished & ~missed).sum()
    return float((finished & ~missed).sum() / decided) if decided else None


def histogram_percentile(counts: np.ndarray, percent: float) -> float | None:
    """A percentile of the ITL histogram, in seconds, interpolated within its bin on the logarithmic scale."""
    total = counts.sum()
    if total == 0:
        return None
    cumulative = np.cumsum(counts)
    rank = total * percent / 100
    bin_ = int(np.searchsorted(cumulative, rank))
    below = cumulative[bin_] - counts[bin_]
    low, high = itl_bin_edges()[bin_ : bin_ + 2]
    return float(low * (high / low) ** ((rank - below) / counts[bin_]))


def jain_fairness(requests: np.ndarray, num_tenants: int) -> float:
    """Jain's index over tenants of the share of its demand that each was served: 1 is equal shares, 1/n is one only.

    Demand and service count an input token once and an output token twice. Jain, Chiu, Hawe, DEC-TR-301 (1984).
    """
    served = INPUT_SERVICE * requests["furthest"] + OUTPUT_SERVICE * requests["generated"]
    asked = INPUT_SERVICE * requests["prompt_tokens"] + OUTPUT_SERVICE * requests["output_tokens"]
    by_tenant = np.bincount(requests["tenant"], served, num_tenants)
    demand = np.bincount(requests["tenant"], asked, num_tenants)
    shares = by_tenant[demand > 0] / demand[demand > 0]
    if len(shares) == 0 or not shares.any():
        return 1.0
    return float(shares.sum() ** 2 / (len(shares) * (shares**2).sum()))
