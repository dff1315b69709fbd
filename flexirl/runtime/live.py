"""The live engine: the scheduler that the surrogate runs, with an executor between `plan` and `commit`.

Requests come at any time and from any thread; they and everything else that changes the engine's state wait in an inbox
until the engine looks into it between two iterations. Host work is compiled or costs a few list operations a token.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from flexirl.errors import UserError
from flexirl.runtime import surrogate
from flexirl.runtime.accounts import histogram_percentile
from flexirl.runtime.block_table import new_block_table
from flexirl.runtime.clock import Clock, WallClock
from flexirl.runtime.executor import Batch, Executor, Interrupted, OutOfMemory
from flexirl.runtime.host_cache import Moves
from flexirl.runtime.iteration import Counts, finish, new_flat_batch, new_requests, prepare
from flexirl.runtime.kv_cache import blocks_for
from flexirl.runtime.policy import Policy, View
from flexirl.runtime.request_table import enter, leave
from flexirl.runtime.sampling import SAMPLING, Logprobs, Sampling
from flexirl.runtime.scheduler import abandon, apply, cancel, itl_bin, settle
from flexirl.runtime.state import (
    CANCELLED,
    EXPIRED,
    FINISHED,
    ITL_BINS,
    RECOMPUTE,
    REJECTED,
    RUNNING,
    STATUS_NAMES,
    WAITING,
    State,
    new_states,
)
from flexirl.runtime.text import Detokenizer, StopStrings
from flexirl.workloads.scenario import SLO
from flexirl.workloads.trace import DEFERRED, IMMEDIATE, TRACE_ROW, empty_rows

_LOG = logging.getLogger(__name__)
_NEVER_S = float("inf")
_NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class Completion:
    """What became of a request.

    finish_reason: stop (an end token, a stop token or a stop string), length (max_tokens), cancelled, expired (its
    window closed), or error, which `error` explains in a sentence. token_ids include the token that ended the output;
    text leaves it out, or the stop string. ttft_s, e2e_s: seconds from arrival to the first token (None: there was none) and
    to the end. logprobs: one per token if asked for, else empty.
    """

    id: str
    prompt_tokens: int
    token_ids: list[int]
    finish_reason: str
    ttft_s: float | None
    e2e_s: float
    preemptions: int
    error: str | None = None
    logprobs: list[Logprobs] = field(default_factory=list)
    make_text: Callable[[], str] = str

    @cached_property
    def text(self) -> str:
        """The output as text, empty where there is no tokenizer; made when first read, not in the engine's time."""
        return self.make_text()


class Update(NamedTuple):
    """What a listener is told: the new token (None at an end without one), the text it settles, the end if it is one."""

    id: str
    token: int | None
    text: str
    completion: Completion | None


@dataclass(frozen=True)
class Request:
    """A request: token numbers in, at most `max_tokens` out.

    request_class: IMMEDIATE or DEFERRED; ttft_s, tpot_s: its promise, None takes the engine's SLO for immediate
    requests and none for deferred ones; window_s: seconds until a deferred request expires; predicted_output_tokens:
    what a predictor says, 0 for none; arrival_s: on the engine's clock, None is now; listener: called from the engine's
    thread with every token.
    """

    id: str
    prompt: Sequence[int]
    max_tokens: int
    request_class: int = IMMEDIATE
    sampling: Sampling = Sampling()
    tenant: int = 0
    ttft_s: float | None = None
    tpot_s: float | None = None
    window_s: float = _NEVER_S
    predicted_output_tokens: int = 0
    arrival_s: float | None = None
    listener: Callable[[Update], None] | None = None


class Step(NamedTuple):
    """One iteration, for whoever records them."""

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


@dataclass
class _Entry:
    """A request in the table."""

    request: Request
    prompt: np.ndarray  # int32
    output: array[int]
    detokenizer: Detokenizer | None = None
    stops: StopStrings | None = None
    text: list[str] = field(default_factory=list)  # its pieces so far, if there is a detokenizer
    told: int = 0  # pieces that the listener has
    logprobs: list[Logprobs] = field(default_factory=list)
    error: str | None = None


