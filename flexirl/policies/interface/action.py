"""What a policy decides: dials around a sensible heuristic, or scores of single requests; either becomes a Decision.

`SCHEMA` changes whenever the meaning of any number does. All numbers lie in [-1, 1], and zero is a good policy.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flexirl.compiled import compiled
from flexirl.policies.interface.decision import (
    ARRIVAL,
    CHEAPER,
    CLASSES,
    DEADLINE,
    IMMEDIATES,
    LOWEST_SCORE,
    NEWEST,
    ONE_QUEUE,
    SCORE,
    SHORTEST,
    default_decision,
)
from flexirl.policies.interface.view import NONE
from flexirl.workloads.trace import IMMEDIATE

SCHEMA = "flexirl-action-4"


class Dial(NamedTuple):
    """One dial: what it sets at -1, 0 and 1."""

    name: str
    meaning: str
    low: str
    zero: str
    high: str


DIALS = (
    Dial("immediate_slack", "share of the least decode slack that immediate prefill may use", "0.3", "0.9", "1.5"),
    Dial("deferred_slack", "the same for deferred work", "0.1", "0.7", "1.3"),
    Dial("deferred_decodes", "share of deferred decodes that run whatever the slack", "0", "0.5", "1"),
    Dial("step", "longest iteration that work may still join", "0.75 TPOT SLO", "3 TPOT SLO", "12 TPOT SLO"),
    Dial("deferred_kv", "KV share above which no deferred request is admitted", "0", "0.95", "1"),
    Dial("preempt", "deferred requests to preempt now", "0", "0", "4"),
    Dial(
        "relegate",
        "times its prefill an immediate request must have left, or it goes behind the others of its class",
        "0",
        "3",
        "6",
    ),
    Dial(
        "window",
        "time a deferred request must have left (at most half its window), or it goes last",
        "0",
        "160 TPOT SLO",
        "320 TPOT SLO",
    ),
    Dial(
        "kept_cache",
        "of all blocks, the most that immediate work left in the cache and no deferred request is admitted into",
        "0",
        "0.4",
        "0.8",
    ),
    Dial(
        "short_first",
        "seconds that each token to come counts for in the order of deferred work, beside its due time",
        "0.002",
        "0.032",
        "0.512",
    ),
)
NUM_DIALS = len(DIALS)


def _set(**positions: float) -> tuple[float, ...]:
    """All dials, those not named at zero."""
    return tuple(positions.get(dial.name, 0.0) for dial in DIALS)


# A grid of dial settings for agents with one discrete choice: shares of slack and decodes, a pause, one preemption.
GRID = tuple(
    [
        _set(deferred_slack=slack, deferred_decodes=share)
        for slack in (-0.7, -0.3, 0.0, 0.3)
        for share in (-1.0, 0.0, 1.0)
    ]
    + [_set(deferred_decodes=-1.0, deferred_kv=-1.0), _set(preempt=0.75)]
)
ORDERS = {"arrival": ARRIVAL, "deadline": DEADLINE, "shortest": SHORTEST}
# In the deadline order of immediate requests a token of prefill still to do counts like this many seconds (QoServe's
# alpha): under pressure short prompts go first, and more promises are kept.
ORDER_WEIGHT_S = 0.008
# Of what is learned about lengths: a long output taken for a short one costs more than the other way round.
LENGTH_QUANTILE = 0.8
DEFAULT_IMMEDIATE_ORDER, DEFAULT_DEFERRED_ORDER = "deadline", "deadline"
GRID_ZERO = GRID.index((0.0,) * NUM_DIALS)  # the choice that leaves all dials at zero
PREEMPTS = len(GRID) - 1  # the choice that preempts: masked where nothing deferred runs


@compiled
def set_dials(decision, dials: np.ndarray, tpot_s: float, immediate_order: int, deferred_order: int) -> None:
    """Writes what `dials` (float, NUM_DIALS, cut to [-1, 1]) stand for into `decision`, a `DECISION` record."""
    decision.discipline = CLASSES
    decision.decodes_first = 1
    decision.immediate_order = immediate_order
    decision.deferred_order = deferred_order
    decision.victim = NEWEST
    decision.preemption = CHEAPER
    decision.to_host = IMMEDIATES
    decision.by_return = 1
    decision.relegated_last = 0
    decision.preempt_for_immediate = 1
    decision.token_budget = np.iinfo(np.int32).max
    decision.deferred_token_floor = 0
    decision.reserve_ratio = 0.0
    decision.reserve_new_ratio = 0.0
    decision.reserve_clip = np.inf
    decision.order_weight_s = ORDER_WEIGHT_S
    decision.expected_output = 0.0
    decision.length_quantile = LENGTH_QUANTILE
    decision.scored = 0
    dials = np.minimum(np.maximum(dials, -1.0), 1.0)
    decision.immediate_slack = 0.9 + 0.6 * dials[0]
    decision.deferred_slack = 0.7 + 0.6 * dials[1]
    decision.deferred_decodes = 0.5 + 0.5 * dials[2]
    decision.immediate_step_s = decision.deferred_step_s = 3.0 * tpot_s * 4.0 ** dials[3]
    decision.deferred_kv_share = 0.95 + (0.95 if dials[4] < 0 else 0.05) * dials[4]
    decision.preempt_count = int(np.floor(max(dials[5] - 0.5, 0.0) * 8.0 + 1e-6))
    decision.relegate = 3.0 + 3.0 * dials[6]
    decision.deferred_margin_s = (160.0 + 160.0 * dials[7]) * tpot_s
    decision.deferred_cache_share = 0.0
    decision.immediate_cache_share = 0.4 + 0.4 * dials[8]
    decision.deferred_weight_s = 0.032 * 16.0 ** dials[9]


@compiled
def set_scores(decision, scores: np.ndarray, visible: np.ndarray, tpot_s: float) -> None:
    """Scores the visible requests (scores: float, VISIBLE, in [-1, 1]; visible: `SEEN`); else as dials at zero.

    A request's rank is its score plus 1 if it is immediate: by default immediate requests go first.
    """
    set_dials(decision, np.zeros(NUM_DIALS, scores.dtype), tpot_s, SCORE, SCORE)
    decision.discipline = ONE_QUEUE
    decision.victim = LOWEST_SCORE
    count = 0
    for i in range(len(visible)):
        if visible[i].request != NONE:
            prior = 1.0 if visible[i].request_class == IMMEDIATE else 0.0
            decision.scored_requests[count] = visible[i].request
            decision.scores[count] = prior + min(max(scores[i], -1.0), 1.0)
            count += 1
    decision.scored = count


def decision_from_dials(dials: np.ndarray, tpot_s: float) -> np.ndarray:
    """The decision (0-d array of `DECISION`) that `dials` (NUM_DIALS floats in [-1, 1]) stand for.

    tpot_s: the promised time per output token, the dials' unit of time.
    """
    decision = np.array([default_decision()])
    orders = (ORDERS[DEFAULT_IMMEDIATE_ORDER], ORDERS[DEFAULT_DEFERRED_ORDER])
    set_dials(decision[0], np.asarray(dials, np.float32), tpot_s, *orders)
    return decision.reshape(())
