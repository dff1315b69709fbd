"""What a client asks a live engine for, what it gets back, and a request's output while it grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from flexirl.errors import UserError
from flexirl.runtime.live.guarded import Guard
from flexirl.runtime.live.sampling import Logprobs, Sampling
from flexirl.runtime.live.text import Detokenizer, StopStrings
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

STOP, LENGTH, ERROR = "stop", "length", "error"
_NEVER_S = float("inf")


@dataclass(frozen=True)
class Completion:
    """What became of a request.

    finish_reason: stop (an end token, a stop token or a stop string), length (max_tokens), cancelled, expired (its
    window closed), or error, which `error` explains in a sentence. token_ids include the token that ended the output;
    text leaves it out, and the stop string too. ttft_s, e2e_s: seconds from arrival to the first token (None: there
    was none) and to the end. logprobs: one per token if asked for, else empty.
    """

    id: str
    token_ids: list[int]
    finish_reason: str
    ttft_s: float | None = None
    e2e_s: float = 0.0
    preemptions: int = 0
    error: str | None = None
    logprobs: list[Logprobs] = field(default_factory=list)
    make_text: Callable[[], str] = str

    @cached_property
    def text(self) -> str:
        """The output as text, empty where there is no tokenizer; made when first read, not in the engine's time."""
        return self.make_text()


class Update(NamedTuple):
    """What a listener is told."""

    id: str
    token: int | None  # None at an end that came without one
    text: str  # what is new and will not change any more
    completion: Completion | None  # at the end


class Image(NamedTuple):
    """An image as the model's image processor prepares it; Qwen2-VL's names them pixel_values and image_grid_thw."""

    pixels: Any  # float array or tensor (patches, numbers of a patch)
    grid: tuple[int, int, int]  # patches in time, height and width