class LiveEngine:
    """Runs requests on an executor under a policy.

    slo: the promise to immediate requests; tokenizer: of the model, for texts and stop strings; clock: see
    `flexirl.runtime.clock`; interval_s: seconds between decisions, for a policy that is not asked every iteration;
    max_requests: waiting and running at once; save_blocks: blocks of deferred requests copied to host memory ahead of
    a preemption, per iteration; safepoints: an iteration of deferred work alone is broken off when an immediate request
    arrives; seed: of requests that sample without one; on_end: called with every completion; on_step: with every
    iteration.

    `add_request`, `cancel` and `swap_policy` may be called from any thread, everything else from one.
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
        on_end: Callable[[Completion], None] | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> None:
        profile = executor.profile
        self.policy = policy
        self.state: State = State(*(array[0] for array in new_states(1, profile, max_requests, num_tenants)))
        self.view = View(self.state, slo)
        self._executor = executor
        self._tokenizer = tokenizer
        self._interval_s = interval_s
        self._save_blocks = save_blocks
        self._safepoints = safepoints
        self._seed = seed
        self._on_end = on_end
        self._on_step = on_step

        self._block_size = int(profile.values["block_size"])
        longest = blocks_for(int(profile.values["max_model_len"]), self._block_size)
        self._table = new_block_table(max_requests, int(profile.values["kv_blocks"]), longest)
        self._flat = new_flat_batch(profile, longest)
        self._of_requests = new_requests(max_requests)
        self._sampling = np.zeros(max_requests, SAMPLING)
        self._is_end = np.zeros(executor.vocab_size, np.bool_)
        self._is_end[list(executor.end_tokens)] = True

        self._entries: dict[int, _Entry] = {}  # by place in the table
        self._watched = self._particular = 0  # entries that need a look at each token, or more than the likeliest one
        self._outputs: list[array[int]] = [array("i")] * max_requests
        # The place that has been free for longest comes first, so that the accounts see what ended as long as they can.
        self._places = deque(range(max_requests))
        self._place_of: dict[str, int] = {}
        self._expected: list[tuple[float, int, Request]] = []  # a heap of requests that arrive later
        self._ended_otherwise = 0
        self._decisions = 0  # intervals that have begun

        self._lock = threading.Lock()
        self._known: set[str] = set()  # requests taken in and not ended
        self._added = 0
        self._inbox: deque[Request | str | Policy] = deque()
        self._wake = threading.Event()
        self._urgent = False  # an immediate request waits in the inbox
        self._urgent_at_s = _NEVER_S  # the next immediate request is expected then
        self._decide_now = False
        self._stopping = False

        self.abandoned = 0
        self.policy_swaps = 0
        self.tokens = 0
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
        prepare(self.state, self._table, self._of_requests, self._flat, 0)
        finish(self.state, self._of_requests, self._flat, no_tokens, self._is_end, 0.0)
        abandon(self.state, 0.0)
        surrogate.start(self.state, empty_rows(0), no_promises, seed)
        # No bound on a real iteration is certain, so a promise is broken when its time has passed and not before.
        self.state.scheduler["fastest_step_s"] = 0.0
        self.policy.reset(self.view)

    # ------------------------------------------------------------------------------------------ from any thread

    def add_request(self, request: Request) -> None:
        """Takes a request in; raises UserError if it can never run or the engine is full."""
        prompt, sampling, limits = request.prompt, request.sampling, self._executor.profile.values
        if len(prompt) == 0:
            raise UserError(f"Request {request.id} has an empty prompt; give at least one token.")
        if request.max_tokens < 1:
            raise UserError(f"Request {request.id} has max_tokens={request.max_tokens}; ask for at least 1.")
        longest = len(prompt) + request.max_tokens
        if longest > limits["max_model_len"]:
            raise UserError(
                f"Request {request.id} has {len(prompt)} prompt tokens and max_tokens={request.max_tokens}, together "
                f"more than the {limits['max_model_len']} that the model and the cache allow; shorten one of them."
            )
        for name, tokens in (("prompt", prompt), ("stop_token_ids", sampling.stop_token_ids)):
            if len(tokens) > 0 and not 0 <= min(tokens) <= max(tokens) < self._executor.vocab_size:
                raise UserError(
                    f"Request {request.id} has a token in its {name} that is not from 0 to "
                    f"{self._executor.vocab_size - 1}; use this model's tokens."
                )
        if sampling.stop and self._tokenizer is None:
            raise UserError(f"Request {request.id} has stop strings, but the model has no tokenizer; use stop_token_ids.")
        if request.request_class not in (IMMEDIATE, DEFERRED) or not 0 <= request.tenant < len(self.state.tenants):
            raise UserError(f"Request {request.id} is of an unknown class or tenant.")
        with self._lock:
            if request.id in self._known:
                raise UserError(f"Request {request.id} is there already; give each request an id of its own.")
            if len(self._known) >= len(self.state.requests):
                raise UserError(f"The engine holds {len(self._known)} requests, as many as it can; try again later.")
            self._known.add(request.id)
        self._inbox.append(request)
        if request.request_class == IMMEDIATE and request.arrival_s is None:
            self._urgent = True
        self._wake.set()

    def cancel(self, request_id: str) -> None:
        """Ends a request, whatever it is doing, and frees all it holds; nothing happens if it has ended already."""
        self._inbox.append(request_id)
        self._wake.set()

    def swap_policy(self, policy: Policy) -> None:
        """Hands over to another policy before the next iteration; requests notice nothing."""
        self._inbox.append(policy)
        self._wake.set()

    def stop(self) -> None:
        """Makes `run` return after the iteration under way."""
        self._stopping = True
        self._wake.set()

    # --------------------------------------------------------------------------------------------- the engine's

    @property
    def unfinished(self) -> int:
        """Requests taken in that have not ended."""
        return len(self._known)

    def run(self, until_s: float = _NEVER_S) -> None:
        """Decides and runs until the clock, by which this must come to pass, reaches `until_s`, or until `stop`."""
        while not self._stopping and self.view.now_s < until_s:
            self._decide_and_advance(until_s)

    def drain(self, patience_s: float = 30.0) -> None:
        """Decides and runs until every request has ended, or none could run for `patience_s` under this policy."""
        iterations, since_s = 0, self.clock.now_s()
        while self.unfinished and not self._stopping:
            now_s = self.clock.now_s()
            if self._expected or self._inbox or self.view.iterations > iterations:
                iterations, since_s = self.view.iterations, now_s
            elif now_s > since_s + patience_s:
                return
            self._decide_and_advance(now_s + patience_s)

    def _decide_and_advance(self, until_s: float) -> None:
        self.decide()
        if self.policy.every_iteration:
            self.advance(until_s, 1)
        else:
            # At multiples of the interval; an iteration that lasts longer leaves some out.
            self._decisions = max(self._decisions, int(self.view.now_s / self._interval_s)) + 1
            self.advance(min(self._decisions * self._interval_s, until_s))

    def decide(self) -> None:
        """Asks the policy and puts its decision in force from the next `advance` on."""
        self._decide_now = False
        began_s = time.perf_counter()
        self.state.decision[0] = self.policy.decide(self.view)
        self._decision_histogram[itl_bin(time.perf_counter() - began_s)] += 1

    def advance(self, until_s: float, max_iterations: int = 0) -> None:
        """Runs under the current decision until the clock reaches `until_s` or after `max_iterations` iterations.

        As `surrogate.advance`: the last iteration may end past `until_s`; max_iterations=0: no limit. Ends earlier for a
        new policy, for `stop`, and if nothing can ever happen again.
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

    def metrics(self) -> dict[str, float]:
        """Counts since the start, and how long decisions took (seconds; 0 before the first)."""
        scheduler, classes = self.state.scheduler[0], self.state.classes
        return {
            "iterations": int(scheduler["iterations"]),
            "abandoned_iterations": self.abandoned,
            "tokens": self.tokens,
            "finished": int(classes["finished"].sum()),
            "ended_otherwise": int(classes["ended_otherwise"].sum()),
            "waiting": int(classes["waiting"].sum()),
            "running": int(classes["running"].sum()),
            "preemptions": int(classes["preemptions"].sum()),
            "recomputed_tokens": int(scheduler["recomputed_tokens"]),
            "swapped_tokens": int(scheduler["swapped_tokens"]),
            "policy_swaps": self.policy_swaps,
            "decisions": int(self._decision_histogram.sum()),
            "decision_median_s": histogram_percentile(self._decision_histogram, 50) or 0.0,
            "decision_p99_s": histogram_percentile(self._decision_histogram, 99) or 0.0,
        }

    # --------------------------------------------------------------------------------- between two iterations

    def _take_in(self) -> None:
        """Moves the clock to now and does what has come: arrivals, cancellations, another policy."""
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
        self._urgent_at_s = self._next_arrival_s(IMMEDIATE) if self._safepoints else _NEVER_S

    def _swap(self, policy: Policy) -> None:
        try:
            policy.reset(self.view)
        except Exception as error:  # requests must not suffer for it
            _LOG.warning("%s cannot take over (%s); %s goes on", policy.name, error, self.policy.name)
            return
        self.policy = policy
        self.policy_swaps += 1
        self._decide_now = True

    def _next_arrival_s(self, request_class: int) -> float:
        arrivals = (arrival_s for arrival_s, _, request in self._expected if request.request_class == request_class)
        return min(arrivals, default=_NEVER_S)

    def _let_pass(self, now_s: float) -> None:
        """Moves the scheduler's clock on without an iteration, and books what fell due meanwhile."""
        if now_s > self.state.scheduler["now_s"][0]:
            self.state.scheduler["now_s"] = now_s
            settle(self.state)
            self._collect_ended()

    def _idle(self, until_s: float) -> bool:
        """Nothing may run: waits for whoever comes next, at most to `until_s`."""
        due_s = min(self._expected[0][0] if self._expected else _NEVER_S, until_s)
        going = self.clock.wait(due_s, self._wake)
        self._let_pass(self.clock.now_s())
        return going

    def _enter(self, request: Request, arrival_s: float) -> None:
        """Gives a request a place in the table and submits it."""
        r = self._places.popleft()
        immediate, slo = request.request_class == IMMEDIATE, self.view.slo
        row = np.zeros(1, TRACE_ROW)
        row["arrival_s"] = arrival_s
        row["ttft_slo_s"] = _promise(request.ttft_s, slo.ttft_s, immediate)
        row["tpot_slo_s"] = _promise(request.tpot_s, slo.tpot_s, immediate)
        row["window_s"] = request.window_s
        row["request_class"] = request.request_class
        row["tenant"] = request.tenant
        row["prompt_tokens"] = len(request.prompt)
        row["output_tokens"] = row["max_tokens"] = request.max_tokens
        row["predicted_output_tokens"] = request.predicted_output_tokens
        sampling = request.sampling
        entry = _Entry(request, np.asarray(request.prompt, np.int32), array("i"))
        if self._tokenizer is not None and (request.listener is not None or sampling.stop):
            entry.detokenizer, entry.stops = Detokenizer(self._tokenizer), StopStrings(sampling.stop)
        of_requests = self._of_requests
        # Python's own hash of a text differs from run to run.
        seed = sampling.seed if sampling.seed is not None else self._seed << 32 | zlib.crc32(request.id.encode())
        of_requests.seed[r] = seed & 0xFFFFFFFFFFFFFFFF
        of_requests.ends_early[r] = not sampling.ignore_eos
        of_requests.watched[r] = bool(
            request.listener or sampling.stop or sampling.stop_token_ids or sampling.logprobs is not None
        )
        logprobs = -1 if sampling.logprobs is None else sampling.logprobs
        self._sampling[r] = (sampling.temperature, sampling.top_p, sampling.top_k, logprobs)
        self._watched += bool(of_requests.watched[r])
        self._particular += _particular(sampling)
        self._entries[r] = entry
        self._outputs[r] = entry.output
        self._place_of[request.id] = r
        enter(self.state, r, row)
        self._collect_ended()

    def _cancel(self, request_id: str) -> None:
        if request_id in self._place_of:
            cancel(self.state, self._place_of[request_id])
            self._collect_ended()
            return
        for i, (arrival_s, _, request) in enumerate(self._expected):
            if request.id == request_id:
                del self._expected[i]
                heapq.heapify(self._expected)
                self._report(request, Completion(request_id, len(request.prompt), [], "cancelled", None, 0.0, 0))
                return

    # --------------------------------------------------------------------------------------------- an iteration

    def _iterate(self) -> bool:
        """Plans and computes one iteration; False if nothing may run now."""
        state, flat = self.state, self._flat
        began = time.perf_counter()
        began_s = self.view.now_s
        save_blocks = 0
        if self._save_blocks > 0 and state.decision["preemption"][0] != RECOMPUTE:
            save_blocks = min(self._save_blocks, self._executor.free_host_blocks)
        counts = Counts(*prepare(state, self._table, self._of_requests, flat, save_blocks))
        if counts.swapped_out or counts.swapped_in or counts.saved:
            self._move(counts)
        if counts.tokens == 0:
            self._collect_ended(counts.ended_otherwise)
            return False
        if counts.chunks:
            self._fill_chunks(counts.chunks)
        sampled = flat.sampled[: counts.sampled]
        batch = Batch(
            tokens=flat.tokens[: counts.tokens],
            positions=flat.positions[: counts.tokens],
            slots=flat.slots[: counts.tokens],
            query_lens=flat.query_lens[: counts.requests],
            context_lens=flat.context_lens[: counts.requests],
            block_table=flat.blocks[: counts.requests * counts.widest].reshape(counts.requests, counts.widest),
            sampled_rows=flat.sampled_rows[: counts.sampled],
            sampling=self._sampling[sampled] if self._particular else None,
            draws=flat.draws[: counts.sampled],
        )
        may_stop = self._safepoints and not counts.urgent
        ids = [] if self._on_step is None else self._ids(counts)
        prepared = time.perf_counter()
        try:
            outcome = self._executor.execute(batch, self._interrupted if may_stop else None)
        except Interrupted:
            self._abandon(began_s)
            self.abandoned += 1
            if self._on_step is not None:
                self._on_step(self._step(counts, ids, began_s, began, prepared, time.perf_counter(), None))
            return True
        except OutOfMemory:
            self._abandon(began_s)
            self._shrink(counts)
            return True
        executed = time.perf_counter()
        tokens = outcome.tokens
        watched = np.flatnonzero(self._of_requests.watched[sampled]).tolist() if self._watched else []
        self._watch(watched, tokens, outcome.logprobs)
        for r, token in zip(sampled.tolist(), tokens.tolist(), strict=True):
            self._outputs[r].append(token)
        self.tokens += len(tokens)
        elapsed_s = max(self.clock.now_s() - began_s, 1e-9)
        ended, ended_otherwise = finish(state, self._of_requests, flat, tokens, self._is_end, elapsed_s)
        self._tell(watched)
        if ended:
            for i in np.flatnonzero(flat.ended[: counts.sampled]).tolist():
                self._complete(int(sampled[i]), "stop" if flat.stops[i] else "length")
        self._collect_ended(ended_otherwise)
        if self._on_step is not None:
            self._on_step(self._step(counts, ids, began_s, began, prepared, executed, outcome.forward_s))
        return True

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

    def _fill_chunks(self, chunks: int) -> None:
        """Writes the tokens of prefill chunks, which after a preemption reach into the output."""
        flat = self._flat
        for i, row in flat.chunks[:chunks].tolist():
            r, count, end = int(flat.requests[i]), int(flat.query_lens[i]), int(flat.context_lens[i])
            entry = self._entries[r]
            start, prompt = end - count, len(entry.prompt)
            from_prompt = max(min(prompt, end) - start, 0)
            flat.tokens[row : row + from_prompt] = entry.prompt[start : start + from_prompt]
            if from_prompt < count:
                flat.tokens[row + from_prompt : row + count] = entry.output[start + from_prompt - prompt : end - prompt]

    def _interrupted(self) -> bool:
        """True if an immediate request has come since the iteration began."""
        return bool(self._urgent and self._inbox) or self._urgent_at_s <= self.clock.now_s()

    def _abandon(self, began_s: float) -> None:
        abandon(self.state, max(self.clock.now_s() - began_s, 0.0))
        self._collect_ended()

    def _shrink(self, counts: Counts) -> None:
        """The iteration did not fit into memory: smaller ones from now on, and what cannot run in any ends."""
        if counts.tokens > 1:
            budget = counts.tokens // 2
            self.state.engine["max_tokens_per_step"] = budget
            _LOG.warning("out of memory: an iteration has at most %d tokens from now on", budget)
            return
        r = int(self._flat.requests[0])
        self._entries[r].error = "The device is out of memory; send it again when the engine has less to do."
        cancel(self.state, r)
        self._collect_ended()

    def _watch(self, rows: list[int], tokens: np.ndarray, logprobs: dict[int, Logprobs]) -> None:
        """Looks at the tokens of requests that have stop strings, stop tokens, log-probabilities or a listener."""
        flat = self._flat
        for i in rows:
            r, token = int(flat.sampled[i]), int(tokens[i])
            entry = self._entries[r]
            if i in logprobs:
                entry.logprobs.append(logprobs[i])
            if token in entry.request.sampling.stop_token_ids:
                flat.stops[i] = True
            elif entry.detokenizer is not None and not (self._is_end[token] and self._of_requests.ends_early[r]):
                assert entry.stops is not None
                entry.text.append(entry.stops.push(entry.detokenizer.push([token])))
                flat.stops[i] = entry.stops.found

    def _tell(self, rows: list[int]) -> None:
        """Tells listeners about the tokens of requests that go on."""
        for i in rows:
            entry = self._entries[int(self._flat.sampled[i])]
            if entry.request.listener is not None and not self._flat.ended[i]:
                text = "".join(entry.text[entry.told :])
                entry.told = len(entry.text)
                entry.request.listener(Update(entry.request.id, entry.output[-1], text, None))

    # --------------------------------------------------------------------------------------------- endings

    def _collect_ended(self, ended_otherwise: int | None = None) -> None:
        """Completes the requests that ended without finishing, if there are new ones."""
        if ended_otherwise is None:
            ended_otherwise = int(self.state.classes["ended_otherwise"].sum())
        if ended_otherwise == self._ended_otherwise:
            return
        self._ended_otherwise = ended_otherwise
        ended = np.isin(self.state.requests["status"], (CANCELLED, EXPIRED, REJECTED))
        for r in np.flatnonzero(ended).tolist():
            if r in self._entries:
                entry = self._entries[r]
                if self.state.requests["status"][r] == REJECTED:
                    entry.error = "The request needs more memory than the whole cache has; shorten it."
                status = STATUS_NAMES[self.state.requests["status"][r]]
                self._complete(r, "error" if entry.error is not None else status)

    def _complete(self, r: int, reason: str) -> None:
        """Reports a request that has ended and gives its place in the table free."""
        entry, record = self._entries.pop(r), self.state.requests[r]
        request = entry.request
        token_ids = entry.output.tolist()
        by_text = entry.stops is not None and entry.stops.found
        if entry.detokenizer is not None and entry.stops is not None:
            if not by_text:
                entry.text += [entry.stops.push(entry.detokenizer.flush()), entry.stops.flush()]
            make_text: Callable[[], str] = partial("".join, entry.text)
        elif self._tokenizer is not None:
            make_text = partial(_decode, self._tokenizer, token_ids[: -1 if reason == "stop" else None])
        else:
            make_text = str
        first_token_s = float(record["first_token_s"])
        completion = Completion(
            id=request.id,
            prompt_tokens=len(entry.prompt),
            token_ids=token_ids,
            finish_reason=reason,
            ttft_s=first_token_s - float(record["arrival_s"]) if token_ids else None,
            e2e_s=float(record["finish_s"] - record["arrival_s"]),
            preemptions=int(record["preemptions"]),
            error=entry.error,
            logprobs=entry.logprobs,
            make_text=make_text,
        )
        self._watched -= bool(self._of_requests.watched[r])
        self._particular -= _particular(request.sampling)
        leave(self.state, r)
        self._table.swapped[r] = False
        self._executor.forget(r)
        del self._place_of[request.id]
        self._places.append(r)
        by_token = reason in ("stop", "length")
        self._report(request, completion, token_ids[-1] if by_token else None, "".join(entry.text[entry.told :]))

    def _report(self, request: Request, completion: Completion, token: int | None = None, text: str = "") -> None:
        with self._lock:
            self._known.discard(request.id)
        if request.listener is not None:
            request.listener(Update(request.id, token, text, completion))
        if self._on_end is not None:
            self._on_end(completion)

    def _ids(self, counts: Counts) -> list[str]:
        return [self._entries[r].request.id for r in self._flat.requests[: counts.requests].tolist()]

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
            began_s=began_s,
            elapsed_s=self.view.now_s - began_s,
            abandoned=forward_s is None,
            requests=ids,
            tokens=self._flat.query_lens[: counts.requests].tolist(),
            features=self.state.batch[0].copy(),
            decision=self.state.decision[0].copy(),
            prepare_s=prepared - began,
            execute_s=executed - prepared,
            forward_s=forward_s or 0.0,
            finish_s=time.perf_counter() - executed,
        )


def _promise(asked_s: float | None, default_s: float, immediate: bool) -> float:
    """Seconds promised: what was asked for, else the default for immediate requests and nothing for deferred ones."""
    if asked_s is not None:
        return asked_s
    return default_s if immediate else _NEVER_S


def _particular(sampling: Sampling) -> bool:
    """False for greedy sampling without log-probabilities, which needs none of the fields."""
    return sampling.temperature > 0 or sampling.logprobs is not None


def _decode(tokenizer: Any, tokens: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer)
    return detokenizer.push(tokens) + detokenizer.flush()
