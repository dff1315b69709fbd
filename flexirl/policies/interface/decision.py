"""The Decision: the one record in which a policy tells an engine what it wants, in force until the next one."""

from __future__ import annotations

from typing import Any

import numpy as np

from flexirl.compiled import compiled

# Queue orders. DEADLINE sorts by deadline + a weight x remaining tokens: EDF at 0, laxity below, QoServe above.
# SHORTEST by remaining tokens. Of deferred requests, predicted output counts as the prefill that takes as long.
ARRIVAL, DEADLINE, SHORTEST, FAIR, SCORE = range(5)
# Disciplines. ONE_QUEUE: the classes share one queue. PRIORITY: running requests first, then waiting ones, immediate
# ahead of deferred. CLASSES: all immediate work, then deferred work in what is left.
ONE_QUEUE, PRIORITY, CLASSES = range(3)
# Victims. LAST: the newest in the running batch. NEWEST: latest arrival. LEAST_OUTPUT: fewest output tokens, then
# longest prompt. LOWEST_SCORE. LEAST_COMPUTED: least work lost. All take deferred requests before immediate ones, but
# for LAST in one queue.
LAST, NEWEST, LEAST_OUTPUT, LOWEST_SCORE, LEAST_COMPUTED = range(5)
# Preemption modes.
CHEAPER, RECOMPUTE, SWAP = range(3)

# Whose blocks, when the prefix cache gives them up, go to host memory, as far as the engine has some for that.
NOBODYS, IMMEDIATES, EVERYBODYS = range(3)

MAX_SCORED = 16  # requests that one decision may score

DECISION = np.dtype(
    [
        ("discipline", "i4"),
        ("decodes_first", "i4"),  # 1: all decodes before any prefill chunk; 0: in the order of the running batch
        ("immediate_order", "i4"),
        ("deferred_order", "i4"),
        ("victim", "i4"),
        ("preemption", "i4"),
        ("to_host", "i4"),
        ("by_return", "i4"),  # 1: of immediate work, what is least likely asked for again soon gives way first
        ("relegated_last", "i4"),  # 1: immediate requests that were given up go behind deferred ones, too
        ("preempt_for_immediate", "i4"),  # 1: a waiting immediate request may take memory and seats from deferred ones
        ("token_budget", "i4"),  # tokens per iteration, at most the engine's
        ("preempt_count", "i4"),  # deferred requests to preempt now; above 0, none is admitted until the next decision
        ("deferred_token_floor", "i4"),  # tokens per iteration that deferred work gets whatever its step target
        # Immediate requests go behind the others of their class if this many times their prefill, run alone, would make
        # their first token late; 1 is those that cannot be saved, more gives up earlier, 0 never.
        ("relegate", "f8"),
        ("immediate_step_s", "f8"),  # prefill chunks of immediate requests keep the predicted step below this
        ("deferred_step_s", "f8"),  # deferred tokens join while the predicted step stays below this
        ("immediate_slack", "f8"),  # the same, as a share of the least slack of immediate decodes; 0: does not apply
        ("deferred_slack", "f8"),  # likewise for deferred work
        ("deferred_decodes", "f8"),  # share of deferred decodes that run all the same, their time being set aside
        # Deferred requests with less time left in their window than this, or half of it, go behind the others.
        ("deferred_margin_s", "f8"),
        ("deferred_kv_share", "f8"),  # no deferred request is admitted above this share of the cache
        # Of what the prefix cache keeps and nobody uses: above this share of all blocks, that of deferred work gives
        # way first, below it what has been idle longest; 1 is always the latter.
        ("deferred_cache_share", "f8"),
        # No deferred request is admitted if that took more of what immediate work left in the prefix cache than leaves
        # this share of all blocks; 0 is no limit.
        ("immediate_cache_share", "f8"),
        ("reserve_ratio", "f8"),  # memory kept for running requests: this share (at most 1) of the output they may make
        ("reserve_new_ratio", "f8"),  # the same for the request to be admitted
        ("reserve_clip", "f8"),  # output tokens counted per request at most
        # Seconds per remaining token in the DEADLINE order of immediate requests. A weight between half and twice the
        # one in force is not taken up: a network would sort queues with every decision.
        ("order_weight_s", "f8"),
        ("deferred_weight_s", "f8"),  # and in that of deferred ones
        # Output tokens a deferred request is expected to make, for the DEADLINE order where nothing predicts them.
        ("expected_output", "f8"),
        # Where nothing predicts an output, orders count the tokens that it stays below with this probability by what is
        # learned from those that ended; 0: they do not.
        ("length_quantile", "f8"),
        # New scores of single requests, by their numbers in the view; they count in the SCORE order and for
        # LOWEST_SCORE, and stay until changed. Until a policy says otherwise, 1 if immediate and 0 if deferred.
        ("scored", "i4"),  # how many of the entries below are meant
        ("scored_requests", "i4", (MAX_SCORED,)),
        ("scores", "f8", (MAX_SCORED,)),
    ],
    align=True,
)

