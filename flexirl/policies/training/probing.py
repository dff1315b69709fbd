"""Probing: improves an agent that sets the dials in many tasks by trying, in each, every dial a little up and down.

Members that replay the same arrivals play the agent, the agent with one dial moved up, and so on. What they earn makes
a parabola for each dial and task. The agent is then fitted to the tops of the parabolas of many tasks at once, in the
states it came through, each weighted by its curvature: where a dial matters little it is free, and the noise of single
episodes averages out over tasks that look alike. Then other tasks are probed, with the agent as it is now.

This is a gradient by finite differences on common random numbers, as evolution strategies have it, but taken in the
space of actions and passed through the network (as in Silver et al., Deterministic policy gradient algorithms, ICML
2014), with curvatures to say how far to go.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm

from flexirl.envs.fleet import Fleet, Task
from flexirl.policies.interface.action import DIALS, NUM_DIALS
from flexirl.progress import progress_bar

ROUNDS, PROBED = 10, 44  # tasks of each round
REMEMBERED = 4  # rounds whose parabolas the agent is fitted to; those of much earlier agents would hold it back
MOVES = (0.2, 0.1)  # of a dial, up and down: in the first round and in the last
REACH = 2.0  # moves: a parabola is not believed further out
STIFFNESS = 0.03  # of the worth per squared dial, added to every curvature: what cannot be told from noise stays put
EVERY = 10  # decisions between two observations to learn from: neighbours are much alike
TOGETHER = 4  # tasks that are played at once
UPDATES, BATCH, LEARNING_RATE = 500, 4096, 1e-3  # of each round

# All but `preempt`, which does nothing in the middle of its range.
PROBED_DIALS = [i for i, dial in enumerate(DIALS) if dial.name != "preempt"]
_UP = np.eye(NUM_DIALS, dtype=np.float32)[PROBED_DIALS]
# The agent itself, then each dial up, then each dial down.
_PROBES = np.vstack([np.zeros((1, NUM_DIALS), np.float32), _UP, -_UP])


def settings() -> dict[str, Any]:
    """What an agent that probing has improved was made with."""
    return {
        "rounds": ROUNDS, "tasks": PROBED, "remembered": REMEMBERED, "moves": MOVES, "reach": REACH,
        "stiffness": STIFFNESS, "every": EVERY, "updates": UPDATES, "batch": BATCH, "learning_rate": LEARNING_RATE,
    }  # fmt: skip


class Lesson(NamedTuple):
    """What probing one task says: float32, a row for each of n decisions."""

    observed: np.ndarray  # (n, observations)
    wanted: np.ndarray  # (n, NUM_DIALS)
    weights: np.ndarray  # (n, NUM_DIALS)


class Progress(NamedTuple):
    """How far probing has come: rounds that are done, and the lessons that are remembered of them."""

    rounds: int
    lessons: list[Lesson]

    def save(self, path: Path) -> None:
        """Writes an archive of plain arrays."""
        np.savez(path, rounds=self.rounds, **{f"{i}_{name}": part for i, lesson in enumerate(self.lessons)
                                              for name, part in lesson._asdict().items()})  # fmt: skip

    @staticmethod
    def load(path: Path) -> Progress:
        """What `save` wrote."""
        with np.load(path) as archive:
            count = (len(archive.files) - 1) // len(Lesson._fields)
            lessons = [Lesson(*(archive[f"{i}_{name}"] for name in Lesson._fields)) for i in range(count)]
            return Progress(int(archive["rounds"]), lessons)


NOTHING = Progress(0, [])


def improve(
    agent: BaseAlgorithm, tasks: Sequence[Task], seed: int, after: Progress, progress: bool
) -> Iterator[Progress]:
    """Fits the mean of the agent's policy to what probing finds; only the policy's layers change.

    Yields after each round; saved then, the agent and the progress are all that it takes to go on, to the same end.
    seed: of the episodes, and of the tasks' order.
    """
    order = np.random.default_rng(seed).permutation(len(tasks))
    count = min(PROBED, len(tasks))
    lessons = after.lessons
    with progress_bar(ROUNDS * count, " tasks", progress, initial=after.rounds * count, desc="probing") as bar:
        for round_ in range(after.rounds, ROUNDS):
            move = float(np.interp(round_, [0, ROUNDS - 1], MOVES))
            chosen = [tasks[order[(round_ * count + i) % len(tasks)]] for i in range(count)]
            found: list[Lesson] = []
            for first in range(0, count, TOGETHER):
                found += probe(agent, chosen[first : first + TOGETHER], move, seed + round_ * count + first)
                bar.update(min(TOGETHER, count - first))
            lessons = [*lessons[-REMEMBERED + 1 :], _together(found)]
            _fit(agent, lessons, seed + round_)
            yield Progress(round_ + 1, lessons)


def probe(agent: BaseAlgorithm, tasks: Sequence[Task], move: float, seed: int) -> list[Lesson]:
    """Plays one episode of each task with the agent and with every dial `move` up and down."""
    size = len(_PROBES)
    fleet = Fleet(tasks, len(tasks) * size, size, len(tasks))
    moves = np.tile(move * _PROBES, (len(tasks), 1))
    observations, over = fleet.reset(seed), np.zeros(fleet.members, bool)
    observed: list[list[np.ndarray]] = [[] for _ in tasks]
    taken: list[list[np.ndarray]] = [[] for _ in tasks]
    step = 0
    while not over.all():
        action = mean_action(agent, observations)
        if step % EVERY == 0:
            for t in np.flatnonzero(~over[::size]):
                observed[t].append(observations[t * size].copy())
                taken[t].append(action[t * size])
        observations, _, over = fleet.step(action + moves)
        step += 1
    shares = np.array([fleet.episode_figures(m)["worth_share"] for m in range(fleet.members)])
    fleet.close()
    lessons = []
    for seen, acted, worth in zip(observed, taken, shares.reshape(len(tasks), size), strict=True):
        offsets, weights = tops(worth, move)
        actions = np.array(acted)
        lessons.append(Lesson(np.array(seen), actions + offsets, np.broadcast_to(weights, actions.shape)))
    return lessons


def tops(worth: np.ndarray, move: float) -> tuple[np.ndarray, np.ndarray]:
    """Where the parabolas through what `probe` earned are highest, and their curvatures.

    worth: of the agent, of each of PROBED_DIALS up, of each of them down, 0 or more in any unit. Returns two float32
    arrays (NUM_DIALS,): offsets in positions of a dial; curvatures as shares of the agent's worth per squared position
    (of the highest, where the agent earns nothing). Of a dial that is not probed they are 0 and STIFFNESS.
    """
    shares = worth / (worth[0] or worth.max() or 1.0)
    up, down = np.split(shares[1:], 2)
    slopes = (up - down) / (2 * move)
    offsets, curvatures = np.zeros(NUM_DIALS, np.float32), np.full(NUM_DIALS, STIFFNESS, np.float32)
    curvatures[PROBED_DIALS] += np.maximum((2 * shares[0] - up - down) / move**2, 0.0)
    offsets[PROBED_DIALS] = np.clip(slopes / curvatures[PROBED_DIALS], -REACH * move, REACH * move)
    return offsets, curvatures


def mean_action(agent: BaseAlgorithm, observations: np.ndarray) -> np.ndarray:
    """The mean of the policy's actions, not cut to what dials can be: float32 (n, NUM_DIALS)."""
    with torch.no_grad():
        mean: np.ndarray = _mean(agent.policy, torch.as_tensor(observations)).numpy()
    return mean


def _mean(policy: Any, observations: torch.Tensor) -> torch.Tensor:
    features = policy.extract_features(observations, policy.pi_features_extractor)
    mean: torch.Tensor = policy.action_net(policy.mlp_extractor.forward_actor(features))
    return mean


def _together(lessons: Sequence[Lesson]) -> Lesson:
    return Lesson(*(np.concatenate(part) for part in zip(*lessons, strict=True)))


def _fit(agent: BaseAlgorithm, lessons: Sequence[Lesson], seed: int) -> None:
    """Weighted least squares by Adam (Kingma and Ba, ICLR 2015)."""
    observed, wanted, weights = (torch.as_tensor(part) for part in _together(lessons))
    policy: Any = agent.policy
    layers = [*policy.mlp_extractor.policy_net.parameters(), *policy.action_net.parameters()]
    optimizer = torch.optim.Adam(layers, LEARNING_RATE)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(UPDATES):
        chosen = torch.randint(len(observed), (BATCH,), generator=draw)
        loss = (weights[chosen] * (_mean(policy, observed[chosen]) - wanted[chosen]) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
