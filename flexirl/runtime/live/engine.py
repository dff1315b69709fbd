"""The live engine: the scheduler that the surrogate runs, with an executor between `plan` and `commit`.

Requests come at any time and from any thread; they and everything else that changes the engine's state wait in an inbox
until the engine looks into it between two iterations. What is done for every token is compiled.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from flexirl.errors import UserError
from flexirl.policies.interface.decision import RECOMPUTE
from flexirl.policies.interface.policy import Policy
from flexirl.runtime.live.block_table import new_block_table
from flexirl.runtime.live.clock import Clock, WallClock
from flexirl.runtime.live.executor import Batch, Executor, Interrupted, Moves, OutOfMemory
from flexirl.runtime.live.guarded import Guard
from flexirl.runtime.live.iteration import Counts, LiveState, finish, new_flat_batch, new_request_arrays, prepare
from flexirl.runtime.live.request_table import enter, leave
from flexirl.runtime.live.requests import ERROR, LENGTH, STOP, Completion, Output, Request, Update
from flexirl.runtime.live.sampling import SAMPLING
from flexirl.runtime.live.shadow import Shadow
from flexirl.runtime.scheduler.accounts import histogram_percentile
from flexirl.runtime.scheduler.books import itl_bin
from flexirl.runtime.scheduler.commit import abandon, settle
from flexirl.runtime.scheduler.intake import cancel
from flexirl.runtime.scheduler.kv_cache import blocks_for
from flexirl.runtime.scheduler.looking import Lookout
from flexirl.runtime.scheduler.plan import apply
from flexirl.runtime.scheduler.state import (
    CANCELLED,
    EXPIRED,
    FUTURE,
    ITL_BINS,
    REJECTED,
    STATUS_NAMES,
    State,
    new_states,
)
from flexirl.runtime.simulator import surrogate
from flexirl.workloads.slo import SLO
from flexirl.workloads.trace import TRACE_ROW, empty_rows

_LOG = logging.getLogger(__name__)
_NEVER_S = float("inf")
_NO_LIMIT = 1 << 62
_PATIENCE = 256  # iterations that have to fit before larger ones are tried again


class Step(NamedTuple):
    """One iteration, for whoever records them."""

    state: State  # of the engine, live
    began_s: float  # on the engine's clock
    elapsed_s: float
    abandoned: bool
    requests: list[str]  # their ids
    tokens: list[int]  # of each
    features: np.ndarray  # 0-d `BATCH`: what the step-time model predicts from
    decision: np.ndarray  # 0-d `DECISION` in force
    prepare_s: float  # planning, block table and flattened batch
    execute_s: float  # in the executor
    forward_s: float  # of that, in the model
    finish_s: float  # booking what came of it


class LiveEngine:
    """Runs requests on an executor under a policy.

    slo: the promise to immediate requests; tokenizer: of the model, for texts and stop strings; clock: see
    `flexirl.runtime.live.clock`; interval_s: seconds between decisions, for a policy that is not asked every iteration;
    max_requests: waiting and running at once; save_blocks: blocks of deferred requests copied to host memory ahead of
    a preemption, per iteration; safepoints: an iteration of deferred work alone is broken off when an immediate request
    arrives; seed: of requests that sample without one; shadow: see `flexirl.runtime.live.shadow`; on_end: called with
    every completion; on_step: with every iteration.

    `add_request`, `cancel`, `swap_policy` and `stop` may be called from any thread, everything else from one.
    """

    def __init__(
        self,
        executor: Executor,
        policy: Policy,
        slo: SLO,
        tokenizer: Any = None,
        clock: Clock | None = None,
        interval_s: float = 0.2,
        max_requests: int = 4096,
        num_tenants: int = 1,
        save_blocks: int = 0,
        safepoints: bool = True,
        seed: int = 0,
        shadow: Shadow | None = None,
        on_end: Callable[[Completion], None] | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> None:
        profile = executor.profile
        self.policy = policy
        self.state: State = State(*(array[0] for array in new_states(1, profile, max_requests, num_tenants)))
        self.slo = slo
        self._lookout = Lookout(self.state, slo)
        self._executor = executor
        self._tokenizer = tokenizer
        self._interval_s = interval_s
        self._save_blocks = save_blocks
        self._safepoints = safepoints
        self._seed = seed
        self._shadow = shadow
        self._on_end = on_end
        self._guard = Guard()
        self._on_step = on_step

        self._block_size = int(profile.values["block_size"])
        longest = blocks_for(int(profile.values["max_model_len"]), self._block_size)
        self._table = new_block_table(max_requests, int(profile.values["kv_blocks"]), longest)
        self._flat = new_flat_batch(profile, longest)
        self._batch_seen: tuple[tuple[int, ...], Any] = ((), None)
        self._arrays = new_request_arrays(max_requests, int(profile.values["max_model_len"]))
        self._live = LiveState(self.state, self._table, self._arrays, self._flat)
        self._sampling = np.zeros(max_requests, SAMPLING)
        self._is_end = np.zeros(executor.vocab_size, np.bool_)
        self._is_end[list(executor.end_tokens)] = True

        self._outputs: list[Output | None] = [None] * max_requests  # by place in the table
        self._place_of: dict[str, int] = {}
        # The place that has been free for longest comes first, so that the accounts see what ended as long as they can.
        self._places = deque(range(max_requests))
        self._watched = self._particular = 0  # outputs to watch, and those that do not just take the likeliest token
        self._expected: list[tuple[float, int, Request]] = []  # a heap of requests that arrive later
        self._ended_otherwise = 0
        self._shrunk, self._shrunk_at = False, 0  # iterations are kept small for want of memory, since that iteration
        self._intervals = 0  # that have begun

        self._lock = threading.Lock()
        self._known: set[str] = set()  # requests taken in and not ended
        self._added = 0
        self._inbox: deque[Request | str | Policy] = deque()
        self._wake = threading.Event()
        self._urgent = False  # an immediate request is in the inbox
        self._urgent_at_s = _NEVER_S  # when the next one is expected
        self._decide_now = False
        self._stopping = False

        self._abandoned = self._policy_swaps = self._device_failures = self._tokens = 0
        self._decision_histogram = np.zeros(ITL_BINS, np.int64)
        self._start(seed)
        self.clock = clock or WallClock()

    def _start(self, seed: int) -> None:
        """Sets the state to its beginning, once all is compiled that the first iterations would have to wait for."""
        no_tokens, no_promises = np.zeros(0, np.int64), np.zeros(0, np.int32)
        surrogate.start(self.state, empty_rows(0), no_promises, seed)
        enter(self.state, 0, empty_rows(1))
        cancel(self.state, 0)
        leave(self.state, 0)
        apply(self.state)
        prepare(self._live, 0)
        finish(self._live, no_tokens, self._is_end, 0.0)
        abandon(self.state, 0.0)
        self.state.requests["status"] = FUTURE
        surrogate.start(self.state, empty_rows(0), no_promises, seed)
        # No bound on a real iteration is certain, so a promise is broken when its time has passed and not before.
        self.state.scheduler["fastest_step_s"] = 0.0
        self.policy.reset(self._lookout.look())
        if self._shadow is not None:
            self._shadow.reset(self._lookout.view)

    # ------------------------------------------------------------------------------------------ from any thread

    def add_request(self, request: Request) -> None:
        """Takes a request in; raises UserError if it can never run or the engine is full."""
        longest = int(self._executor.profile.values["max_model_len"])
        tenants = len(self.state.tenants)
        request.check(longest, self._executor.vocab_size, tenants, self._tokenizer is not None)
        if request.images:
            self._executor.check_images(request)
        with self._lock:
            if request.id in self._known:
                raise UserError(f"Request {request.id} is there already; give each request an id of its own.")
            if len(self._known) >= len(self.state.requests):
                raise UserError(f"The engine holds {len(self._known)} requests, as many as it can; try again later.")
            self._known.add(request.id)
        self._inbox.append(request)
        if request.immediate and request.arrival_s is None:
            self._urgent = True
        self._wake.set()

    def cancel(self, request_id: str) -> None:
        """Ends a request, whatever it is doing, and frees all it holds; nothing happens if it has ended already.

        Raises UserError for what is no id.
        """
        if not isinstance(request_id, str):
            raise UserError(f"{request_id!r} is no request's id; give the text that the request has as its id.")
        self._inbox.append(request_id)
        self._wake.set()

    def swap_policy(self, policy: Policy) -> None:
        """Hands over to another policy before the next iteration; requests notice nothing."""
        self._inbox.append(policy)
        self._wake.set()

    def stop(self) -> None:
        """Makes `run` and `drain` return after the iteration under way."""
        self._stopping = True
        self._wake.set()

    # --------------------------------------------------------------------------------------------- running

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
        return len(self._known)

    def run(self, until_s: float = _NEVER_S) -> None:
        """Decides and runs until the clock reaches `until_s` or `stop` is called."""
        while not self._stopping and self.now_s < until_s:
            self._decide_and_advance(until_s)

    def drain(self, patience_s: float = 30.0) -> None:
        """Decides and runs until every request has ended, or none could run for `patience_s` under this policy."""
        iterations, since_s = 0, self.clock.now_s()
        while self.unfinished and not self._stopping:
            now_s = self.clock.now_s()
            if self._expected or self._inbox or self.iterations > iterations:
                iterations, since_s = self.iterations, now_s
            elif now_s > since_s + patience_s:
                return
            self._decide_and_advance(now_s + patience_s)

    def _decide_and_advance(self, until_s: float) -> None:
        self.decide()
        if self.policy.every_iteration:
            self.advance(until_s, 1)
        else:
            # At multiples of the interval; an iteration that lasts longer leaves some out.
            self._intervals = max(self._intervals, int(self.now_s / self._interval_s)) + 1
            self.advance(min(self._intervals * self._interval_s, until_s))

    def decide(self) -> None:
        """Asks the policy and puts its decision in force from the next `advance` on."""
        self._decide_now = False
        view = self._lookout.look()
        began_s = time.perf_counter()
        self.state.decision[0] = self._guard.ask(self.policy, view)
        self._decision_histogram[itl_bin(time.perf_counter() - began_s)] += 1
        if self._shadow is not None:
            self._shadow.compare(view, self.state.decision[0])

    def advance(self, until_s: float, max_iterations: int = 0) -> None:
        """Runs under the current decision until the clock reaches `until_s` or after `max_iterations` iterations.

        As `surrogate.advance`: the last iteration may end past `until_s`; max_iterations=0: no limit. Ends earlier for
        a new policy, for `stop`, and, by a clock that skips idle time, if nothing can ever happen again.
        """
        scheduler = self.state.scheduler[0]
        last = scheduler["iterations"] + (max_iterations or _NO_LIMIT)
        self.clock.resume()
        apply(self.state)
        self._take_in()
        while scheduler["now_s"] < until_s and scheduler["iterations"] < last:
            if self._decide_now or self._stopping:
                break
            if not self._iterate() and not self._idle(until_s):
                break
            self._take_in()
        self.clock.pause()

    def cancel_all(self) -> None:
        """Ends every request between two iterations; the executor can then serve another engine."""
        for request_id in list(self._known):
            self.cancel(request_id)
        self.advance(self.now_s)

    def metrics(self) -> dict[str, float]:
        """Counts since the start, and how long decisions took (seconds; 0 before the first)."""
        scheduler, classes = self.state.scheduler[0], self.state.classes
        return {
            "iterations": int(scheduler["iterations"]),
            "abandoned_iterations": self._abandoned,
            "tokens": self._tokens,
            "finished": int(classes["finished"].sum()),
            "ended_otherwise": int(classes["ended_otherwise"].sum()),
            "waiting": int(classes["waiting"].sum()),
            "running": int(classes["running"].sum()),
            "preemptions": int(classes["preemptions"].sum()),
            "recomputed_tokens": int(scheduler["recomputed_tokens"]),
            "swapped_tokens": int(scheduler["swapped_tokens"]),
            "device_failures": self._device_failures,
            "policy_swaps": self._policy_swaps,
            "fallback_decisions": self._guard.failures.get("policy", 0)
            + sum(getattr(self.policy, "failures", {}).values()),
            "callback_failures": sum(count for what, count in self._guard.failures.items() if what != "policy"),
            "shadow_differences": 0 if self._shadow is None else self._shadow.differences,
            "decisions": int(self._decision_histogram.sum()),
            "decision_median_s": histogram_percentile(self._decision_histogram, 50) or 0.0,
            "decision_p99_s": histogram_percentile(self._decision_histogram, 99) or 0.0,
        }

    # --------------------------------------------------------------------------------- between two iterations

    def _take_in(self) -> None:
        """Does what has come since: arrivals, cancellations, another policy."""
        self._urgent = False
        if not self._inbox and not self._expected:
            return
        self._wake.clear()
        now_s = self.clock.now_s()
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, Request):
                self._added += 1
                arrival_s = now_s if item.arrival_s is None else item.arrival_s
                heapq.heappush(self._expected, (arrival_s, self._added, item))
            elif isinstance(item, str):
                self._cancel(item)
            else:
                self._swap(item)
        if self._expected and self._expected[0][0] <= now_s:
            self._let_pass(now_s)
            while self._expected and self._expected[0][0] <= now_s:
                arrival_s, _, request = heapq.heappop(self._expected)
                self._enter(request, arrival_s)
        arrivals = (arrival_s for arrival_s, _, request in self._expected if request.immediate)
        self._urgent_at_s = min(arrivals, default=_NEVER_S) if self._safepoints else _NEVER_S

    def _enter(self, request: Request, arrival_s: float) -> None:
        """Gives a request a place in the table and submits it."""
        r = self._places.popleft()
        output = Output(request, self._tokenizer, self._guard)
        self._outputs[r] = output
        self._place_of[request.id] = r
        sampling, arrays = request.sampling, self._arrays
        # Python's own hash of a text differs from run to run.
        seed = sampling.seed if sampling.seed is not None else self._seed << 32 | zlib.crc32(request.id.encode())
        arrays.tokens[r, : len(request.prompt)] = request.prompt
        arrays.seed[r] = seed & 0xFFFFFFFFFFFFFFFF
        arrays.ends_early[r] = not sampling.ignore_eos
        arrays.watched[r] = output.watched
        logprobs = -1 if sampling.logprobs is None else sampling.logprobs
        self._sampling[r] = (sampling.temperature, sampling.top_p, sampling.top_k, logprobs)
        self._watched += output.watched
        self._particular += not sampling.plain
        row = _row(request, arrival_s, self.slo)
        if request.images:
            row["num_images"], row["image_tokens"] = len(request.images), self._executor.check_images(request)
            self._executor.take_images(r, request)
        enter(self.state, r, row)
        self._collect_ended()

    def _cancel(self, request_id: str) -> None:
        if request_id in self._place_of:
            cancel(self.state, self._place_of[request_id])
            self._collect_ended()
            return
        for i, (_, _, request) in enumerate(self._expected):
            if request.id == request_id:
                del self._expected[i]
                heapq.heapify(self._expected)
                completion = Completion(request_id, [], STATUS_NAMES[CANCELLED])
                self._guard.call("listener", request.listener, Update(request_id, None, "", completion))
                self._report(completion)
                return

    def _swap(self, policy: Policy) -> None:
        try:
            policy.reset(self._lookout.look())
        except Exception as error:  # requests must not suffer for it
            _LOG.warning("%s cannot take over (%s); %s goes on", policy.name, error, self.policy.name)
            return
        self.policy = policy
        self._policy_swaps += 1
        self._decide_now = True

    def _idle(self, until_s: float) -> bool:
        """Nothing may run: waits for whoever comes next, at most to `until_s`; False if nobody ever will."""
        due_s = min(self._expected[0][0] if self._expected else _NEVER_S, until_s)
        if self.policy.every_iteration and self.state.classes["waiting"].any():
            # Somebody waits because of what the policy said: after an interval it is asked again.
            due_s = min(due_s, self.clock.now_s() + self._interval_s)
            self._decide_now = True
        if not self.clock.wait(due_s, self._wake):
            return False
        self._let_pass(self.clock.now_s())
        return True

    def _let_pass(self, now_s: float) -> None:
        """Moves the scheduler's clock on without an iteration, and books what fell due meanwhile."""
        if now_s > self.now_s:
            self.state.scheduler["now_s"] = now_s
            settle(self.state)
            self._collect_ended()

    # --------------------------------------------------------------------------------------------- an iteration

    def _iterate(self) -> bool:
        """Plans and computes one iteration; False if nothing may run now."""
        state, flat = self.state, self._flat
        began, began_s = self.clock.now_s(), self.now_s
        save_blocks = 0
        if self._save_blocks > 0 and state.decision["preemption"][0] != RECOMPUTE:
            save_blocks = min(self._save_blocks, self._executor.free_host_blocks)
        counts = Counts(*prepare(self._live, save_blocks))
        if counts.swapped_out or counts.swapped_in or counts.saved:
            try:
                self._move(counts)
            except Exception as error:  # whatever a device does, the engine goes on
                # What lies where is not known any more, so nothing that was computed can be relied on.
                self._abandon(began_s)
                self._fail(np.flatnonzero(state.requests["computed"] > 0).tolist(), error)
                return True
        self._collect_ended(counts.ended_otherwise)
        if counts.tokens == 0:
            return False
        sampled = flat.sampled[: counts.sampled]
        sampling = self._sampling[sampled] if self._particular else None
        may_stop = self._safepoints and not counts.urgent
        ids = [] if self._on_step is None else self._ids(counts)
        prepared = self.clock.now_s()
        try:
            outcome = self._executor.execute(self._batch(counts), sampling, self._interrupted if may_stop else None)
        except Interrupted:
            self._abandoned += 1
            self._abandon(began_s)
            if self._on_step is not None:
                step = self._step(counts, ids, began_s, began, prepared, self.clock.now_s(), None)
                self._guard.call("on_step", self._on_step, step)
            return True
        except OutOfMemory:
            self._abandon(began_s)
            self._shrink(counts)
            return True
        except Exception as error:
            # It may have written keys and values, but only those of the requests in it.
            self._abandon(began_s)
            self._fail(flat.requests[: counts.requests].tolist(), error)
            return True
        executed = self.clock.now_s()
        watched = np.flatnonzero(self._arrays.watched[sampled]).tolist() if self._watched else []
        for i in watched:
            token = int(outcome.tokens[i])
            ends = bool(self._is_end[token] and self._arrays.ends_early[sampled[i]])
            flat.stops[i] = self._output(sampled[i]).watch(token, ends, outcome.logprobs.get(i))
        self._tokens += counts.sampled
        if self._shrunk:
            self._grow_back()
        elapsed_s = max(self.clock.now_s() - began_s, 1e-9)
        ended, ended_otherwise = finish(self._live, outcome.tokens, self._is_end, elapsed_s)
        for i in watched:
            if not flat.ended[i]:
                self._output(sampled[i]).tell(int(outcome.tokens[i]))
        if ended:
            for i in np.flatnonzero(flat.ended[: counts.sampled]).tolist():
                self._complete(int(sampled[i]), STOP if flat.stops[i] else LENGTH)
        self._collect_ended(ended_otherwise)
        if self._on_step is not None:
            step = self._step(counts, ids, began_s, began, prepared, executed, outcome.forward_s)
            self._guard.call("on_step", self._on_step, step)
        return True

    def _batch(self, counts: Counts) -> Batch:
        """The flattened batch's valid parts, as the same object while their sizes stay."""
        sizes = counts.requests, counts.tokens, counts.widest, counts.sampled
        if sizes != self._batch_seen[0]:
            flat, (requests, tokens, widest, sampled) = self._flat, sizes
            batch = Batch(
                tokens=flat.tokens[:tokens],
                positions=flat.positions[:tokens],
                slots=flat.slots[:tokens],
                query_lens=flat.query_lens[:requests],
                context_lens=flat.context_lens[:requests],
                block_table=flat.blocks[: requests * widest].reshape(requests, widest),
                sampled_rows=flat.sampled_rows[:sampled],
                draws=flat.draws[:sampled],
                requests=flat.requests[:requests],
            )
            self._batch_seen = sizes, batch
        return self._batch_seen[1]

    def _output(self, r: int) -> Output:
        output = self._outputs[r]
        assert output is not None
        return output

    def _move(self, counts: Counts) -> None:
        """Lets the executor move keys and values as the plan has it."""
        flat, table, requests = self._flat, self._table, self.state.requests
        block_size = self._block_size
        moves = Moves()
        for r in flat.swapped_out[: counts.swapped_out].tolist():
            moves.out[r] = table.blocks[r, : blocks_for(int(requests["computed"][r]), block_size)].tolist()
        for r in flat.swapped_in[: counts.swapped_in].tolist():
            computed = int(requests["computed"][r])
            moves.back[r] = table.blocks[r, : blocks_for(computed, block_size)].tolist()
            moves.kept[r] = computed // block_size if self._save_blocks > 0 else 0
        for r, count in flat.saved[: counts.saved].tolist():
            first = int(requests["saved"][r]) // block_size
            moves.save[r] = table.blocks[r, first : first + count].tolist()
        for r, blocks in self._executor.move(moves).items():
            requests["saved"][r] = blocks * block_size

    def _interrupted(self) -> bool:
        """True if an immediate request has come since the iteration began."""
        return bool(self._urgent and self._inbox) or self._urgent_at_s <= self.clock.now_s()

    def _abandon(self, began_s: float) -> None:
        abandon(self.state, max(self.clock.now_s() - began_s, 0.0))
        self._collect_ended()

    def _shrink(self, counts: Counts) -> None:
        """The iteration did not fit into memory: smaller ones for a while, and what cannot run in any ends."""
        if counts.tokens > 1:
            self._set_budget(counts.tokens // 2)
            _LOG.warning("out of memory: an iteration has at most %d tokens for now", counts.tokens // 2)
            return
        r = int(self._flat.requests[0])
        self._output(r).error = "The device is out of memory; send it again when the engine has less to do."
        cancel(self.state, r)
        self._collect_ended()

    def _fail(self, requests: list[int], error: Exception) -> None:
        """Ends the requests, for which the device failed."""
        self._device_failures += 1
        _LOG.error("the device failed; the requests it was computing end", exc_info=error)
        for r in requests:
            output = self._outputs[r]
            if output is not None:
                output.error = f"The device failed ({type(error).__name__}: {error}); send it again."
                cancel(self.state, r)
        self._collect_ended()

    def _grow_back(self) -> None:
        """Iterations fit again: lets them grow, since whatever took the memory may be gone."""
        budget = int(self.state.engine["max_tokens_per_step"][0])
        if self.iterations >= self._shrunk_at + _PATIENCE:
            self._set_budget(min(2 * budget, int(self._executor.profile.values["max_tokens_per_step"])))

    def _set_budget(self, tokens: int) -> None:
        self.state.engine["max_tokens_per_step"] = tokens
        self._shrunk = tokens < int(self._executor.profile.values["max_tokens_per_step"])
        self._shrunk_at = self.iterations

    def _ids(self, counts: Counts) -> list[str]:
        return [self._output(r).request.id for r in self._flat.requests[: counts.requests].tolist()]

    def _step(
        self,
        counts: Counts,
        ids: list[str],
        began_s: float,
        began: float,
        prepared: float,
        executed: float,
        forward_s: float | None,
    ) -> Step:
        """The iteration just booked, for `on_step`; forward_s: None if it was broken off."""
        return Step(
            state=self.state,
            began_s=began_s,
            elapsed_s=self.now_s - began_s,
            abandoned=forward_s is None,
            requests=ids,
            tokens=self._flat.query_lens[: counts.requests].tolist(),
            features=self.state.batch[0].copy(),
            decision=self.state.decision[0].copy(),
            prepare_s=prepared - began,
            execute_s=executed - prepared,
            forward_s=forward_s or 0.0,
            finish_s=self.clock.now_s() - executed,
        )

    # --------------------------------------------------------------------------------------------- endings

    def _collect_ended(self, ended_otherwise: int | None = None) -> None:
        """Completes the requests that ended without finishing, if there are new ones; their count, if known."""
        if ended_otherwise is None:
            ended_otherwise = int(self.state.classes["ended_otherwise"].sum())
        if ended_otherwise == self._ended_otherwise:
            return
        self._ended_otherwise = ended_otherwise
        ended = np.isin(self.state.requests["status"], (CANCELLED, EXPIRED, REJECTED))
        for r in np.flatnonzero(ended).tolist():
            output = self._outputs[r]
            if output is None:
                continue
            status = int(self.state.requests["status"][r])
            if status == REJECTED:
                output.error = "It needs more memory than the whole cache has; shorten it."
            self._complete(r, ERROR if output.error is not None else STATUS_NAMES[status])

    def _complete(self, r: int, finish_reason: str) -> None:
        """Reports a request that has ended and gives its place in the table free."""
        output = self._output(r)
        self._outputs[r] = None
        self._watched -= output.watched
        self._particular -= not output.request.sampling.plain
        self._table.swapped[r] = False
        leave(self.state, r)
        self._executor.forget(r)
        del self._place_of[output.request.id]
        self._places.append(r)
        record = self.state.requests[r]
        first, count = int(record["prompt_tokens"]), int(record["generated"])
        tokens = self._arrays.tokens[r, first : first + count].tolist()
        self._report(output.complete(finish_reason, tokens, record))

    def _report(self, completion: Completion) -> None:
        with self._lock:
            self._known.discard(completion.id)
        self._guard.call("on_end", self._on_end, completion)


def _row(request: Request, arrival_s: float, slo: SLO) -> np.ndarray:
    """The request as a `TRACE_ROW`, (1,); how long its output will be is not known, so it counts as its longest."""
    row = np.zeros(1, TRACE_ROW)
    row["arrival_s"] = arrival_s
    for name, asked_s, default_s in (
        ("ttft_slo_s", request.ttft_s, slo.ttft_s),
        ("tpot_slo_s", request.tpot_s, slo.tpot_s),
    ):
        row[name] = asked_s if asked_s is not None else default_s if request.immediate else _NEVER_S
    row["window_s"] = request.window_s
    row["request_class"] = request.request_class
    row["tenant"] = request.tenant
    row["prompt_tokens"] = len(request.prompt)
    row["output_tokens"] = row["max_tokens"] = request.max_tokens
    row["predicted_output_tokens"] = request.predicted_output_tokens
    return row
