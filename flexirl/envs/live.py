"""A fleet of one engine that is live: the episodes, actions, observations and rewards of the surrogate, real execution.

Only what stands between an action and its reward differs: the engine is `runtime.live.LiveEngine`, on whose state the
same compiled code decides, pays and observes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from flexirl.envs.fleet import Fleet, Task, begin_interval, pay
from flexirl.policies.interface.decision import default_decision
from flexirl.policies.interface.view import View
from flexirl.runtime.live.clock import Clock, VirtualClock, WallClock
from flexirl.runtime.live.engine import LiveEngine
from flexirl.runtime.live.executor import Executor
from flexirl.runtime.live.options import Options
from flexirl.runtime.live.run import add_trace
from flexirl.runtime.scheduler.state import State
from flexirl.workloads.trace import Trace

CLOCKS: dict[str, Callable[[], Clock]] = {"virtual": VirtualClock, "wall": WallClock}


class LiveFleet(Fleet):
    """One live engine on `executor`, which no other engine may use meanwhile; the task's engine is the executor's.

    make_clock: makes the clock of an episode. By a virtual clock, time at work counts as measured, idle time is
    skipped, and none passes while the agent thinks; by the wall's, whole intervals that the agent thinks are steps too.
    Arrivals follow from the seed, measured times do not. Episodes end as of `Fleet`: what runs then is cancelled when
    the next one starts. Raises UserError for a trace with requests that the executor cannot hold.
    """

    def __init__(
        self, task: Task, executor: Executor, make_clock: Callable[[], Clock] = VirtualClock, traces: int = 64
    ) -> None:
        self._executor = executor
        self._make_clock = make_clock
        self._engine: LiveEngine | None = None
        super().__init__(replace(task, engine=executor.profile), 1, traces=traces)

    def _grow(self, max_requests: int, num_tenants: int, contents: int) -> None:
        # There is no other member, in the middle of an episode, whose engine would have to be kept.
        self._allocate(max_requests, num_tenants, contents)

    def _start_engine(self, m: int, task: Task, trace: Trace, seed: int) -> None:
        self.close()
        options = Options(
            clock=self._make_clock(), max_requests=self._traces.shape[1], num_tenants=self._states.tenants.shape[1],
            safepoints=False, seed=seed,
        )  # fmt: skip
        self._engine = engine = LiveEngine(self._executor, _Agent(), self.task.slo, options)
        self._states = State(*(array[None] for array in engine.state))
        promise = self._views.promise
        self._watch(self._views.visible.shape[1])
        self._views.promise[:] = promise
        add_trace(engine, self._executor, trace, self.task.duration_s(), seed)
        engine.advance(0.0)  # takes in what is there from the beginning
        self._observe(m)

    def _run(self, action: np.ndarray) -> None:
        engine, interval_s = self._engine, self.task.interval_s
        assert engine is not None, "reset comes before step"
        began_s = engine.now_s
        self._member["steps"] += int((engine.clock.now_s() - began_s) / interval_s)
        until_s = begin_interval(engine.state, self._member, self._views, action, self._kind, interval_s, 0)
        engine.advance(until_s)
        self.rewards[0] = pay(engine.state, self._member, self._views, self._reward, began_s, interval_s, 0)
        self._observe(0)

    def close(self) -> None:
        """Ends what still runs, so that the executor can be used again."""
        if self._engine is not None:
            self._engine.cancel_all()
            self._engine = None


class _Agent:
    """Where a live engine has its policy; it is never asked, since each action is put in force as it comes."""

    name = "agent"
    every_iteration = False

    def reset(self, view: View) -> None:
        """Nothing to forget."""

    def decide(self, view: View) -> np.ndarray:
        """See `Policy`."""
        return default_decision()
