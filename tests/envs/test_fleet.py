"""A fleet's members: the same arrivals within a group, nothing shared beyond them, the same result every time."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from episodes import LATENCY, Requests, random_actions, small_engine, small_task

from flexirl.envs.fleet import Fleet, Task
from flexirl.errors import UserError
from flexirl.policies.interface.action import NUM_DIALS
from flexirl.runtime.scheduler.invariants import check_invariants
from flexirl.workloads.slo import SLO


def play(fleet: Fleet, steps: int, seed: int = 1, stagger: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Random actions for some steps: observations (steps, members, size) and rewards (steps, members)."""
    fleet.reset(seed, stagger)
    observations, rewards = [], []
    for action in random_actions(fleet.task, fleet.members, steps):
        seen, paid, over = fleet.step(action)
        observations.append(seen.copy())
        rewards.append(paid.copy())
        if over.any():
            fleet.restart(over)
    return np.stack(observations), np.stack(rewards)


def test_members_of_a_group_replay_the_same_arrivals() -> None:
    task = small_task()
    fleet = Fleet(task, 8, group_size=4)
    fleet.reset(0)
    actions = np.stack(random_actions(task, 8, 40)[:40])
    actions[:, 1:] = actions[:, :1]  # all as the first
    actions[15, 2] = 1  # but for one action of one member
    rewards = []
    for action in actions:
        observations, paid, _ = fleet.step(action)
        rewards.append(paid.copy())
        others = [0, 1, 3]
        assert (observations[others] == observations[0]).all()
    table = np.stack(rewards)
    assert (table[:, [1, 3]] == table[:, :1]).all()
    assert (table[:15, 2] == table[:15, 0]).all() and (table[15:, 2] != table[15:, 0]).any()
    assert (table[:, 4:] == table[:, 4:5]).all()
    assert (table[:, 4] != table[:, 0]).any()  # the other group has other arrivals
    arrivals = [fleet.state(m).requests["arrival_s"] for m in range(8)]
    assert (arrivals[0] == arrivals[2]).all() and (arrivals[0] != arrivals[4]).any()


def test_tasks_of_a_mixture_are_played_as_alone() -> None:
    """Engines, promises, prices of time and queue orders differ; members of a mixture and of pure fleets do not."""
    windowed = Requests(60, 60, 0.0, (200, 2000), (10, 200), window_s=4.0)
    tasks = [
        small_task(),
        small_task(Requests(30, 40, 5.0), windowed, 6.0, small_engine(max_running=40, kv_blocks=500), LATENCY),
        replace(small_task(deferred_order="arrival"), slo=SLO(0.3, 0.02)),
    ]
    mixed = play(Fleet(tasks, 6, group_size=2, traces=6), 60)
    for which, task in enumerate(tasks):
        alone = play(Fleet(task, 6, group_size=2, traces=6), 60)
        members = slice(2 * which, 2 * which + 2)
        steps = round(task.duration_s() / task.interval_s)  # the second episode is of another task
        assert (mixed[0][:steps, members] == alone[0][:steps, members]).all()
        assert which > 0 or (mixed[1][:steps, members] == alone[1][:steps, members]).all()  # others differ in scale


def test_a_mixture_must_agree_in_its_actions() -> None:
    with pytest.raises(UserError, match="differ in env"):
        Fleet([small_task(), small_task(interval_s=0.5)], 2)


def test_groups_end_as_one_however_long_the_last_iteration() -> None:
    """Members on iterations longer than a decision interval pass the end of the episode early; the rest must not."""
    engine = small_engine(base_s=0.25, max_tokens_per_step=4096)
    task = small_task(engine=engine, duration_s=5.0)
    fleet = Fleet(task, 8, group_size=4)
    fleet.reset(0)
    passed_early = False
    for step in range(1, 51):
        action = random_actions(task, 8, 1, seed=step)[0]
        action[::2, 2], action[1::2, 2] = 1.0, -1.0
        _, _, over = fleet.step(action)
        assert over.all() if step % 25 == 0 else not over.any()
        clocks = np.array([fleet.state(m).scheduler["now_s"][0] for m in range(8)])
        passed_early |= step % 25 != 0 and bool((clocks >= 5.0).any() and (clocks < 5.0).any())
        fleet.restart(over)
        if over.any():
            assert all(fleet.state(m).scheduler["now_s"][0] == 0.0 for m in range(8))
    assert passed_early


