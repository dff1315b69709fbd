"""Many surrogate engines stepped together inside compiled code: actions in, observations and rewards out.

Members are divided into groups; the members of a group replay the same arrivals at the same simulated times, so that
what the arrivals did to all of them can be told from what a member's own decisions did.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numba as nb
import numpy as np

from flexirl.compiled import compiled
from flexirl.cores import available_cores
from flexirl.envs.reward import REWARD, Reward
from flexirl.errors import UserError
from flexirl.policies.interface import action as actions
from flexirl.policies.interface.action import ORDERS
from flexirl.policies.interface.observation import MEMORY, new_observers, observe, one_observer
from flexirl.policies.interface.view import VISIBLE, new_arrays, one_view, read_only
from flexirl.runtime.borrow import borrow
from flexirl.runtime.profile.capacity import ServiceTime
from flexirl.runtime.profile.engine import EngineProfile
from flexirl.runtime.profile.fits import fits, longest_sequence
from flexirl.runtime.scheduler.accounts import Prices
from flexirl.runtime.scheduler.looking import look
from flexirl.runtime.scheduler.state import CLASS, State, new_states
from flexirl.runtime.simulator import surrogate
from flexirl.workloads.scenario import Scenario
from flexirl.workloads.slo import SLO
from flexirl.workloads.trace import DEFERRED, IMMEDIATE, TRACE_ROW, Trace

SHORTEST_INTERVAL_S = 0.0001  # much less than an iteration
ACTIONS = ("dials", "grid", "scores")
_DIALS, _GRID, _SCORES = range(3)
_GRID_DIALS = np.array(actions.GRID, np.float32)

MEMBER = np.dtype(  # what an episode needs beside the engine's own state
    [
        ("steps", "i8"),
        ("rows", "i8"),  # rows of its trace
        ("duration_s", "f8"),
        ("warmup_s", "f8"),
        ("measured_from_s", "f8"),  # end of the warm-up; 0 until then
        ("immediate_order", "i8"),
        ("deferred_order", "i8"),
        ("deferred_value", "f8"),  # credited so far
        ("lost_value", "f8"),
    ],
    align=True,
)


@dataclass(frozen=True)
class Task:
    """What the members of a fleet play: episodes of a scenario on an engine, under a promise, for a reward."""

    scenario: Scenario
    engine: EngineProfile
    slo: SLO
    reward: Reward
    prices: Prices = field(default_factory=Prices)
    interval_s: float = 0.2
    action: str = "dials"
    immediate_order: str = actions.DEFAULT_IMMEDIATE_ORDER
    deferred_order: str = actions.DEFAULT_DEFERRED_ORDER

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise UserError(f"env.action={self.action} is unknown; choose from {', '.join(ACTIONS)}.")
        for order in (self.immediate_order, self.deferred_order):
            if order not in ORDERS:
                raise UserError(f"Queue order {order} is unknown; choose from {', '.join(ORDERS)}.")
        if not SHORTEST_INTERVAL_S <= self.interval_s < float("inf"):
            raise UserError(
                f"env.interval_s={self.interval_s:g} is out of range; decisions are {SHORTEST_INTERVAL_S:g} s or more "
                "apart."
            )

    @property
    def service_time_s(self) -> ServiceTime:
        """The engine's seconds per request."""
        return ServiceTime(self.engine)

    def duration_s(self) -> float:
        """Seconds of one episode."""
        return self.scenario.length_s(self.service_time_s)

    def draw(self, seed: int) -> Trace:
        """The arrivals of one episode, of requests that ask for what the engine can hold."""
        trace = self.scenario.draw(seed, self.service_time_s, self.slo)
        return trace.within(longest_sequence(self.engine.values))

    def action_shape(self) -> tuple[int, ...]:
        """Numbers per action; () for one discrete choice."""
        return {"dials": (actions.NUM_DIALS,), "grid": (), "scores": (VISIBLE,)}[self.action]

    def revenue_scale(self, trace: Trace) -> float:
        """Price units per second of an engine fully loaded with requests like the trace's."""
        rows = trace.rows[fits(self.engine.values, trace.rows)]
        immediate = rows[rows["request_class"] == IMMEDIATE]
        rows = immediate if len(immediate) else rows
        return float(self.prices.of(rows).sum() / self.service_time_s(rows).sum()) if len(rows) else 1.0


