"""What actions do: dials mean what their table says, scores rank requests, and nothing breaks anything."""

from __future__ import annotations

import numpy as np
import pytest
from episodes import PROMISE, Requests, random_actions, small_engine, small_task
from hypothesis import given, settings
from hypothesis import strategies as st

from flexirl.envs.fleet import Fleet
from flexirl.policies.interface.action import (
    DIALS,
    GRID,
    GRID_ZERO,
    NUM_DIALS,
    ORDER_WEIGHT_S,
    PREEMPTS,
    decision_from_dials,
    set_dials,
)
from flexirl.policies.interface.decision import (
    CHEAPER,
    CLASSES,
    DEADLINE,
    DECISION,
    IMMEDIATES,
    NEWEST,
    default_decision,
)
from flexirl.policies.interface.view import VISIBLE, VISIBLE_PER_QUEUE
from flexirl.runtime.scheduler.invariants import check_invariants
from flexirl.runtime.scheduler.state import RUNNING
from flexirl.workloads.trace import DEFERRED

# Where each dial shows in a decision; the rest of a decision no dial changes.
FIELDS = {
    "immediate_slack": ["immediate_slack"],
    "deferred_slack": ["deferred_slack"],
    "deferred_decodes": ["deferred_decodes"],
    "step": ["immediate_step_s", "deferred_step_s"],
    "deferred_kv": ["deferred_kv_share"],
    "preempt": ["preempt_count"],
    "relegate": ["relegate"],
    "window": ["deferred_margin_s"],
    "kept_cache": ["immediate_cache_share"],
    "short_first": ["deferred_weight_s"],
}


def decided(dials: np.ndarray) -> np.ndarray:
    return decision_from_dials(dials, PROMISE.tpot_s)


def in_units(text: str) -> float:
    """The number that an entry of the table stands for: "3 TPOT SLO" is in seconds."""
    number, *unit = text.split(" ", 1)
    assert unit in ([], ["TPOT SLO"])
    return float(number) * (PROMISE.tpot_s if unit else 1.0)


@pytest.mark.parametrize("dial", range(NUM_DIALS), ids=[dial.name for dial in DIALS])
@pytest.mark.parametrize("position", [-1, 0, 1])
def test_a_dial_sets_what_its_table_says_and_nothing_else(dial: int, position: int) -> None:
    dials = np.zeros(NUM_DIALS)
    dials[dial] = position
    decision, neutral = decided(dials), decided(np.zeros(NUM_DIALS))
    table = DIALS[dial]
    expected = in_units({-1: table.low, 0: table.zero, 1: table.high}[position])
    fields = FIELDS[table.name]
    for name in decision.dtype.names or ():
        wanted = expected if name in fields else neutral[name]
        assert decision[name] == pytest.approx(wanted, rel=1e-6, abs=1e-12)


def test_dials_are_monotonous() -> None:
    positions = np.linspace(-1, 1, 41)
    for dial, table in enumerate(DIALS):
        decisions = [decided(np.eye(NUM_DIALS)[dial] * position) for position in positions]
        for name in FIELDS[table.name]:
            values = np.array([float(decision[name]) for decision in decisions])
            assert (np.diff(values) >= -1e-12).all() and values[-1] > values[0]


def test_zero_is_the_documented_heuristic() -> None:
    """Immediate work, then deferred work, each by due time and length; all of it within the slack of decodes."""
    decision = decided(np.zeros(NUM_DIALS))
    expected = {
        "discipline": CLASSES, "decodes_first": 1, "immediate_order": DEADLINE, "deferred_order": DEADLINE,
        "victim": NEWEST, "preemption": CHEAPER, "to_host": IMMEDIATES, "preempt_for_immediate": 1, "preempt_count": 0,
        "order_weight_s": ORDER_WEIGHT_S, "reserve_ratio": 0.0, "reserve_new_ratio": 0.0, "deferred_token_floor": 0,
        "token_budget": default_decision()["token_budget"], "reserve_clip": np.inf,
    }  # fmt: skip
    assert {name: decision[name].item() for name in expected} == expected


def test_a_decision_does_not_depend_on_the_one_before() -> None:
    used = np.array([default_decision()])
    used.view(np.uint8)[:] = 1
    set_dials(used[0], np.full(NUM_DIALS, 0.3, np.float32), PROMISE.tpot_s, DEADLINE, DEADLINE)
    fresh = decided(np.full(NUM_DIALS, 0.3))
    for name in set(DECISION.names or ()) - {"scored_requests", "scores"}:  # of which none is meant
        assert used[0][name] == fresh[name]


def test_the_grid_lies_within_the_dials() -> None:
    grid = np.array(GRID)
    assert grid.shape[1] == NUM_DIALS and (abs(grid) <= 1).all() and len(np.unique(grid, axis=0)) == len(grid)
    assert not grid[GRID_ZERO].any()
    counts = [int(decided(choice)["preempt_count"]) for choice in grid]
    assert counts == [0] * PREEMPTS + [2]


# ---------------------------------------------------------------------------------------------- harmless

POSITIONS = st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.7, 1.0]), min_size=NUM_DIALS, max_size=NUM_DIALS)


