"""The engine in this process as a backend: it runs in a thread of its own, which no client can hold up.

Completions come from threads of the engine and are handed to the event loop. An engine that fails is made anew over
the same model; who was in it is told, and deferred work comes again.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from flexirl.errors import UserError
from flexirl.policies.interface.policy import Policy
from flexirl.runtime.live.engine import LiveEngine
from flexirl.runtime.live.guarded import words
from flexirl.runtime.live.options import Options
from flexirl.runtime.live.requests import ERROR, Completion, EngineClosed, EngineFull, Request, Update
from flexirl.runtime.live.sampling import Sampling
from flexirl.runtime.profile.step_time import prefill_slope
from flexirl.serving.answers import Answer
from flexirl.serving.backend import Terms
from flexirl.serving.bodies import parse
from flexirl.serving.errors import ApiError
from flexirl.serving.metrics import Metrics
from flexirl.serving.prompts import Prompts
from flexirl.serving.token_text import TokenText
from flexirl.workloads.slo import SLO
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

if TYPE_CHECKING:
    from flexirl.runtime.live.executor import Executor
    from flexirl.runtime.models.loading import LoadedModel

_LOG = logging.getLogger(__name__)
_RESTARTS, _WITHIN_S = 3, 60.0  # an engine that fails more often than this stays down
_WARM_UP = "warm-up"  # a request that nobody has sent
_ENDED_BADLY = {"cancelled": 499, "expired": 408}


@dataclass(frozen=True)
class LocalOptions:
    """max_requests: waiting and running at once; refuse_after: immediate requests are refused while the prefill that
    waits would take so many times the promised time to first token, None never; tenants: names, the first is everyone
    who has none; queued_tokens: of each tenant, tokens of open immediate requests at most; seed: of requests that
    sample without one; fallback: decides where the policy fails.
    """

    max_requests: int = 4096
    refuse_after: float | None = 4.0
    tenants: tuple[str, ...] = ("default",)
    queued_tokens: dict[str, int] | None = None
    seed: int = 0
    fallback: Policy | None = None


class _Job(NamedTuple):
    answer: Answer
    requests: list[Request]


class LocalBackend:
    """See `Backend`. `swap_policy` hands over to another policy, `previous_policy` is the one before."""

    def __init__(
        self, model: LoadedModel, executor: Executor, policy: Policy, slo: SLO, metrics: Metrics, options: LocalOptions
    ) -> None:
        self.models: tuple[str, ...] = (model.name,)
        self.policy = policy
        self.previous_policy: Policy | None = None
        self.trouble: str | None = "The engine has not started."
        self._model, self._executor, self._slo = model, executor, slo
        self._metrics, self._options = metrics, options
        self._prompts = Prompts(model, int(executor.profile.values["max_model_len"]))
        self._texts = TokenText(model.tokenizer)
        self._open: dict[str, tuple[Request, asyncio.Future[Completion]]] = {}
        self._queued: dict[str, int] = {}  # tokens of open immediate requests, by tenant
        self._failures: deque[float] = deque(maxlen=_RESTARTS)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="flexirl-engine", daemon=True)

    # ------------------------------------------------------------------------------------------ the engine's thread

    async def start(self) -> None:
        """See `Backend.start`."""
        self._loop = asyncio.get_running_loop()
        self._engine = await asyncio.to_thread(self._new_engine)
        await asyncio.to_thread(self._warm_up)
        self.trouble = None
        self._thread.start()

    async def close(self) -> None:
        """See `Backend.close`."""
        self._closing = True
        self._engine.stop()
        await asyncio.to_thread(self._thread.join)

    def _new_engine(self) -> LiveEngine:
        tenants = len(self._options.tenants)
        options = Options(
            tokenizer=self._model.tokenizer, max_requests=self._options.max_requests, num_tenants=tenants,
            separate_caches=tenants > 1, seed=self._options.seed, fallback=self._options.fallback,
            on_end=self._hand_over,
        )  # fmt: skip
        return LiveEngine(self._executor, self.policy, self._slo, options)

    def _warm_up(self) -> None:
        """Lets nobody wait for what takes long the first time only, greedy or not."""
        for sampling in (Sampling(), Sampling(temperature=1.0, top_p=0.9, logprobs=1)):
            self._engine.add_request(Request(_WARM_UP, [0], 2, sampling=sampling))
            self._engine.drain()

    def _run(self) -> None:
        while not self._closing:
            try:
                self._engine.run()
            except Exception as error:
                self.trouble = f"The engine has failed ({words(error)})."
                _LOG.error("the engine has failed", exc_info=error)
                if not self._restart():
                    return

    def _restart(self) -> bool:
        now_s = time.monotonic()
        if len(self._failures) == _RESTARTS and now_s < self._failures[0] + _WITHIN_S:
            _LOG.error("the engine failed %d times within %.0f s and stays down", _RESTARTS + 1, _WITHIN_S)
            return False
        self._failures.append(now_s)
        try:
            self._engine = self._new_engine()
        except Exception as error:
            _LOG.error("the engine cannot be made anew", exc_info=error)
            return False
        self.trouble = None
        self._metrics.restarted()
        return True

    def _hand_over(self, completion: Completion) -> None:
        if completion.id != _WARM_UP:
            self._loop.call_soon_threadsafe(self._ended, completion)

    # ------------------------------------------------------------------------------------------------- the event loop

    def _ended(self, completion: Completion) -> None:
        request, future = self._open.pop(completion.id)
        if request.immediate:
            self._queued[self._tenant(request)] -= len(request.prompt) + request.max_tokens
        self._metrics.completed(request, completion, self._slo)
        if not future.done():
            future.set_result(completion)

    def _tenant(self, request: Request) -> str:
        return self._options.tenants[request.tenant]

    async def answer(self, url: str, fields: dict[str, Any], terms: Terms) -> dict[str, Any]:
        """See `Backend.answer`."""
        job = await asyncio.to_thread(self._job, url, fields, terms)
        futures = self._submit(job.requests, terms)
        try:
            completions = await asyncio.gather(*futures)
        finally:
            self._withdraw(job.requests)
        for completion in completions:
            self._check(completion)
        # Text is made when it is first read; of a long output that takes a while.
        return await asyncio.to_thread(job.answer.whole, completions)

    async def stream(self, url: str, fields: dict[str, Any], terms: Terms) -> AsyncGenerator[dict[str, Any], None]:
        """See `Backend.stream`."""
        updates: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()

        def listener_of(choice: int) -> Callable[[Update], None]:
            def listen(update: Update) -> None:
                self._loop.call_soon_threadsafe(updates.put_nowait, (choice, update))

            return listen

        job = await asyncio.to_thread(self._job, url, fields, terms, listener_of)
        self._submit(job.requests, terms)
        chunks = self._chunks(job, updates)
        await anext(chunks)  # from now on its end withdraws the requests, even if nobody reads from it
        return chunks

    async def _chunks(
        self, job: _Job, updates: asyncio.Queue[tuple[int, Update]]
    ) -> AsyncGenerator[dict[str, Any], None]:
        completions: dict[int, Completion] = {}
        try:
            yield {}
            for chunk in job.answer.opening(len(job.requests)):
                yield chunk
            while len(completions) < len(job.requests):
                choice, update = await updates.get()
                if update.completion is not None:
                    completions[choice] = update.completion
                    self._check(update.completion)
                piece = job.answer.piece(choice, update)
                if piece is not None:
                    yield piece
            for chunk in job.answer.closing([completions[i] for i in range(len(job.requests))]):
                yield chunk
        finally:
            self._withdraw(job.requests)

    def _job(
        self,
        url: str,
        fields: dict[str, Any],
        terms: Terms,
        listener_of: Callable[[int], Callable[[Update], None]] | None = None,
    ) -> _Job:
        body = parse(url, fields)
        if body.model is not None and body.model not in self.models:
            raise ApiError(
                404, f"There is no model {body.model!r} here; the one that is served is {self.models[0]!r}.",
                code="model_not_found", param="model",
            )  # fmt: skip
        prompts = self._prompts.of(body)
        count = sum(len(prompt.tokens) for prompt in prompts)
        answer = Answer(body, self.models[0], terms.tier, count, self._texts)
        tenants = self._options.tenants
        requests: list[Request] = []
        for prompt in prompts:
            for choice in range(body.choices):
                number = len(requests)
                request = Request(
                    id=f"{answer.id}-{number}", prompt=prompt.tokens, max_tokens=self._prompts.limit(body, prompt),
                    request_class=terms.request_class, sampling=self._prompts.sampling(body, choice),
                    tenant=tenants.index(terms.tenant) if terms.tenant in tenants else 0, ttft_s=terms.ttft_s,
                    tpot_s=terms.tpot_s, window_s=terms.window_s, images=prompt.images,
                    listener=None if listener_of is None else listener_of(number),
                )  # fmt: skip
                requests.append(request)
        return _Job(answer, requests)

    def _submit(self, requests: Sequence[Request], terms: Terms) -> list[asyncio.Future[Completion]]:
        """Hands them all to the engine, or none of them."""
        if terms.request_class == IMMEDIATE:
            self._refuse_what_comes_too_late(terms)
            self._refuse_too_many_tokens(requests)
        futures = []
        for i, request in enumerate(requests):
            future: asyncio.Future[Completion] = self._loop.create_future()
            try:
                self._engine.add_request(request)
            except UserError as error:
                self._withdraw(requests[:i])
                raise _refusal(error) from None
            self._open[request.id] = request, future
            if request.immediate:
                tenant = self._tenant(request)
                self._queued[tenant] = self._queued.get(tenant, 0) + len(request.prompt) + request.max_tokens
            futures.append(future)
        return futures

    def _refuse_what_comes_too_late(self, terms: Terms) -> None:
        if self._options.refuse_after is None:
            return
        promise_s = terms.ttft_s or self._slo.ttft_s
        wait_s = self._wait_s()
        if wait_s > self._options.refuse_after * promise_s:
            self._metrics.refused("late")
            raise ApiError(
                429, f"The first token would come in {wait_s:.1f} s and {promise_s:g} s are promised; try again later.",
                code="overloaded", retry_after_s=math.ceil(wait_s - promise_s),
            )  # fmt: skip

    def _wait_s(self) -> float:
        """Seconds of prefill that waiting immediate requests are owed."""
        state = self._engine.state
        return int(state.classes["waiting_tokens"][IMMEDIATE]) * float(prefill_slope(state.engine[0]))

    def _refuse_too_many_tokens(self, requests: Sequence[Request]) -> None:
        tenant = self._tenant(requests[0])
        most = (self._options.queued_tokens or {}).get(tenant)
        asked = sum(len(request.prompt) + request.max_tokens for request in requests)
        if most is not None and self._queued.get(tenant, 0) + asked > most:
            self._metrics.refused("tokens")
            raise ApiError(
                429, f"{tenant} has {self._queued.get(tenant, 0)} tokens open and asks for {asked} more; {most} are "
                "allowed at once.", code="rate_limit_exceeded", retry_after_s=1,
            )  # fmt: skip

    def _withdraw(self, requests: Sequence[Request]) -> None:
        """Cancels those that have not ended; their ends are still counted."""
        for request in requests:
            if request.id in self._open:
                self._engine.cancel(request.id)

    def _check(self, completion: Completion) -> None:
        """Raises ApiError for what ended without an answer."""
        if completion.finish_reason == ERROR:
            raise ApiError(500, completion.error or "The request failed.", code="engine_error")
        if completion.finish_reason in _ENDED_BADLY:
            status = _ENDED_BADLY[completion.finish_reason]
            raise ApiError(status, f"The request was {completion.finish_reason}.", code=completion.finish_reason)

    # --------------------------------------------------------------------------------------------------- operation

    def swap_policy(self, policy: Policy) -> None:
        """Puts another policy in charge; raises UserError for what is none."""
        self._engine.swap_policy(policy)
        self.previous_policy, self.policy = self.policy, policy

    def figures(self) -> dict[str, Any]:
        """See `Backend.figures`."""
        state, engine = self._engine.state, self._engine
        blocks = int(state.engine["kv_blocks"][0])
        by_class = {
            name: {
                "waiting": int(state.classes["waiting"][number]),
                "running": int(state.classes["running"][number]),
                "kv_share": int(state.classes["kv_blocks"][number]) / blocks,
                "cache_share": int(state.classes["idle_blocks"][number]) / blocks,
            }
            for name, number in (("immediate", IMMEDIATE), ("deferred", DEFERRED))
        }
        return {"policy": engine.policy.name, "wait_s": self._wait_s(), "classes": by_class, **engine.metrics()}


def _refusal(error: UserError) -> ApiError:
    if isinstance(error, EngineFull):
        return ApiError(429, str(error), code="engine_full", retry_after_s=1)
    if isinstance(error, EngineClosed):
        return ApiError(503, str(error), code="engine_down", retry_after_s=5)
    return ApiError(400, str(error))