class Fleet:
    """`members` engines in groups of `group_size`, stepped on all cores. Deterministic in the seed.

    Given several tasks, each episode of a group plays the next of them. They must agree in what an action is and in
    the decision interval; everything else may differ. Raises UserError where they do not.
    """

    def __init__(
        self,
        tasks: Task | Sequence[Task],
        members: int,
        group_size: int = 1,
        traces: int = 64,
        threads: int | None = None,
    ):
        if members < 1 or group_size < 1 or members % group_size:
            raise UserError(f"env.members={members} is not a multiple of env.group_size={group_size}.")
        if traces < 1:
            raise UserError(f"env.traces={traces} is out of range; an episode needs at least one trace.")
        self.tasks = [tasks] if isinstance(tasks, Task) else list(tasks)
        self.task = task = self.tasks[0]
        if any((other.action, other.interval_s) != (task.action, task.interval_s) for other in self.tasks):
            raise UserError("The tasks of one fleet differ in env.action or env.interval_s; give them the same.")
        self.members, self.group_size, self.num_traces = members, group_size, traces
        self._observers = new_observers(members, task.action == "scores")
        self.low, self.high = self._observers.low, self._observers.high
        self.observations = np.zeros((members, len(self.low)), np.float32)
        self.rewards = np.zeros(members, np.float32)
        self._kind = ACTIONS.index(task.action)
        self._drawn: dict[int, Trace] = {}
        self._seed = 0
        self._episode = np.zeros(members // group_size, np.int64)
        self._durations_s = [each.duration_s() for each in self.tasks]
        first = self._trace(0)
        self._rewards: dict[int, np.ndarray] = {}
        self._allocate(int(1.1 * len(first)) + 64, first.num_tenants, int(1.1 * len(first.contents)))
        threads = min(threads or available_cores(), members)
        bounds_ = np.linspace(0, members, threads + 1).astype(int)
        self._shares = list(zip(bounds_[:-1].tolist(), bounds_[1:].tolist(), strict=True))
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def _allocate(self, max_requests: int, num_tenants: int, contents: int) -> None:
        engines = [task.engine for task in self.tasks]
        largest = max(engines, key=lambda engine: engine.values["prefix_caching"] * engine.values["kv_blocks"])
        largest = largest.replace(max_running=max(int(engine.values["max_running"]) for engine in engines))
        self._states = new_states(self.members, largest, max_requests, max(num_tenants, 1), contents)
        self._traces = np.zeros((self.members, max_requests), TRACE_ROW)
        self._member = np.zeros(self.members, MEMBER)
        self._reward = np.zeros(self.members, REWARD)
        self._warm = np.zeros((self.members, 2), CLASS)  # totals at the end of the warm-up
        self._watch(VISIBLE if self.task.action == "scores" else 0)

    def _watch(self, visible: int) -> None:
        """Makes the views of the engines in `_states`, for what observes them and for what fills them."""
        views = new_arrays(self.members, visible)
        self._views = views._replace(profile=self._states.engine)
        self._seen = read_only(self._views)

    def _task_of(self, number: int) -> Task:
        """The task that a trace belongs to."""
        return self.tasks[number % len(self.tasks)]

    def _trace(self, number: int) -> Trace:
        if number not in self._drawn:
            self._drawn[number] = self._task_of(number).draw(_child_seed(self._seed, number))
        return self._drawn[number]

    def _reward_of(self, which: int) -> np.ndarray:
        """The reward of a task; its scale is that of one draw of the task, whatever the seed of the episodes."""
        if which not in self._rewards:
            task = self.tasks[which]
            scale = task.revenue_scale(task.draw(_child_seed(0, which)))
            self._rewards[which] = task.reward.record(task.prices, scale)
        return self._rewards[which]

    def reset(self, seed: int, stagger: bool = False) -> np.ndarray:
        """Starts all members anew; observations (members, size).

        stagger: first episodes end at different times, so that not all members end at once ever after.
        """
        if seed != self._seed:
            self._seed = seed
            self._drawn.clear()
        groups = self.members // self.group_size
        needed = [self._trace(number) for number in range(min(self.num_traces, groups))]
        rows, tenants = max(map(len, needed)), max(trace.num_tenants for trace in needed)
        contents = max(len(trace.contents) for trace in needed)
        if not self._has_room(rows, tenants, contents):
            self._allocate(int(1.1 * rows), tenants, int(1.1 * contents))
        for group in range(groups):
            self._episode[group] = group
            self._start(group, (group + 1) / groups if stagger else 1.0)
        return self.observations

    def _start(self, group: int, share: float = 1.0) -> None:
        number = int(self._episode[group]) % self.num_traces
        task, trace = self._task_of(number), self._trace(number)
        which = number % len(self.tasks)
        if not self._has_room(len(trace), trace.num_tenants, len(trace.contents)):
            self._grow(len(trace), trace.num_tenants, len(trace.contents))
        for m in range(group * self.group_size, (group + 1) * self.group_size):
            self._traces[m, : len(trace)] = trace.rows
            self._member[m] = np.zeros((), MEMBER)
            self._member[m]["rows"] = len(trace)
            self._member[m]["duration_s"] = share * self._durations_s[which]
            self._member[m]["warmup_s"] = task.scenario.warmup_s
            self._member[m]["immediate_order"] = ORDERS[task.immediate_order]
            self._member[m]["deferred_order"] = ORDERS[task.deferred_order]
            self._states.engine[m] = task.engine.values
            self._views.promise[m] = (task.slo.ttft_s, task.slo.tpot_s)
            self._reward[m] = self._reward_of(which)[0]
            self._observers.memory[m] = np.zeros((), MEMORY)
            self._warm[m] = np.zeros((), CLASS)
            self._start_engine(m, task, trace, _child_seed(self._seed, int(self._episode[group]), m))

    def _start_engine(self, m: int, task: Task, trace: Trace, seed: int) -> None:
        """Puts the engine of member m at the start of a task's trace, and observes it."""
        self._states.contents[m, : len(trace.contents)] = trace.contents
        _start_member(self._states, self._traces, self._member, m, seed, task.slo.patience)
        self._observe(m)

    def _observe(self, m: int) -> None:
        """Observes member m."""
        _observe_member(self._states, self._views, self._seen, self._observers, self.observations, m)

    def _has_room(self, max_requests: int, num_tenants: int, contents: int) -> bool:
        states = self._states
        return (
            max_requests <= self._traces.shape[1]
            and num_tenants <= states.tenants.shape[1]
            and contents <= states.contents.shape[1]
        )

    def _grow(self, max_requests: int, num_tenants: int, contents: int) -> None:
        """Makes room for a longer trace in the middle of other members' episodes."""
        old = (self._states, self._traces, self._views, self._member, self._warm, self._reward)
        self._allocate(
            max(int(1.1 * max_requests), old[1].shape[1]),
            max(num_tenants, old[0].tenants.shape[1]),
            max(int(1.1 * contents), old[0].contents.shape[1]),
        )
        for new_array, old_array in zip(self._states, old[0], strict=True):
            new_array[tuple(slice(n) for n in old_array.shape)] = old_array
        self._states.lanes[:, :, old[0].lanes.shape[2] :] = -1
        self._traces[:, : old[1].shape[1]] = old[1]
        self._views.promise[:] = old[2].promise
        self._member[:], self._warm[:], self._reward[:] = old[3:]

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One decision interval of every member: observations, rewards (float32) and whose episode is over (bool).

        action: float32 (members, NUM_DIALS or VISIBLE), or integers (members,) for the grid. Members whose episode is
        over have their last observation; `restart` begins their next one. Raises ValueError for another shape, and for
        numbers that are not finite.
        """
        if self._kind == _GRID:
            action = _GRID_DIALS[np.asarray(action, np.int64).reshape(self.members)]
        action = np.ascontiguousarray(action, np.float32)
        numbers = VISIBLE if self._kind == _SCORES else actions.NUM_DIALS
        if action.shape != (self.members, numbers):
            raise ValueError(f"Actions of shape {action.shape} do not fit {self.members} members of {numbers} numbers.")

        if not np.isfinite(action).all():
            raise ValueError("Actions hold a number that is not finite; an action is from -1 to 1.")
        self._run(action)
        now_s = self._states.scheduler["now_s"][:, 0]
        warmup_s = self._member["warmup_s"]
        warm = (self._member["measured_from_s"] == 0) & (now_s >= warmup_s) & (warmup_s > 0)
        if warm.any():
            self._warm[warm] = self._states.classes[warm]
            self._member["measured_from_s"][warm] = now_s[warm]
        # By steps, not by the clock: a long iteration takes one member past the end before the others of its group.
        over = self._member["steps"] * self.task.interval_s >= self._member["duration_s"] - 1e-9
        return self.observations, self.rewards, over

    def _run(self, action: np.ndarray) -> None:
        """Runs all engines for an interval under these dials or scores; sets observations and rewards."""

        def run(share: tuple[int, int]) -> None:
            _step_members(
                self._states, self._traces, self._member, self._views, self._seen, self._observers, self._reward,
                action, self._kind, self.task.interval_s, self.observations, self.rewards, *share,
            )  # fmt: skip

        if self._pool is None:
            run(self._shares[0])
        else:
            list(self._pool.map(run, self._shares))

    def restart(self, over: np.ndarray) -> None:
        """Starts the next episode of the groups whose members are over (bool, members); a group ends as one."""
        for group in np.flatnonzero(over[:: self.group_size]):
            self._episode[group] += self.members // self.group_size
            self._start(int(group))

    def action_masks(self) -> np.ndarray:
        """Which choices of the grid can do anything now: bool (members, choices)."""
        masks = np.ones((self.members, len(actions.GRID)), bool)
        masks[:, actions.PREEMPTS] = self._states.classes["running"][:, DEFERRED] > 0
        return masks

    def state(self, member: int) -> State:
        """The scheduler state of one member, live."""
        return State(*(array[member] for array in self._states))

    def episode_figures(self, member: int) -> dict[str, float]:
        """Value, revenue, attainment, deferred throughput and preemptions since the warm-up of the member's episode.

        worth_share: what the task's reward is about, value where lateness counts and revenue elsewhere, in units of
        what the engine would earn if loaded with nothing but such immediate requests and serving them all, so that
        tasks can be averaged. Attainment counts the promises decided since then, not those of the requests that
        arrived since then.
        """
        paid = self._reward[member]
        now_s = float(self._states.scheduler["now_s"][member, 0])
        elapsed_s = max(now_s - float(self._member["measured_from_s"][member]), 1e-9)

        def since(name: str) -> np.ndarray:
            return self._states.classes[member][name] - self._warm[member][name]

        kept = paid["prompt_price"] * since("kept_prompt") + paid["output_price"] * since("kept_output")
        immediate_kept, immediate_lost = since("kept")[IMMEDIATE], since("lost")[IMMEDIATE]
        decided = immediate_kept + immediate_lost
        done = since("prompt_done")[DEFERRED] + since("output_done")[DEFERRED]
        revenue_per_s = float(kept[IMMEDIATE] + paid["deferred_discount"] * kept[DEFERRED]) / elapsed_s
        late, given_up = (
            float(paid["prompt_price"] * since(f"{name}_prompt")[IMMEDIATE])
            + float(paid["output_price"] * since(f"{name}_output")[IMMEDIATE])
            for name in ("late", "given_up")
        )
        value_per_s = revenue_per_s + (late - float(paid["given_up"]) * given_up) / elapsed_s
        worth_per_s = value_per_s if paid["lateness"] > 0 else revenue_per_s
        return {
            "value_per_s": value_per_s,
            "revenue_per_s": revenue_per_s,
            "worth_share": worth_per_s / float(paid["scale"]),
            "immediate_attainment": float(immediate_kept / decided) if decided else 1.0,
            "deferred_tokens_per_s": float(done) / elapsed_s,
            "preemptions_per_s": float(since("preemptions").sum()) / elapsed_s,
        }

    def close(self) -> None:
        """Ends the threads."""
        if self._pool is not None:
            self._pool.shutdown()


def _child_seed(*entropy: int) -> int:
    """A seed of its own for each list of numbers, so that the seeds of different fleets do not overlap."""
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


@compiled
def _member_state(states: State, m: int) -> State:
    return State(
        states.requests[m], states.running[m], states.work[m], states.work_totals[m], states.classes[m],
        states.tenants[m], states.lanes[m], states.scheduler[m], states.decision[m], states.batch[m],
        states.engine[m], states.contents[m], states.nodes[m], states.buckets[m], states.tier[m],
        states.tier_buckets[m], states.block_rows[m], states.spare_rows[m], states.block_before[m],
        states.spare_blocks[m], states.copies[m], states.promises[m], states.follower[m], states.sibling[m],
        states.followers[m], states.lengths[m], states.returns[m], states.ghosts[m], states.length_tenths[m],
        states.itl_histogram[m],
    )  # fmt: skip


@compiled
def _start_member(states, traces, members, m, seed, patience):
    surrogate.start(borrow(_member_state(states, m)), traces[m, : members[m].rows], seed, patience)


@compiled
def _observe_member(states, views, seen, observers, observations, m):
    _observe(borrow(_member_state(states, m)), views, seen, observers, observations, m)


@compiled
def _observe(state, views, seen, observers, observations, m):
    look(state, borrow(one_view(views, m)))
    observe(borrow(one_view(seen, m)), borrow(one_observer(observers, m)), observations[m])


@nb.njit(cache=True, nogil=True)
def _step_members(
    states, traces, members, views, seen, observers, reward, action, kind, interval_s, observations, rewards, first, end
):
    for m in range(first, end):
        state = borrow(_member_state(states, m))
        until_s = begin_interval(state, members, views, action, kind, interval_s, m)
        began_s = state.scheduler[0].now_s
        surrogate.advance(state, traces[m, : members[m].rows], until_s, 0)
        rewards[m] = pay(state, members, views, reward, began_s, interval_s, m)
        _observe(state, views, seen, observers, observations, m)


@compiled
def begin_interval(state, members, views, action, kind, interval_s, m):
    """Puts member m's action in force; returns the second to which its engine is to run."""
    member, decision, tpot_s = members[m], state.decision[0], views.promise[m, 0].tpot_s
    if kind == _SCORES:
        actions.set_scores(decision, action[m], views.visible[m], tpot_s)
    else:
        actions.set_dials(decision, action[m], tpot_s, member.immediate_order, member.deferred_order)
    member.steps += 1
    return min(member.steps * interval_s, member.duration_s)


@compiled
def pay(state, members, views, reward, began_s, interval_s, m):
    """The reward of member m, whose engine has run since `began_s`."""
    return _reward(state, members[m], views.promise[m, 0], reward[m], began_s, interval_s)


@compiled
def _reward(state, member, promise, reward, began_s, interval_s):
    immediate = state.classes[IMMEDIATE]
    deferred_value = reward.deferred_discount * _deferred_worth(state, reward)
    lost_value = reward.loss * (
        reward.prompt_price * immediate.lost_prompt + reward.output_price * immediate.lost_output
    ) + reward.lateness * (
        reward.prompt_price * (immediate.forgone_prompt + reward.given_up * immediate.given_up_prompt)
        + reward.output_price * (immediate.forgone_output + reward.given_up * immediate.given_up_output)
    )
    gained, lost = deferred_value - member.deferred_value, lost_value - member.lost_value
    member.deferred_value = deferred_value
    member.lost_value = lost_value
    in_system = immediate.waiting + immediate.running
    waited = in_system * (state.scheduler[0].now_s - began_s) / promise.ttft_s
    return (reward.deferred * gained - lost) / (reward.scale * interval_s) - reward.waiting * waited


@compiled
def _deferred_worth(state, reward):
    """Deferred work so far at full price: requests finished in time, and those in the batch by their output."""
    deferred = state.classes[DEFERRED]
    worth = reward.prompt_price * deferred.kept_prompt + reward.output_price * deferred.kept_output
    for i in range(state.scheduler[0].running):
        request = state.requests[state.running[i]]
        if request.request_class == DEFERRED and request.missed == 0:
            per_output_token = reward.prompt_price * request.prompt_tokens / request.output_tokens + reward.output_price
            worth += per_output_token * request.generated
    return worth