@settings(max_examples=25, deadline=None)
@given(st.lists(POSITIONS, min_size=3, max_size=12))
def test_no_setting_of_the_dials_breaks_an_invariant(sequence: list[list[float]]) -> None:
    fleet = Fleet(small_task(), 1)
    fleet.reset(0)
    for dials in [*sequence, *sequence[::-1]]:
        fleet.step(np.array([dials], np.float32))
        check_invariants(fleet.state(0))


@pytest.mark.parametrize("kind", ["scores", "grid"])
def test_no_score_or_choice_breaks_an_invariant(kind: str) -> None:
    task = small_task(Requests(200, 200, 6.0), engine=small_engine(prefix_caching=1), action=kind)
    fleet = Fleet(task, 2)
    fleet.reset(0)
    for action in random_actions(task, 2, 40):
        fleet.step(action)
        check_invariants(fleet.state(0))
        check_invariants(fleet.state(1))
    assert fleet.state(0).classes["preemptions"].sum() > 0


def test_every_setting_is_harmless_for_one_interval() -> None:
    """Members of one group play zero, but for one interval each in which all dials stand at random ends."""
    task = small_task(duration_s=16.0)
    members = 128
    fleet = Fleet(task, members, group_size=members)
    fleet.reset(0)
    rng = np.random.default_rng(0)
    at = rng.integers(0, 60, members)
    ends = rng.choice([-1.0, 0.0, 1.0], (members, NUM_DIALS)).astype(np.float32)
    at[0] = -1
    for step in range(80):
        fleet.step(np.where((at == step)[:, None], ends, np.float32(0)))
    revenue = np.array([fleet.episode_figures(m)["revenue_per_s"] for m in range(members)])
    assert revenue.min() > 0.9 * revenue[0] and revenue.mean() > 0.97 * revenue[0]


# ---------------------------------------------------------------------------------------------- scores

IMMEDIATE_SLOTS, DEFERRED_SLOTS, RUNNING_SLOTS = 0, VISIBLE_PER_QUEUE, 2 * VISIBLE_PER_QUEUE
NOBODY = Requests(0, 0, 1.0)


def scores(values: dict[int, float]) -> np.ndarray:
    action = np.zeros((1, VISIBLE), np.float32)
    for slot, score in values.items():
        action[0, slot] = score
    return action


def running(fleet: Fleet) -> list[int]:
    return np.flatnonzero(fleet.state(0).requests["status"] == RUNNING).tolist()


def test_admission_follows_the_scores() -> None:
    waiting = Requests(6, 6, 0.0, (100, 100), (150, 150))
    task = small_task(NOBODY, waiting, engine=small_engine(max_running=2), action="scores", interval_s=0.01)
    fleet = Fleet(task, 1)
    fleet.reset(0)
    # Numbers 0 to 3 are visible, 4 and 5 stand at the score they were born with, 0.
    fleet.step(scores(dict(zip(range(DEFERRED_SLOTS, DEFERRED_SLOTS + 4), (-0.5, 0.9, 0.1, 0.8), strict=True))))
    assert running(fleet) == [1, 3]
    fleet.reset(0)
    fleet.step(scores(dict(zip(range(DEFERRED_SLOTS, DEFERRED_SLOTS + 4), (-0.5, 0.9, -0.1, -0.2), strict=True))))
    assert running(fleet) == [1, 4]


@pytest.mark.parametrize(
    "values, first",
    [({}, 0), ({DEFERRED_SLOTS: 0.9}, 0), ({IMMEDIATE_SLOTS: -0.6, DEFERRED_SLOTS: 0.9}, 1)],
)
def test_immediate_requests_rank_first_unless_scores_say_otherwise(values: dict[int, float], first: int) -> None:
    """One iteration with tokens for one of them. (Of seats and memory an immediate request may rob the other.)"""
    one = Requests(1, 1, 0.0, (100, 100), (50, 50))
    task = small_task(one, one, engine=small_engine(max_tokens_per_step=100), action="scores", interval_s=1e-4)
    fleet = Fleet(task, 1)
    fleet.reset(0)
    fleet.step(scores(values))
    assert fleet.state(0).requests["computed"][:2].tolist() == [100 * (r == first) for r in range(2)]


@pytest.mark.parametrize("newest_scores, evicted", [((0.5, -0.5), 0), ((-0.5, 0.5), 1)])
def test_victims_come_from_the_low_end(newest_scores: tuple[float, float], evicted: int) -> None:
    """Two requests grow until memory is short: the one with the lower score makes room, oldest or newest."""
    pair = Requests(2, 2, 0.0, (160, 160), (200, 200))
    engine = small_engine(kv_blocks=30, host_kv_blocks=0, max_model_len=400)
    task = small_task(NOBODY, pair, engine=engine, action="scores", interval_s=0.05)
    fleet = Fleet(task, 1)
    fleet.reset(0)
    fleet.step(scores({}))
    assert running(fleet) == [0, 1]
    ranks = scores(dict(zip((RUNNING_SLOTS, RUNNING_SLOTS + 1), newest_scores, strict=True)))
    for _ in range(100):
        fleet.step(ranks)
        if len(running(fleet)) == 1:
            break
    assert running(fleet) == [1 - evicted]
    assert fleet.state(0).requests["preemptions"][:2].tolist() == [int(r == evicted) for r in range(2)]
    assert fleet.state(0).classes["running"][DEFERRED] == 1
