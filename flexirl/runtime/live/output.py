"""A request's output while it grows: its text, where that matters before the end, and what its listener is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from flexirl.runtime.live.delivery import Client, Delivery
from flexirl.runtime.live.guarded import words
from flexirl.runtime.live.requests import ERROR, LENGTH, STOP, Completion, Request, Update
from flexirl.runtime.live.sampling import Logprobs
from flexirl.runtime.live.text import Detokenizer, StopStrings


class Output:
    """special: the tokens that text leaves out, by what they are written as: they end an output of which they are a
    stop string. error: why the request has to end, in a sentence.
    """

    def __init__(self, request: Request, tokenizer: Any, special: Mapping[str, int], delivery: Delivery) -> None:
        self.request = request
        self.error: str | None = None
        self._delivery = delivery
        self._listener = None if request.listener is None else Client("listener", request.listener)
        self._tokenizer = tokenizer
        self._logprobs: list[Logprobs] = []
        self._texts: list[str] = []  # pieces of the text
        self._told = 0  # pieces that the listener has
        stops = request.sampling.stop
        self._stop_tokens = {*request.sampling.stop_token_ids, *(special[stop] for stop in stops if stop in special)}
        reads = tokenizer is not None and (request.listener is not None or len(stops) > 0)
        self._reader = (Detokenizer(tokenizer), StopStrings(stops)) if reads else None

    @property
    def watched(self) -> bool:
        """True if `watch` has to see its tokens: for stop strings, stop tokens, log-probabilities or a listener."""
        sampling = self.request.sampling
        asked = sampling.stop or sampling.stop_token_ids or sampling.logprobs is not None
        return bool(asked or self._listener)

    def watch(self, token: int, ends: bool, logprobs: Logprobs | None) -> bool:
        """Looks at a new token; ends: it is an end token. True if the output is to end with it for another reason."""
        if logprobs is not None:
            self._logprobs.append(logprobs)
        if token in self._stop_tokens:
            return True
        if self._reader is None or ends:
            return False
        detokenizer, stops = self._reader
        try:
            self._texts.append(stops.push(detokenizer.push([token])))
        except Exception as error:  # of the tokenizer
            self._give_up_text(error)
        return stops.found or self.error is not None

    def _give_up_text(self, error: Exception) -> None:
        self._reader = None
        self.error = f"The tokenizer cannot make text of its tokens ({words(error)})."

    def tell(self, token: int) -> None:
        """Lets the listener know a token that `watch` has seen and that is not the last."""
        if self._listener is not None:
            logprobs = self._logprobs[-1] if self._logprobs else None
            self._delivery.call(self._listener, Update(self.request.id, token, self._untold(), None, logprobs))

    def _untold(self) -> str:
        text = "".join(self._texts[self._told :])
        self._told = len(self._texts)
        return text

    def complete(self, finish_reason: str, token_ids: list[int], record: np.ndarray, cached_tokens: int) -> Completion:
        """The completion, of which `tell_end` is to tell; record: the request's `REQUEST` at its end."""
        make_text: Callable[[], str] = str
        if self._reader is not None:
            detokenizer, stops = self._reader
            try:
                if not stops.found:
                    self._texts += [stops.push(detokenizer.flush()), stops.flush()]
            except Exception as error:  # of the tokenizer
                self._give_up_text(error)
            make_text = partial("".join, self._texts)
        elif self._tokenizer is not None and self.error is None:
            make_text = partial(_decode, self._tokenizer, token_ids[: -1 if finish_reason == STOP else None])
        arrival_s = float(record["arrival_s"])
        return Completion(
            id=self.request.id,
            token_ids=token_ids,
            finish_reason=finish_reason if self.error is None else ERROR,
            ttft_s=float(record["first_token_s"]) - arrival_s if token_ids else None,
            e2e_s=float(record["finish_s"]) - arrival_s,
            cached_tokens=cached_tokens,
            preemptions=int(record["preemptions"]),
            error=self.error,
            logprobs=self._logprobs,
            make_text=make_text,
        )

    def tell_end(self, completion: Completion) -> None:
        """Lets the listener know how the request has ended."""
        if self._listener is not None:
            token = completion.token_ids[-1] if completion.finish_reason in (STOP, LENGTH) else None
            logprobs = self._logprobs[-1] if self._logprobs and token is not None else None
            self._delivery.call(self._listener, Update(self.request.id, token, self._untold(), completion, logprobs))


def _decode(tokenizer: Any, tokens: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer)
    return detokenizer.push(tokens) + detokenizer.flush()
