"""What a client asks a live engine for, checked, and what it gets back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from flexirl.errors import UserError
from flexirl.runtime.live.sampling import TOKEN_LISTS, Logprobs, Sampling
from flexirl.text import is_text
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

STOP, LENGTH, ERROR = "stop", "length", "error"
_NEVER_S = float("inf")


class EngineFull(UserError):
    """The engine holds as many requests as it can; there is room again when one of them ends."""


class EngineClosed(UserError):
    """The engine takes nothing in any more."""


@dataclass(frozen=True)
class Completion:
    """What became of a request.

    finish_reason: stop (an end token, a stop token or a stop string), length (max_tokens), cancelled, expired (its
    window closed), or error, which `error` explains in a sentence. token_ids include the token that ended the output;
    text leaves it out, and the stop string too. ttft_s, e2e_s: seconds from arrival to the first token (None: there
    was none) and to the end. cached_tokens: of the prompt, those found in the prefix cache. logprobs: one per token if
    asked for, else empty.
    """

    id: str
    token_ids: list[int]
    finish_reason: str
    ttft_s: float | None = None
    e2e_s: float = 0.0
    cached_tokens: int = 0
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
    logprobs: Logprobs | None = None  # of the token, if asked for


class Image(NamedTuple):
    """An image as the model's image processor prepares it; Qwen2-VL's names them pixel_values and image_grid_thw."""

    pixels: Any  # float array or tensor (patches, numbers of a patch)
    grid: tuple[int, int, int]  # patches in time, height and width


@dataclass(frozen=True)
class Request:
    """A request: token numbers in, at most `max_tokens` out.

    request_class: IMMEDIATE or DEFERRED; ttft_s, tpot_s: its promise, None takes the engine's SLO for immediate
    requests and none for deferred ones; window_s: seconds until a deferred request expires; predicted_output_tokens:
    what a predictor says, 0 for none; arrival_s: on the engine's clock, None is now; listener: told of every token, one
    after the other, in a thread beside the engine's; images: in the order of their tokens in the prompt.
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

    def check(self, max_model_len: int, vocab_size: int, num_tenants: int, has_tokenizer: bool) -> np.ndarray:
        """The prompt, int64; raises UserError if an engine with these limits cannot run the request."""
        self._check_kinds()
        prompt = self._numbers("prompt", self.prompt, vocab_size)
        for name in TOKEN_LISTS:
            self._numbers(name, getattr(self.sampling, name), vocab_size)
        if len(prompt) == 0:
            raise UserError(f"Request {self.id} has an empty prompt; give at least one token.")
        if self.max_tokens < 1:
            raise UserError(f"Request {self.id} has max_tokens={self.max_tokens}; ask for at least 1.")
        if len(prompt) + int(self.max_tokens) > max_model_len:
            raise UserError(
                f"Request {self.id} has {len(prompt)} prompt tokens and max_tokens={self.max_tokens}, together "
                f"more than the {max_model_len} that model and cache allow; shorten one of them."
            )
        if self.sampling.stop and not has_tokenizer:
            raise UserError(f"Request {self.id} has stop strings but the model no tokenizer; use stop_token_ids.")
        if self.request_class not in (IMMEDIATE, DEFERRED):
            raise UserError(f"Request {self.id} is of class {self.request_class}; use IMMEDIATE or DEFERRED.")
        if not 0 <= self.tenant < num_tenants:
            raise UserError(f"Request {self.id} has tenant={self.tenant}, which is not from 0 to {num_tenants - 1}.")
        return prompt

    def _check_kinds(self) -> None:
        """Raises UserError for what is not even of the right kind, so that nobody else meets it."""
        if not is_text(self.id):
            raise UserError(f"Request id {self.id!r} is no text that UTF-8 can write; give another.")
        if not isinstance(self.sampling, Sampling):
            raise UserError(f"Request {self.id} has sampling={self.sampling!r}; give a Sampling.")
        if self.listener is not None and not callable(self.listener):
            raise UserError(f"Request {self.id} has listener={self.listener!r}; give a function of one Update.")
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

    def _numbers(self, name: str, tokens: Sequence[int], vocab_size: int) -> np.ndarray:
        """The tokens as an array of our own, since the client may change what it gave."""
        try:
            numbers = np.array(tokens)
        except ValueError:  # lists of several lengths
            numbers = np.array(None)
        if numbers.size == 0:
            return np.zeros(0, np.int64)
        if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
            raise UserError(f"Request {self.id} has a {name} that is no list of whole numbers; give token numbers.")
        if not 0 <= numbers.min() <= numbers.max() < vocab_size:
            raise UserError(
                f"Request {self.id} has a token in its {name} that is not from 0 to {vocab_size - 1}; "
                "use this model's tokens."
            )
        return numbers.astype(np.int64)


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, int | float | np.number) and not isinstance(value, bool) and float(value) == value
    except (OverflowError, TypeError):
        return False
