"""How a request's next token is chosen from the model's logits: its sampling fields, and the choice for a batch."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flexirl.errors import UserError

MOST_LOGPROBS = 20
_MOST_TOP_K = (1 << 31) - 1
TOKEN_LISTS = ("stop_token_ids", "suppress_tokens", "begin_suppress_tokens")  # fields of `Sampling`
_PENALTIES = (
    "repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size", "suppress_tokens",
    "begin_suppress_tokens", "min_new_tokens",
)  # fmt: skip
_COLD = 1e-5  # temperatures below take the most likely token, as in vLLM; dividing by them leaves nothing to draw from

# One row per sampled token.
SAMPLING = np.dtype(
    [
        ("temperature", "f8"),  # 0: the most likely token
        ("top_p", "f8"),
        ("top_k", "i8"),  # 0: all tokens
        ("logprobs", "i8"),  # alternatives to report; -1: no log-probabilities at all
    ],
    align=True,
)


@dataclass(frozen=True)
class Sampling:
    """A request's sampling fields, as in OpenAI's, vLLM's and Transformers' interfaces, greedy unless told otherwise.

    temperature: 0 takes the most likely token; top_k: only the k most likely, 0 all; top_p: only the smallest set of
    tokens that has this probability; seed: the same seed gives the same tokens whatever else runs, None one made from
    the request's id; stop: texts that end the output and are left out of it; stop_token_ids: tokens that end it;
    ignore_eos: an end-of-sequence token does not end it; logprobs: report the log-probability of each token and of
    that many most likely ones.

    Before temperature, logits change as in Transformers: repetition_penalty divides positive ones of tokens that the
    request has had, prompt included, by this and multiplies negative ones, 1 does nothing; no_repeat_ngram_size: no
    that many tokens in a row come twice, 0 lets them; suppress_tokens are never chosen, begin_suppress_tokens not as
    the first token; min_new_tokens: no end or stop token before so many others. And as in vLLM, by the output alone:
    presence_penalty is taken off logits of tokens in it, frequency_penalty as often as they are in it.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature={self.temperature!r} is not a number of 0 or more.")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise UserError(f"top_p={self.top_p!r} is not a number above 0 and at most 1.")
        if not (_is_whole(self.top_k) and 0 <= self.top_k <= _MOST_TOP_K):
            raise UserError(f"top_k={self.top_k!r} is not a whole number from 0 (all tokens) to {_MOST_TOP_K}.")
        if self.seed is not None and not (_is_whole(self.seed) and 0 <= self.seed < 1 << 64):
            raise UserError(f"seed={self.seed!r} is not a whole number from 0 to 2**64 - 1.")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"stop={list(self.stop)!r} holds something other than texts of one character or more.")
        for name in TOKEN_LISTS:
            tokens = getattr(self, name)
            if not all(_is_whole(token) for token in tokens):
                raise UserError(f"{name}={list(tokens)!r} holds something other than token numbers.")
        if not isinstance(self.ignore_eos, bool):
            raise UserError(f"ignore_eos={self.ignore_eos!r} is neither true nor false.")
        if self.logprobs is not None and not (_is_whole(self.logprobs) and 0 <= self.logprobs <= MOST_LOGPROBS):
            raise UserError(f"logprobs={self.logprobs!r} is not a whole number from 0 to {MOST_LOGPROBS}.")
        if not (_is_number(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UserError(f"repetition_penalty={self.repetition_penalty!r} is not a number above 0.")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not (_is_number(value) and -2 <= value <= 2):
                raise UserError(f"{name}={value!r} is not a number from -2 to 2.")
        for name in ("no_repeat_ngram_size", "min_new_tokens"):
            value = getattr(self, name)
            if not (_is_whole(value) and value >= 0):
                raise UserError(f"{name}={value!r} is not a whole number of 0 (off) or more.")

    @property
    def plain(self) -> bool:
        """True if it takes the most likely token and asks for nothing else."""
        return self.temperature == 0 and self.logprobs is None and not self.penalised

    @property
    def penalised(self) -> bool:
        """True if `penalise` changes logits for it."""
        neutral = Sampling()
        return any(getattr(self, name) != getattr(neutral, name) for name in _PENALTIES)

    @classmethod
    def of(cls, values: Mapping[str, Any], defaults: Sampling | None = None) -> Sampling:
        """From a JSON object's fields, others as in `defaults`.

        Raises UserError, naming the field, for one that is unknown or bad.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise UserError(f"{name!r} is not a field of a request; the sampling fields are {', '.join(known)}.")
        given = dict(values)
        if isinstance(given.get("stop"), str):
            given["stop"] = [given["stop"]]
        for name in ("stop", *TOKEN_LISTS):
            if name in given:
                if not isinstance(given[name], list):
                    raise UserError(f"{name}={given[name]!r} is not a list.")
                given[name] = tuple(given[name])
        return replace(defaults or cls(), **given)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    """True for what a float can hold, infinities and NaN apart."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


class History(NamedTuple):
    """A request whose tokens so far bear on its next one."""

    sampling: Sampling
    tokens: np.ndarray  # int32 (n,): prompt and output
    generated: int  # how many of them are output
    ends: tuple[int, ...] = ()  # end tokens that end it


def penalise(logits: Tensor, histories: Mapping[int, History]) -> Tensor:
    """`logits` (S, vocabulary), in float32 with the rows in `histories` changed as their sampling fields say."""
    if not histories:
        return logits
    logits = logits.to(torch.float32, copy=True)
    for row, (sampling, tokens, generated, ends) in histories.items():

        def at(numbers: Iterable[int] | np.ndarray, row: int = row) -> tuple[int, Tensor]:
            return row, torch.as_tensor(np.array(numbers, np.int64), device=logits.device)

        seen = at(np.unique(tokens))
        had = logits[seen]
        logits[seen] = torch.where(had < 0, had * sampling.repetition_penalty, had / sampling.repetition_penalty)
        output, counts = np.unique(tokens[len(tokens) - generated :], return_counts=True)
        penalties = sampling.frequency_penalty * counts + sampling.presence_penalty
        logits[at(output)] -= torch.as_tensor(penalties, dtype=torch.float32, device=logits.device)
        banned = [*sampling.suppress_tokens, *_ends_of_repeats(tokens, sampling.no_repeat_ngram_size)]
        if generated == 0:
            banned += sampling.begin_suppress_tokens
        if generated < sampling.min_new_tokens:
            banned += [*ends, *sampling.stop_token_ids]
        logits[at(banned)] = -torch.inf
    return logits


def _ends_of_repeats(tokens: np.ndarray, size: int) -> list[int]:
    """The tokens that would end a run of `size` tokens that has been before."""
    if not 0 < size <= len(tokens):
        return []
    runs = np.lib.stride_tricks.sliding_window_view(tokens, size)
    begun = tokens[len(tokens) - size + 1 :]
    ends: list[int] = runs[(runs[:, :-1] == begun).all(-1), -1].tolist()
    return ends


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of one token, before penalties and temperature: its own, and of the likeliest, by token."""

    token: float
    likeliest: list[tuple[int, float]]


def likeliest(logits: Tensor) -> np.ndarray:
    """The most likely tokens: int64 (S,), of `logits` (S, vocabulary).

    -1 for a row that has none: not a number somewhere, or nothing above minus infinity.
    """
    return _peaks(logits)[0]


def _peaks(logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """`likeliest` and the logits of these tokens, float32 (S,)."""
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        numbers = logits.numpy()
        tokens = numbers.argmax(-1)  # several times faster than PyTorch's on a CPU
        peaks = np.take_along_axis(numbers, tokens[:, None], -1)[:, 0]
    else:
        values, indices = logits.max(-1)
        tokens, peaks = indices.cpu().numpy(), values.float().cpu().numpy()
    tokens[~(peaks > -np.inf)] = -1  # NaN, if there is any, counts as the largest
    return tokens, peaks


def choose(logits: Tensor, sampling: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The next tokens: int64 (S,), from `logits` (S, vocabulary); -1 as in `likeliest`.

    sampling: `SAMPLING` (S,); draws: float64 (S,), uniform in (0, 1). A row's token depends on that row alone: the
    draw is looked up in the cumulative distribution of the tokens that temperature, top-k and top-p leave, in this
    order, as in Transformers. Where the largest logit is infinite, or would be after the division by temperature, it
    is taken.
    """
    tokens, peaks = _peaks(logits)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        random = (sampling["temperature"] >= _COLD) & np.isfinite(peaks / sampling["temperature"].astype(np.float32))
    cut = random & ((sampling["top_k"] > 0) | (sampling["top_p"] < 1))
    for rows, draw in ((np.flatnonzero(random & ~cut), _draw), (np.flatnonzero(cut), _draw_from_likeliest)):
        if len(rows):
            of_rows = logits[torch.as_tensor(rows, device=logits.device)].float()
            tokens[rows] = draw(of_rows, sampling[rows], draws[rows]).cpu().numpy()
    return tokens


def _draw(logits: Tensor, sampling: np.ndarray, draws: np.ndarray) -> Tensor:
    return _look_up(_tempered(logits, sampling).softmax(-1).cumsum(-1), draws)


def _tempered(logits: Tensor, sampling: np.ndarray) -> Tensor:
    # What float32 holds: by an infinite temperature, a suppressed token's logit would be no number.
    return logits / _column(np.minimum(sampling["temperature"], np.finfo(np.float32).max), logits)


def _draw_from_likeliest(logits: Tensor, sampling: np.ndarray, draws: np.ndarray) -> Tensor:
    values, order = _tempered(logits, sampling).sort(stable=True, dim=-1, descending=True)
    top_k = np.where(sampling["top_k"] > 0, sampling["top_k"], logits.shape[-1])
    ranks = torch.arange(logits.shape[-1], device=logits.device)
    probabilities = values.masked_fill(ranks >= _column(top_k, ranks), -torch.inf).softmax(-1)
    # The first token is always kept, and each further one while those before it do not have top_p yet.
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill((before >= _column(sampling["top_p"], logits)) & (ranks > 0), 0.0)
    return order.gather(-1, _look_up(probabilities.cumsum(-1), draws)[:, None])[:, 0]


def _look_up(cumulative: Tensor, draws: np.ndarray) -> Tensor:
    """The first entry of each row whose cumulative weight exceeds the draw's share of the total: int64 (S,)."""
    total = cumulative[:, -1:]
    threshold = torch.minimum(_column(draws, cumulative) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0]


def _column(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.as_tensor(values, device=like.device).to(like.dtype)[:, None]


def log_probabilities(logits: Tensor, tokens: np.ndarray, sampling: np.ndarray) -> dict[int, Logprobs]:
    """Of the rows that ask for them and have a token, by row; arguments as in `choose`."""
    rows = np.flatnonzero((sampling["logprobs"] >= 0) & (tokens >= 0))
    if len(rows) == 0:
        return {}
    # Infinite logits become the largest finite ones, so that a log-probability is a number.
    of_rows = logits[torch.as_tensor(rows, device=logits.device)].float().nan_to_num().log_softmax(-1)
    best = of_rows.topk(min(int(sampling["logprobs"].max()), logits.shape[-1]), -1)
    values, indices, of_rows = best.values.tolist(), best.indices.tolist(), of_rows.cpu()
    found = {}
    for i, row in enumerate(rows.tolist()):
        asked = int(sampling["logprobs"][row])
        pairs = list(zip(indices[i][:asked], values[i][:asked], strict=True))
        found[row] = Logprobs(float(of_rows[i, tokens[row]]), pairs)
    return found
