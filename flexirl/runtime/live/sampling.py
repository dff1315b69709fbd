"""How a request's next token is chosen from the model's logits: its sampling fields, and the choice for a batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexirl.errors import UserError

MOST_LOGPROBS = 20

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
    """A request's sampling fields, as in OpenAI's and vLLM's interfaces, greedy unless told otherwise.

    temperature: 0 takes the most likely token; top_k: only the k most likely, 0 all; top_p: only the smallest set of
    tokens that has this probability; seed: the same seed gives the same tokens whatever else runs, None one made from
    the request's id; stop: texts that end the output and are left out of it; stop_token_ids: tokens that end it;
    ignore_eos: an end-of-sequence token does not end it; logprobs: report the log-probability of each token and of
    that many most likely ones.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and 0 <= self.temperature < math.inf):
            raise UserError(f"temperature={self.temperature!r} is not a number of 0 or more.")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise UserError(f"top_p={self.top_p!r} is not a number above 0 and at most 1.")
        if not (_is_whole(self.top_k) and self.top_k >= 0):
            raise UserError(f"top_k={self.top_k!r} is not a whole number of 0 (all tokens) or more.")
        if self.seed is not None and not (_is_whole(self.seed) and 0 <= self.seed < 1 << 64):
            raise UserError(f"seed={self.seed!r} is not a whole number from 0 to 2**64 - 1.")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"stop={list(self.stop)!r} holds something other than texts of one character or more.")
        if not all(_is_whole(token) for token in self.stop_token_ids):
            raise UserError(f"stop_token_ids={list(self.stop_token_ids)!r} holds something other than token numbers.")
        if not isinstance(self.ignore_eos, bool):
            raise UserError(f"ignore_eos={self.ignore_eos!r} is neither true nor false.")
        if self.logprobs is not None and not (_is_whole(self.logprobs) and 0 <= self.logprobs <= MOST_LOGPROBS):
            raise UserError(f"logprobs={self.logprobs!r} is not a whole number from 0 to {MOST_LOGPROBS}.")

    @property
    def plain(self) -> bool:
        """True if it takes the most likely token and asks for nothing else."""
        return self.temperature == 0 and self.logprobs is None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Sampling:
        """From a JSON object's fields; raises UserError, naming the field, for one that is unknown or bad."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise UserError(f"{name!r} is not a field of a request; the sampling fields are {', '.join(known)}.")
        given = dict(values)
        if isinstance(given.get("stop"), str):
            given["stop"] = [given["stop"]]
        for name in ("stop", "stop_token_ids"):
            if not isinstance(given.get(name, []), list):
                raise UserError(f"{name}={given[name]!r} is not a list.")
            given[name] = tuple(given.get(name, []))
        return cls(**given)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of one token, before temperature: its own, and (token, log-probability) of the likeliest."""

    token: float
    likeliest: list[tuple[int, float]]


def likeliest(logits: Tensor) -> np.ndarray:
    """The most likely tokens: int64 (S,), of `logits` (S, vocabulary)."""
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        return logits.numpy().argmax(-1)  # several times faster than PyTorch's on a CPU
    return logits.argmax(-1).cpu().numpy()


def choose(logits: Tensor, sampling: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The next tokens: int64 (S,), from `logits` (S, vocabulary).

    sampling: `SAMPLING` (S,); draws: float64 (S,), uniform in (0, 1). A row's token depends on that row alone: the
    draw is looked up in the cumulative distribution of the tokens that temperature, top-k and top-p leave, in this
    order, as in Transformers.
    """
    tokens = likeliest(logits)
    random = sampling["temperature"] > 0
    cut = random & ((sampling["top_k"] > 0) | (sampling["top_p"] < 1))
    for rows, draw in ((np.flatnonzero(random & ~cut), _draw), (np.flatnonzero(cut), _draw_from_likeliest)):
        if len(rows):
            of_rows = logits[torch.as_tensor(rows, device=logits.device)].float()
            tokens[rows] = draw(of_rows, sampling[rows], draws[rows]).cpu().numpy()
    return tokens


def _draw(logits: Tensor, sampling: np.ndarray, draws: np.ndarray) -> Tensor:
    return _look_up((logits / _column(sampling["temperature"], logits)).softmax(-1).cumsum(-1), draws)


def _draw_from_likeliest(logits: Tensor, sampling: np.ndarray, draws: np.ndarray) -> Tensor:
    values, order = (logits / _column(sampling["temperature"], logits)).sort(stable=True, dim=-1, descending=True)
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
    """Of the rows that ask for them, by row; arguments as in `choose`."""
    rows = np.flatnonzero(sampling["logprobs"] >= 0)
    if len(rows) == 0:
        return {}
    of_rows = logits[torch.as_tensor(rows, device=logits.device)].float().log_softmax(-1)
    best = of_rows.topk(int(sampling["logprobs"].max()), -1)
    values, indices, of_rows = best.values.tolist(), best.indices.tolist(), of_rows.cpu()
    found = {}
    for i, row in enumerate(rows.tolist()):
        asked = int(sampling["logprobs"][row])
        pairs = list(zip(indices[i][:asked], values[i][:asked], strict=True))
        found[row] = Logprobs(float(of_rows[i, tokens[row]]), pairs)
    return found
