"""Which request has which place in the scheduler's table, from its arrival until its end is reported."""

from __future__ import annotations

import hashlib
import zlib
from collections import deque

import numpy as np

from flexirl.runtime.live.arrays import Arrays
from flexirl.runtime.live.delivery import Client, Delivery
from flexirl.runtime.live.executor import Executor
from flexirl.runtime.live.guarded import Guard, words
from flexirl.runtime.live.intake import Arrival, Intake
from flexirl.runtime.live.iteration import take_in
from flexirl.runtime.live.options import Options
from flexirl.runtime.live.output import Output
from flexirl.runtime.live.request_table import leave
from flexirl.runtime.live.requests import ERROR, Completion, Request
from flexirl.runtime.live.sampling import SAMPLING, History
from flexirl.runtime.live.text import special_tokens
from flexirl.runtime.scheduler.intake import cancel
from flexirl.runtime.scheduler.state import CANCELLED, EXPIRED, REJECTED, STATUS_NAMES
from flexirl.workloads.slo import SLO
from flexirl.workloads.trace import TRACE_ROW

_NEVER_S = float("inf")


class Places:
    """Requests by their places r in the table.

    sampling: `SAMPLING` (R,); watched, particular: how many outputs have to be watched, and how many do not just take
    the likeliest token.
    """

    def __init__(
        self,
        arrays: Arrays,
        executor: Executor,
        slo: SLO,
        intake: Intake,
        delivery: Delivery,
        guard: Guard,
        options: Options,
    ) -> None:
        self.sampling = np.zeros(options.max_requests, SAMPLING)
        self.watched = self.particular = 0
        self.place_of: dict[str, int] = {}
        # The place that has been free for longest comes first, so that the accounts see what ended as long as they can.
        self.free = deque(range(options.max_requests))
        self._outputs: list[Output | None] = [None] * options.max_requests
        self._penalised: set[int] = set()  # places of those whose tokens so far bear on their next
        self._state, self._swaps, self._arrays, self._live = arrays.state, arrays.swaps, arrays.requests, arrays.live
        self._executor, self._slo = executor, slo
        self._intake, self._delivery, self._guard = intake, delivery, guard
        self._tokenizer, self._special = options.tokenizer, special_tokens(options.tokenizer)
        self._seed, self._separate_caches = options.seed, options.separate_caches
        self._on_end = None if options.on_end is None else Client("on_end", options.on_end)
        self._ended_otherwise = 0  # requests that have ended without finishing, as far as they are reported

    def output(self, r: int) -> Output:
        """What the request in place r has made so far."""
        output = self._outputs[r]
        assert output is not None
        return output

    def histories(self, sampled: np.ndarray) -> dict[int, History]:
        """The requests whose logits are to be penalised, by the rows of `sampled`, places int32 (S,)."""
        histories = {}
        for i, r in enumerate(sampled.tolist()) if self._penalised else ():
            if r in self._penalised:
                sampling, generated = self.output(r).request.sampling, int(self._state.requests["generated"][r])
                tokens = self._arrays.tokens[r, : self._state.requests["prompt_tokens"][r] + generated]
                ends = () if sampling.ignore_eos else self._executor.end_tokens
                histories[i] = History(sampling, tokens, generated, ends)
        return histories

    # --------------------------------------------------------------------------------------------- beginnings

    def enter(self, arrival: Arrival) -> None:
        """Gives a request a place and submits it. One that turns out not to be what it seemed ends with an error."""
        r, request = self.free.popleft(), arrival.request
        output = self._new_output(request)
        try:
            row = self._describe(r, arrival)
        except Exception as error:
            self.free.append(r)
            self._guard.call("executor", self._executor.forget, r)
            self._report(output, Completion(request.id, [], ERROR, error=f"It cannot run ({words(error)})."))
            return
        self._arrays.watched[r] = output.watched
        self.watched += output.watched
        self.particular += not request.sampling.plain
        if request.sampling.penalised:
            self._penalised.add(r)
        self._outputs[r] = output
        self.place_of[request.id] = r
        take_in(self._live, r, row)
        self.collect()

    def _describe(self, r: int, arrival: Arrival) -> np.ndarray:
        """Writes down what there is to know of the request in place r; its `TRACE_ROW`, (1,)."""
        request, prompt, arrays = arrival.request, arrival.prompt, self._arrays
        sampling = request.sampling
        # Python's own hash of a text differs from run to run.
        seed = sampling.seed if sampling.seed is not None else self._seed << 32 | zlib.crc32(request.id.encode())
        arrays.tokens[r, : len(prompt)] = prompt
        arrays.seed[r] = seed & 0xFFFFFFFFFFFFFFFF
        arrays.ends_early[r] = not sampling.ignore_eos
        logprobs = -1 if sampling.logprobs is None else sampling.logprobs
        self.sampling[r] = (sampling.temperature, sampling.top_p, sampling.top_k, logprobs)
        arrays.salts[r] = 0
        if self._separate_caches:
            arrays.salts[r, 0] = request.tenant + 1
        row = _row(arrival, self._slo)
        if request.images:
            row["num_images"], row["image_tokens"] = len(request.images), self._executor.check_images(request)
            self._executor.take_images(r, request)
            self._salt(r, request)
        return row

    def _salt(self, r: int, request: Request) -> None:
        """Tells prompts with other images in the same places apart, for the prefix cache."""
        arrays = self._arrays
        block_size = int(self._state.engine["block_size"][0])
        is_image = np.asarray(request.prompt) == self._executor.image_token
        begins = np.flatnonzero(np.diff(is_image, prepend=False) & is_image)
        for number, (begin, image) in enumerate(zip(begins.tolist(), request.images, strict=True)):
            digest = hashlib.blake2b(np.asarray(image.pixels).tobytes(), digest_size=8, key=arrays.key.tobytes())
            digest.update(repr((number, image.grid)).encode())
            arrays.salts[r, begin // block_size] ^= int.from_bytes(digest.digest(), "little")

    def _new_output(self, request: Request) -> Output:
        return Output(request, self._tokenizer, self._special, self._delivery)

    # --------------------------------------------------------------------------------------------- endings

    def cancel(self, request_id: str) -> None:
        """Ends a request, whatever it is doing; nothing happens if it has ended already."""
        if request_id in self.place_of:
            cancel(self._state, self.place_of[request_id])
            self.collect()
            return
        request = self._intake.withdraw(request_id)
        if request is not None:
            self._report(self._new_output(request), Completion(request_id, [], STATUS_NAMES[CANCELLED]))

    def fail(self, requests: list[int], why: str) -> None:
        """Ends the requests in these places, as far as there are any, with an error."""
        for r in requests:
            output = self._outputs[r]
            if output is not None:
                output.error = why
                cancel(self._state, r)
        self.collect()

    def collect(self, ended_otherwise: int | None = None) -> None:
        """Completes the requests that ended without finishing, if there are new ones; their count, if known."""
        if ended_otherwise is None:
            ended_otherwise = int(self._state.classes["ended_otherwise"].sum())
        if ended_otherwise == self._ended_otherwise:
            return
        self._ended_otherwise = ended_otherwise
        ended = np.isin(self._state.requests["status"], (CANCELLED, EXPIRED, REJECTED))
        for r in np.flatnonzero(ended).tolist():
            output = self._outputs[r]
            if output is None:
                continue
            status = int(self._state.requests["status"][r])
            if status == REJECTED:
                output.error = "It needs more memory than the whole cache has; shorten it."
            self.complete(r, STATUS_NAMES[status])

    def complete(self, r: int, finish_reason: str) -> None:
        """Reports a request that has ended and gives its place free."""
        output = self.output(r)
        self._outputs[r] = None
        self.watched -= output.watched
        self.particular -= not output.request.sampling.plain
        self._penalised.discard(r)
        self._swaps.swapped[r] = False
        leave(self._state, r)
        self._guard.call("executor", self._executor.forget, r)
        del self.place_of[output.request.id]
        self.free.append(r)
        record = self._state.requests[r]
        first, count = int(record["prompt_tokens"]), int(record["generated"])
        tokens = self._arrays.tokens[r, first : first + count].tolist()
        cached = max(int(self._arrays.cached[r]), 0)
        self._report(output, output.complete(finish_reason, tokens, record, cached))

    def tell_all(self, why: str) -> None:
        """The engine cannot go on: reports an error for every open request, without a look at the scheduler."""
        outputs = {output.request.id: output for output in self._outputs if output is not None}
        for request in self._intake.open:
            output = outputs.get(request.id) or self._new_output(request)
            self._report(output, Completion(request.id, [], ERROR, error=why))

    def _report(self, output: Output, completion: Completion) -> None:
        self._intake.ended(completion.id)
        output.tell_end(completion)
        if self._on_end is not None:
            self._delivery.call(self._on_end, completion)


def _row(arrival: Arrival, slo: SLO) -> np.ndarray:
    """The request as a `TRACE_ROW`, (1,); how long its output will be is not known, so it counts as its longest."""
    request, row = arrival.request, np.zeros(1, TRACE_ROW)
    row["arrival_s"] = arrival.arrival_s
    for name, asked_s, default_s in (
        ("ttft_slo_s", request.ttft_s, slo.ttft_s),
        ("tpot_slo_s", request.tpot_s, slo.tpot_s),
    ):
        row[name] = asked_s if asked_s is not None else default_s if request.immediate else _NEVER_S
    row["window_s"] = request.window_s
    row["request_class"] = request.request_class
    row["tenant"] = request.tenant
    row["prompt_tokens"] = len(arrival.prompt)
    row["output_tokens"] = row["max_tokens"] = request.max_tokens
    row["predicted_output_tokens"] = request.predicted_output_tokens
    return row