@dataclass(frozen=True)
class Request:
    """A request: token numbers in, at most `max_tokens` out.

    request_class: IMMEDIATE or DEFERRED; ttft_s, tpot_s: its promise, None takes the engine's SLO for immediate
    requests and none for deferred ones; window_s: seconds until a deferred request expires; predicted_output_tokens:
    what a predictor says, 0 for none; arrival_s: on the engine's clock, None is now; listener: called from the engine's
    thread with every token; images: in the order of their tokens in the prompt.
    """

    id: str
    prompt: Sequence[int]
    max_tokens: int
    request_class: int = IMMEDIATE
    sampling: Sampling = field(default_factory=Sampling)
    tenant: int = 0
    ttft_s: float | None = None
    tpot_s: float | None = None
    window_s: float = _NEVER_S
    predicted_output_tokens: int = 0
    arrival_s: float | None = None
    listener: Callable[[Update], None] | None = None
    images: Sequence[Image] = ()

    @property
    def immediate(self) -> bool:
        """True for a request with someone waiting for it."""
        return self.request_class == IMMEDIATE

    def _check_kinds(self) -> None:
        """Raises UserError for what is not even of the right kind, so that nobody else meets it."""
        if not _is_text(self.id):
            raise UserError(f"Request id {self.id!r} is no text that UTF-8 can write; give another.")
        for name in ("max_tokens", "tenant", "predicted_output_tokens", "request_class"):
            value = getattr(self, name)
            whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
            if not whole or not -1 << 31 <= value < 1 << 31:
                raise UserError(f"Request {self.id} has {name}={value!r}; give a whole number below 2^31.")
        for name in ("ttft_s", "tpot_s", "window_s"):
            value = getattr(self, name)
            if value is None and name != "window_s":
                continue
            if not _is_number(value) or not value > 0:
                raise UserError(f"Request {self.id} has {name}={value!r}; give a positive number of seconds.")
        if self.arrival_s is not None and not (_is_number(self.arrival_s) and abs(self.arrival_s) < _NEVER_S):
            raise UserError(
                f"Request {self.id} has arrival_s={self.arrival_s!r}; give finite seconds, or leave it out."
            )
        if self.predicted_output_tokens < 0:
            raise UserError(
                f"Request {self.id} has predicted_output_tokens={self.predicted_output_tokens}; 0 is none predicted."
            )

    def check(self, max_model_len: int, vocab_size: int, num_tenants: int, has_tokenizer: bool) -> None:
        """Raises UserError if an engine with these limits cannot run it."""
        self._check_kinds()
        longest = len(self.prompt) + self.max_tokens
        if len(self.prompt) == 0:
            raise UserError(f"Request {self.id} has an empty prompt; give at least one token.")
        if self.max_tokens < 1:
            raise UserError(f"Request {self.id} has max_tokens={self.max_tokens}; ask for at least 1.")
        if longest > max_model_len:
            raise UserError(
                f"Request {self.id} has {len(self.prompt)} prompt tokens and max_tokens={self.max_tokens}, together "
                f"more than the {max_model_len} that model and cache allow; shorten one of them."
            )
        for name, tokens in (("prompt", self.prompt), ("stop_token_ids", self.sampling.stop_token_ids)):
            if len(tokens) > 0 and not 0 <= min(tokens) <= max(tokens) < vocab_size:
                raise UserError(
                    f"Request {self.id} has a token in its {name} that is not from 0 to {vocab_size - 1}; "
                    "use this model's tokens."
                )
        if self.sampling.stop and not has_tokenizer:
            raise UserError(f"Request {self.id} has stop strings but the model no tokenizer; use stop_token_ids.")
        if self.request_class not in (IMMEDIATE, DEFERRED):
            raise UserError(f"Request {self.id} is of class {self.request_class}; use IMMEDIATE or DEFERRED.")
        if not 0 <= self.tenant < num_tenants:
            raise UserError(f"Request {self.id} has tenant={self.tenant}, which is not from 0 to {num_tenants - 1}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    """True for a text that UTF-8 can write; half a surrogate pair is none."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


class Output:
    """What is to be known of a request's tokens as they come: their text, where it matters before the end."""

    def __init__(self, request: Request, tokenizer: Any, guard: Guard) -> None:
        self._guard = guard
        self.request = request
        self.error: str | None = None
        self._tokenizer = tokenizer
        self._logprobs: list[Logprobs] = []
        self._texts: list[str] = []  # pieces of the text
        self._told = 0  # pieces that the listener has
        reads = tokenizer is not None and (request.listener is not None or len(request.sampling.stop) > 0)
        self._reader = (Detokenizer(tokenizer), StopStrings(request.sampling.stop)) if reads else None

    @property
    def watched(self) -> bool:
        """True if `watch` has to see its tokens: for stop strings, stop tokens, log-probabilities or a listener."""
        sampling = self.request.sampling
        asked = sampling.stop or sampling.stop_token_ids or sampling.logprobs is not None
        return bool(asked or self.request.listener)

    def watch(self, token: int, ends: bool, logprobs: Logprobs | None) -> bool:
        """Looks at a new token; ends: it is an end token. True if the output is to end with it for another reason."""
        if logprobs is not None:
            self._logprobs.append(logprobs)
        if token in self.request.sampling.stop_token_ids:
            return True
        if self._reader is None or ends:
            return False
        detokenizer, stops = self._reader
        self._texts.append(stops.push(detokenizer.push([token])))
        return stops.found

    def tell(self, token: int) -> None:
        """Lets the listener know a token that `watch` has seen and that is not the last."""
        if self.request.listener is not None:
            self._guard.call("listener", self.request.listener, Update(self.request.id, token, self._untold(), None))

    def _untold(self) -> str:
        text = "".join(self._texts[self._told :])
        self._told = len(self._texts)
        return text

    def complete(self, finish_reason: str, token_ids: list[int], record: np.ndarray) -> Completion:
        """The completion, of which the listener is told; record: the request's `REQUEST` at its end."""
        if self._reader is not None:
            detokenizer, stops = self._reader
            if not stops.found:
                self._texts += [stops.push(detokenizer.flush()), stops.flush()]
            make_text: Callable[[], str] = partial("".join, self._texts)
        elif self._tokenizer is not None:
            make_text = partial(_decode, self._tokenizer, token_ids[: -1 if finish_reason == STOP else None])
        else:
            make_text = str
        arrival_s = float(record["arrival_s"])
        completion = Completion(
            id=self.request.id,
            token_ids=token_ids,
            finish_reason=finish_reason,
            ttft_s=float(record["first_token_s"]) - arrival_s if token_ids else None,
            e2e_s=float(record["finish_s"]) - arrival_s,
            preemptions=int(record["preemptions"]),
            error=self.error,
            logprobs=self._logprobs,
            make_text=make_text,
        )
        if self.request.listener is not None:
            token = token_ids[-1] if finish_reason in (STOP, LENGTH) else None
            update = Update(self.request.id, token, self._untold(), completion)
            self._guard.call("listener", self.request.listener, update)
        return completion


def _decode(tokenizer: Any, tokens: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer)
    return detokenizer.push(tokens) + detokenizer.flush()