def test_first_episodes_are_staggered() -> None:
    fleet = Fleet(small_task(), 8, group_size=2)
    fleet.reset(0, stagger=True)
    ends: dict[int, list[int]] = {m: [] for m in range(8)}
    for step in range(1, 90):
        _, _, over = fleet.step(np.zeros((8, NUM_DIALS), np.float32))
        for m in np.flatnonzero(over).tolist():
            ends[m].append(step)
        fleet.restart(over)
    for m in range(8):
        assert ends[m] == [10 * (m // 2 + 1) + 40 * i for i in range(2)]


SEED_THAT_GROWS = 8


def growing_task() -> Task:
    """Episodes of very different size."""
    immediate = Requests(20, 1200, 6.0, (20, 200), (2, 10), num_tenants=2)
    return small_task(immediate, Requests(20, 60, 0.0, (200, 1500), (10, 100)))


def test_growing_in_the_middle_of_episodes_changes_nothing() -> None:
    fleet, large = (Fleet(growing_task(), 6, group_size=2, traces=30) for _ in range(2))
    large._allocate(3000, 5, 0)
    fleet.reset(SEED_THAT_GROWS)
    before = len(fleet.state(0).requests)
    grown, given = (play(each, 200, SEED_THAT_GROWS, stagger=True) for each in (fleet, large))
    assert before < len(fleet.state(0).requests) < len(large.state(0).requests) == 3000
    assert (grown[0] == given[0]).all() and (grown[1] == given[1]).all()
    for m in range(6):
        check_invariants(fleet.state(m))


def digest_of_play(threads: int) -> str:
    """A hash of all that a fleet in this process gives back over two episodes."""
    fleet = Fleet(small_task(engine=small_engine(noise=0.05)), 6, group_size=3, threads=threads)
    observations, rewards = play(fleet, 90, seed=4, stagger=True)
    fleet.close()
    return hashlib.sha256(observations.tobytes() + rewards.tobytes()).hexdigest()


def test_same_seed_same_play_whatever_the_threads_and_the_process() -> None:
    here = Path(__file__).parent
    folders = [str(folder) for folder in (here, here.parent, here.parents[1])]
    code = f"import sys; sys.path[:0] = {folders!r}; import test_fleet; "
    run = subprocess.run(
        [sys.executable, "-c", code + "print(test_fleet.digest_of_play(2))"], capture_output=True, text=True, check=True
    )
    assert {digest_of_play(1), digest_of_play(2), digest_of_play(3)} == {run.stdout.strip()}


def test_seeds_are_other_episodes() -> None:
    fleet = Fleet(small_task(), 4)
    first, second, again = (play(fleet, 20, seed)[1] for seed in (1, 2, 1))
    assert (first != second).any() and (first == again).all()


def test_episodes_come_round_after_all_traces() -> None:
    fleet = Fleet(small_task(), 2, traces=3)
    fleet.reset(0)
    played = []
    for _ in range(3):
        for m in range(2):
            fleet.step(np.zeros((2, NUM_DIALS), np.float32))
            played.append(fleet.state(m).requests["prompt_tokens"][:60].sum())
        fleet.restart(np.ones(2, bool))
    assert played[:3] == played[3:] and len(set(played)) == 3


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Fleet(small_task(), 6, group_size=4), "env.members=6 is not a multiple of env.group_size=4"),
        (lambda: Fleet(small_task(), 0), "env.members=0"),
        (lambda: Fleet(small_task(), 4, traces=0), "env.traces=0"),
        (lambda: small_task(action="knobs"), "env.action=knobs is unknown; choose from dials, grid, scores"),
        (lambda: small_task(interval_s=0.0), "env.interval_s=0 is out of range"),
        (lambda: small_task(deferred_order="random"), "order random is unknown"),
    ],
)
def test_mistakes_are_named(make: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()  # type: ignore[operator]


def test_actions_of_another_shape_are_refused() -> None:
    fleet = Fleet(small_task(), 4)
    fleet.reset(0)
    for shape in ((4, 5), (3, 6), (6,), (4, 16)):
        with pytest.raises(ValueError, match="do not fit 4 members"):
            fleet.step(np.zeros(shape, np.float32))
