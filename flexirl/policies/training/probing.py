"""Probing: an agent that learns by trying, in whole episodes, every dial a little up and down.

Members that replay the same arrivals play the agent, the agent with one dial moved up, and so on. What they earn makes
a parabola for each dial and episode. The agent is then fitted to the tops of the parabolas of many episodes at once, in
the states it came through, each weighted by its curvature: where a dial matters little it is free, and the noise of
single episodes averages out over those that look alike. Then others are probed, with the agent as it is now.

This is a gradient by finite differences on common random numbers, as evolution strategies have it, but taken in the
space of actions and passed through the network (as in Silver et al., Deterministic policy gradient algorithms, ICML
2014), with curvatures to say how far to go. Whole episodes are compared by what they earned, so nothing is discounted
and no reward has to tell when it was earned.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm

from flexirl.envs.fleet import Fleet, Task
from flexirl.policies.interface.action import DIALS, NUM_DIALS

REACH = 2.0  # moves: a parabola is not believed further out
STIFFNESS = 0.03  # of the worth per squared dial, added to every curvature: what cannot be told from noise stays put
EVERY = 10  # decisions between two observations to learn from: neighbours are much alike
TOGETHER = 11  # episodes that are played at once
BATCH = 4096

# All but `preempt`, which does nothing in the middle of its range.
PROBED_DIALS = [i for i, dial in enumerate(DIALS) if dial.name != "preempt"]
_UP = np.eye(NUM_DIALS, dtype=np.float32)[PROBED_DIALS]
# The agent itself, then each dial up, then each dial down.
_PROBES = np.vstack([np.zeros((1, NUM_DIALS), np.float32), _UP, -_UP])


class Lesson(NamedTuple):
    """What probing one task says: float32, a row for each of n decisions."""

    observed: np.ndarray  # (n, observations)
    wanted: np.ndarray  # (n, NUM_DIALS)
    weights: np.ndarray  # (n, NUM_DIALS)


class Probe(NamedTuple):
    """What came of probing some episodes."""

    lessons: list[Lesson]  # of each
    figures: list[dict[str, float]]  # of the agent itself in each, as of `Fleet.episode_figures`
    rewards: list[float]  # of the agent itself, summed over each
    decisions: int  # of all members together


class Probing(PPO):
    """In the frame of stable-baselines3: `learn` goes by rounds, and steps are the decisions of all members.

    A subclass of PPO for its network and its files, which `grouped_ppo` can go on from. It needs the dials, and engines
    that can replay arrivals side by side, as only the surrogate can.
    """

    def __init__(
        self,
        *args: Any,
        episodes: int = 22,
        remembered: int = 8,
        moves: Sequence[float] = (0.2, 0.1),
        updates: int = 500,
        **kwargs: Any,
    ) -> None:
        """episodes: of each round, each of another task; remembered: rounds to whose parabolas the agent is fitted, for
        those of much earlier agents would hold it back; moves: of a dial, up and down, in the first round and in the
        last; updates: of each fit, by Adam. The rest as of PPO.
        """
        self.episodes, self.remembered, self.updates = episodes, remembered, updates
        self.moves = tuple(moves)
        self.probed = 0  # episodes so far
        self.lessons: list[Lesson] = []
        super().__init__(*args, **{"use_sde": True, "n_steps": 64, **kwargs})  # noise as grouped_ppo has it

    def learn(
        self,
        total_timesteps: int,
        callback: Any = None,
        log_interval: int = 1,
        tb_log_name: str = "Probing",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Probing:
        """Rounds until so many decisions have been made; interrupted, the agent is as it was after the last round."""
        total, callback = self._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        callback.on_training_start(locals(), globals())
        infos: list[dict[str, Any]] = []
        actions = np.zeros((0, NUM_DIALS), np.float32)
        going = total == 0 or self._tell(callback, infos, actions)  # of the start
        while going and self.num_timesteps < total:
            before = copy.deepcopy(self.policy.state_dict())
            try:
                infos, actions = self._round(float(np.interp(self.num_timesteps / total, [0, 1], self.moves)))
            except KeyboardInterrupt:
                self.policy.load_state_dict(before)
                raise
            going = self._tell(callback, infos, actions)
            self.logger.dump(self.num_timesteps)
        callback.on_training_end()
        return self

    def _tell(self, callback: Any, infos: list[dict[str, Any]], actions: np.ndarray) -> bool:
        callback.update_locals({"infos": infos, "actions": actions})
        going = bool(callback.on_step())
        callback.on_rollout_end()
        return going

    def _round(self, move: float) -> tuple[list[dict[str, Any]], np.ndarray]:
        tasks = self.env.fleet.tasks  # type: ignore[union-attr]
        found: list[Lesson] = []
        infos: list[dict[str, Any]] = []
        decisions = 0
        for first in range(0, self.episodes, TOGETHER):
            numbers = range(self.probed + first, self.probed + min(first + TOGETHER, self.episodes))
            probed = probe(self, [self._task(tasks, i) for i in numbers], move, 1000 * int(self.seed or 0) + numbers[0])
            found += probed.lessons
            for figures, reward in zip(probed.figures, probed.rewards, strict=True):
                infos.append({"figures": figures, "episode": {"r": reward}})
            decisions += probed.decisions
        lessons = [*self.lessons, _together(found)][-self.remembered :]
        loss = _fit(self, lessons, self.updates, self.probed)
        self.lessons, self.probed = lessons, self.probed + self.episodes
        self.num_timesteps += decisions
        self.logger.record("train/loss", loss)
        self.logger.record("train/move", move)
        return infos, np.concatenate([lesson.wanted for lesson in found])

    def _task(self, tasks: Sequence[Task], number: int) -> Task:
        """All tasks are probed once, in an order that follows from the seed, before one is probed again."""
        again, i = divmod(number, len(tasks))
        return tasks[np.random.default_rng([int(self.seed or 0), again]).permutation(len(tasks))[i]]


def probe(agent: BaseAlgorithm, tasks: Sequence[Task], move: float, seed: int) -> Probe:
    """Plays one episode of each task with the agent and with every dial `move` up and down."""
    size = len(_PROBES)
    fleet = Fleet(tasks, len(tasks) * size, size, len(tasks))
    moves = np.tile(move * _PROBES, (len(tasks), 1))
    observations, over = fleet.reset(seed), np.zeros(fleet.members, bool)
    observed: list[list[np.ndarray]] = [[] for _ in tasks]
    taken: list[list[np.ndarray]] = [[] for _ in tasks]
    rewards, step, decisions = np.zeros(fleet.members), 0, 0
    while not over.all():
        action = mean_action(agent, observations)
        if step % EVERY == 0:
            for t in np.flatnonzero(~over[::size]):
                observed[t].append(observations[t * size].copy())
                taken[t].append(action[t * size])
        decisions += int((~over).sum())
        observations, earned, over = fleet.step(action + moves)
        rewards += earned
        step += 1
    figures = [fleet.episode_figures(m) for m in range(fleet.members)]
    fleet.close()
    shares = np.array([each["worth_share"] for each in figures]).reshape(len(tasks), size)
    lessons = []
    for seen, acted, worth in zip(observed, taken, shares, strict=True):
        offsets, weights = tops(worth, move)
        actions = np.array(acted)
        lessons.append(Lesson(np.array(seen), actions + offsets, np.broadcast_to(weights, actions.shape)))
    return Probe(lessons, figures[::size], rewards[::size].tolist(), decisions)


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


def _fit(agent: BaseAlgorithm, lessons: Sequence[Lesson], updates: int, seed: int) -> float:
    """Weighted least squares by Adam (Kingma and Ba, ICLR 2015); returns the last loss."""
    observed, wanted, weights = (torch.as_tensor(part) for part in _together(lessons))
    policy: Any = agent.policy
    layers = [*policy.mlp_extractor.policy_net.parameters(), *policy.action_net.parameters()]
    optimizer = torch.optim.Adam(layers, agent.lr_schedule(1.0))
    draw = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        chosen = torch.randint(len(observed), (BATCH,), generator=draw)
        loss = (weights[chosen] * (_mean(policy, observed[chosen]) - wanted[chosen]) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())
