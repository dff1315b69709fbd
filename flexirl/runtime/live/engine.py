"""The live engine: the scheduler that the surrogate runs, with an executor between `plan` and `commit`.

Requests come at any time and from any thread; they and everything else that changes the engine's state wait at the door
(`intake.py`) until the engine looks, between two iterations. What is done for every token is compiled. Clients are
told of it in threads beside the engine's (`delivery.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from flexirl.policies.interface.policy import Policy
from flexirl.runtime.live.arrays import new_arrays
from flexirl.runtime.live.clock import WallClock
from flexirl.runtime.live.deciding import Deciding
from flexirl.runtime.live.delivery import Delivery
from flexirl.runtime.live.executor import Executor
from flexirl.runtime.live.guarded import Guard, words
from flexirl.runtime.live.intake import Intake
from flexirl.runtime.live.options import DEFAULTS, Options
from flexirl.runtime.live.places import Places
from flexirl.runtime.live.requests import Request
from flexirl.runtime.live.stepping import Stepping
from flexirl.runtime.live.swaps import note_swaps
from flexirl.runtime.scheduler.commit import settle
from flexirl.runtime.scheduler.plan import apply
from flexirl.workloads.slo import SLO

_LOG = logging.getLogger(__name__)
_NEVER_S = float("inf")
_NO_LIMIT = 1 << 62


class LiveEngine:
    """Runs requests on an executor under a policy.

    slo: the promise to immediate requests; options: all else. state: the scheduler's, to be read between iterations.

    `add_request`, `cancel`, `swap_policy` and `stop` may be called from any thread, everything else from one. When a
    call of that one returns, clients have been told all there was to tell, unless one of them never returns. If the
    engine dies of an exception, every open request ends with an error, and no other is taken in.
    """

    def __init__(self, executor: Executor, policy: Policy, slo: SLO, options: Options = DEFAULTS) -> None:
        arrays = new_arrays(executor, options, slo.patience)
        self.state, self._swaps = arrays.state, arrays.swaps
        self._intake = Intake(executor, options)
        self._guard = Guard()
        self._delivery = Delivery(self._guard)
        self._places = Places(arrays, executor, slo, self._intake, self._delivery, self._guard, options)
        self._deciding = Deciding(policy, self.state, slo, options)
        self.clock = options.clock or WallClock()
        self._stepping = Stepping(arrays, executor, self._places, self._intake, self.clock, self._guard, options)
        self._intervals = 0  # that have begun
        self._decide_now = False
        self._stopping = False

    # ------------------------------------------------------------------------------------------ from any thread

    def add_request(self, request: Request) -> None:
        """Takes a request in; raises UserError if it can never run, EngineFull or EngineClosed if it cannot now."""
        self._intake.add(request)

    def cancel(self, request_id: str) -> None:
        """Ends a request, whatever it is doing, and frees all it holds; nothing happens if it has ended already.

        Raises UserError for what is no id.
        """
        self._intake.cancel(request_id)

    def swap_policy(self, policy: Policy) -> None:
        """Hands over to another policy before the next iteration; requests notice nothing.

        Raises UserError for what is no policy.
        """
        self._intake.swap(policy)

    def stop(self) -> None:
        """Ends the engine: it takes no further request in, `run` and `drain` return after the iteration under way.

        Requests that are open then are cancelled, and reported by `run` or `drain`: by the next call if none runs now.
        """
        self._intake.close("The engine has been stopped; start another one.")
        self._stopping = True
        self._intake.wake.set()

    # --------------------------------------------------------------------------------------------- running

    @property
    def policy(self) -> Policy:
        """The one in charge."""
        return self._deciding.policy

    @property
    def now_s(self) -> float:
        """Seconds on the scheduler's clock."""
        return float(self.state.scheduler["now_s"][0])

    @property
    def iterations(self) -> int:
        """Iterations since the start."""
        return int(self.state.scheduler["iterations"][0])

    @property
    def unfinished(self) -> int:
        """Requests taken in that have not ended."""
        return self._intake.unfinished

    def run(self, until_s: float = _NEVER_S) -> None:
        """Decides and runs until the clock reaches `until_s` or `stop` is called."""
        with self._at_work():
            while not self._stopping and self.now_s < until_s:
                self._decide_and_advance(until_s)

    def drain(self, patience_s: float = 30.0) -> int:
        """Decides and runs until every request has ended, or none could run for `patience_s` under this policy.

        Returns how many have not ended: 0, or it is logged.
        """
        with self._at_work():
            iterations, since_s = 0, self.clock.now_s()
            while self._any_left() and not self._stopping:
                now_s = self.clock.now_s()
                if self._intake.waiting or self.iterations > iterations:
                    iterations, since_s = self.iterations, now_s
                elif now_s > since_s + patience_s:
                    _LOG.warning("%d requests do not run under policy %s", self.unfinished, self.policy.name)
                    break
                self._decide_and_advance(now_s + patience_s, drain=True)
        return self.unfinished

    def _any_left(self) -> bool:
        """False if every request has ended, and nobody who was told so has sent another one."""
        if self.unfinished == 0:
            self._delivery.wait()
        return self.unfinished > 0

    def _decide_and_advance(self, until_s: float, drain: bool = False) -> None:
        self.decide()
        if self.policy.every_iteration:
            self._advance(until_s, 1, drain)
        else:
            # At multiples of the interval; an iteration that lasts longer leaves some out.
            interval_s = self._deciding.interval_s
            self._intervals = max(self._intervals, int(self.now_s / interval_s)) + 1
            self._advance(min(self._intervals * interval_s, until_s), 0, drain)

    def decide(self) -> None:
        """Asks the policy and puts its decision in force from the next `advance` on."""
        self._decide_now = False
        self._deciding.decide()

    def advance(self, until_s: float, max_iterations: int = 0) -> None:
        """Runs under the current decision until the clock reaches `until_s` or after `max_iterations` iterations.

        As `surrogate.advance`: the last iteration may end past `until_s`; max_iterations=0: no limit. Ends earlier for
        a new policy, for `stop`, and, by a clock that skips idle time, if nothing can ever happen again.
        """
        with self._at_work():
            self._advance(until_s, max_iterations)

    def _advance(self, until_s: float, max_iterations: int, drain: bool = False) -> None:
        """drain: ends, too, when no request is left."""
        scheduler = self.state.scheduler[0]
        last = scheduler["iterations"] + (max_iterations or _NO_LIMIT)
        self.clock.resume()
        apply(self.state)
        if self.state.decision["preempt_count"][0] > 0:
            note_swaps(self.state, self._swaps)
        self._take_in()
        while scheduler["now_s"] < until_s and scheduler["iterations"] < last:
            if self._decide_now or self._stopping or (drain and self.unfinished == 0):
                break
            if not self._stepping.iterate() and not self._idle(until_s):
                break
            self._take_in()
        self.clock.pause()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Around all that moves the engine on: nobody is left without a word, however it ends."""
        try:
            yield
            if self._stopping:
                self._end_all()
        except BaseException as error:
            why = f"The engine has ended ({words(error)}); start another one."
            self._stopping = True
            self._intake.close(why)
            self._places.tell_all(why)
            raise
        finally:
            self._delivery.wait()

    def cancel_all(self) -> None:
        """Ends every request between two iterations; the executor can then serve another engine."""
        with self._at_work():
            self._end_all()

    def metrics(self) -> dict[str, float]:
        """Counts since the start, and how long decisions took (seconds; 0 before the first)."""
        scheduler, classes = self.state.scheduler[0], self.state.classes
        return {
            "iterations": int(scheduler["iterations"]),
            "abandoned_iterations": self._stepping.abandoned,
            "tokens": self._stepping.tokens,
            "finished": int(classes["finished"].sum()),
            "ended_otherwise": int(classes["ended_otherwise"].sum()),
            "waiting": int(classes["waiting"].sum()),
            "running": int(classes["running"].sum()),
            "preemptions": int(classes["preemptions"].sum()),
            "recomputed_tokens": int(scheduler["recomputed_tokens"]),
            "swapped_tokens": int(scheduler["swapped_tokens"]),
            "device_failures": self._stepping.device_failures,
            "callback_failures": sum(self._guard.failures.values()),
            **self._deciding.metrics(),
        }

    # --------------------------------------------------------------------------------- between two iterations

    def _take_in(self) -> None:
        """Does what has come since: arrivals, cancellations, another policy."""
        self._delivery.tend()
        if not self._intake.waiting:
            return
        now_s = self.clock.now_s()
        for item in self._intake.take(now_s):
            if isinstance(item, str):
                self._places.cancel(item)
            elif self._deciding.swap(item):
                self._decide_now = True
        if self._intake.next_s <= now_s:
            self._let_pass(now_s)
        for arrival in self._intake.arrivals(now_s):
            self._places.enter(arrival)

    def _end_all(self) -> None:
        self._take_in()
        for request in self._intake.open:
            self._places.cancel(request.id)

    def _idle(self, until_s: float) -> bool:
        """Nothing may run: waits for whoever comes next, at most to `until_s`; False if nobody ever will."""
        due_s = min(self._intake.next_s, until_s)
        if self.policy.every_iteration and self.state.classes["waiting"].any():
            # Somebody waits because of what the policy said: after an interval it is asked again.
            due_s = min(due_s, self.clock.now_s() + self._deciding.interval_s)
            self._decide_now = True
        if not self.clock.wait(due_s, self._intake.wake):
            return False
        self._let_pass(self.clock.now_s())
        return True

    def _let_pass(self, now_s: float) -> None:
        """Moves the scheduler's clock on without an iteration, and books what fell due meanwhile."""
        if now_s > self.now_s:
            self.state.scheduler["now_s"] = now_s
            settle(self.state)
            self._places.collect()