# All that is one figure: everything but the scores of single requests.
FIGURES = tuple(name for name in DECISION.names or () if DECISION[name].shape == ())


def default_decision() -> np.ndarray:
    """The decision the dials are built around: immediate work first, deferred work in what is left, no limits.

    A 0-d array of `DECISION`; every policy starts from it and changes what its rule needs.
    """
    decision = np.zeros((), dtype=DECISION)
    decision["discipline"] = CLASSES
    decision["decodes_first"] = 1
    decision["victim"] = NEWEST
    decision["preempt_for_immediate"] = 1
    decision["to_host"] = EVERYBODYS
    decision["token_budget"] = np.iinfo(np.int32).max
    decision["immediate_step_s"] = np.inf
    decision["deferred_step_s"] = np.inf
    decision["deferred_kv_share"] = 1.0
    decision["deferred_cache_share"] = 1.0
    decision["reserve_clip"] = np.inf
    return decision


def unsound(decision: Any) -> str | None:
    """What is wrong with a decision, in words; None if an engine can carry it out."""
    if not isinstance(decision, np.ndarray | np.void) or decision.dtype != DECISION or decision.shape != ():
        return f"{type(decision).__name__} is no decision, which is a 0-d array of DECISION"
    fault = _fault(np.asarray(decision).reshape(1))
    return None if fault < 0 else f"{(DECISION.names or ())[fault]}={decision[(DECISION.names or ())[fault]]}"


_PLACES = {name: i for i, name in enumerate(DECISION.names or ())}
_DISCIPLINE, _IMMEDIATE_ORDER, _DEFERRED_ORDER, _VICTIM, _PREEMPTION, _TO_HOST, _BUDGET, _PREEMPT_COUNT, _SCORED = (
    _PLACES[name]
    for name in (
        "discipline", "immediate_order", "deferred_order", "victim", "preemption", "to_host", "token_budget",
        "preempt_count", "scored",
    )
)  # fmt: skip
_RELEGATE, _LENGTH_QUANTILE = _PLACES["relegate"], _PLACES["length_quantile"]


@compiled
def _fault(decisions: np.ndarray) -> int:
    """Number of the first field that cannot be carried out, or -1. NaN is never meant; infinity may be."""
    decision = decisions[0]
    if not 0 <= decision.discipline <= CLASSES:
        return _DISCIPLINE
    if not 0 <= decision.immediate_order <= SCORE:
        return _IMMEDIATE_ORDER
    if not 0 <= decision.deferred_order <= SCORE:
        return _DEFERRED_ORDER
    if not 0 <= decision.victim <= LEAST_COMPUTED:
        return _VICTIM
    if not 0 <= decision.preemption <= SWAP:
        return _PREEMPTION
    if not 0 <= decision.to_host <= EVERYBODYS:
        return _TO_HOST
    if decision.token_budget < 1:
        return _BUDGET
    if decision.preempt_count < 0:
        return _PREEMPT_COUNT
    if not 0 <= decision.scored <= MAX_SCORED:
        return _SCORED
    figures = (
        decision.relegate, decision.immediate_step_s, decision.deferred_step_s, decision.immediate_slack,
        decision.deferred_slack, decision.deferred_decodes, decision.deferred_margin_s, decision.deferred_kv_share,
        decision.deferred_cache_share, decision.immediate_cache_share, decision.reserve_ratio,
        decision.reserve_new_ratio, decision.reserve_clip, decision.order_weight_s, decision.deferred_weight_s,
        decision.expected_output, decision.length_quantile,
    )  # fmt: skip
    for i in range(len(figures)):
        if np.isnan(figures[i]):
            return _RELEGATE + i
    if not 0 <= decision.length_quantile < 1:
        return _LENGTH_QUANTILE
    for i in range(decision.scored):
        if np.isnan(decision.scores[i]):
            return _SCORED
    return -1
