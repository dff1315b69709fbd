"""What computes a planned iteration: the protocol between the engine and its executor, and what passes between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple, Protocol

import numpy as np

from flexirl.runtime.live.requests import Image, Request
from flexirl.runtime.live.sampling import History, Logprobs
from flexirl.runtime.profile.engine import EngineProfile
from flexirl.runtime.scheduler.state import COPY


class Interrupted(Exception):
    """The iteration was broken off between two layers; nothing of it counts."""


class OutOfMemory(Exception):
    """The iteration did not fit into memory; nothing of it counts."""


class Batch(NamedTuple):
    """An iteration's flattened batch: T tokens of N requests, S of which sample.

    Views of memory that is filled anew for each iteration; an iteration of the same sizes comes as the same object, but
    for one with histories.
    """

    tokens: np.ndarray  # int64 (T,)
    positions: np.ndarray  # int64 (T,)
    slots: np.ndarray  # int64 (T,): where keys and values go, block * block_size + offset
    query_lens: np.ndarray  # int64 (N,)
    context_lens: np.ndarray  # int64 (N,)
    block_table: np.ndarray  # int32 (N, widest)
    sampled_rows: np.ndarray  # int64 (S,): rows of the T tokens whose logits are wanted
    draws: np.ndarray  # float64 (S,), uniform in (0, 1)
    requests: np.ndarray  # int32 (N,): their places in the scheduler's table
    histories: Mapping[int, History] = MappingProxyType({})  # of the rows of S whose logits are to be penalised


class Outcome(NamedTuple):
    """What an iteration yields: int64 (S,) tokens, the log-probabilities asked for by row, seconds in the model.

    A token of -1: the model gave nothing that one could be chosen from.
    """

    tokens: np.ndarray
    logprobs: dict[int, Logprobs]
    forward_s: float

    def failed_rows(self, sampled: int, vocab_size: int) -> np.ndarray:
        """The rows without a token, int64.

        Raises RuntimeError for what compiled code, which checks nothing, must not see: other than S tokens of the
        vocabulary.
        """
        tokens = self.tokens
        if tokens.shape != (sampled,) or tokens.dtype != np.int64:
            raise RuntimeError(f"{sampled} tokens were due and {tokens.shape} of {tokens.dtype} came")
        if sampled == 0:
            return tokens
        least, largest = int(tokens.min()), int(tokens.max())
        if not -1 <= least <= largest < vocab_size:
            raise RuntimeError(f"tokens from {least} to {largest} came, of a vocabulary of {vocab_size}")
        return np.flatnonzero(tokens < 0) if least < 0 else tokens[:0]


@dataclass(frozen=True)
class Moves:
    """What moves between device and host memory in one iteration: of each request, its device blocks in order.

    out: preempted by swap, all its blocks; back: admitted again, all its blocks, of which the first `kept` are to stay
    saved; save: further full blocks of a running request, those after the ones saved already. copies: `COPY` (n,), of
    single blocks between device and host tier, to be made in this order, after those that leave and before all others.
    """

    out: dict[int, list[int]] = field(default_factory=dict)
    back: dict[int, list[int]] = field(default_factory=dict)
    kept: dict[int, int] = field(default_factory=dict)
    save: dict[int, list[int]] = field(default_factory=dict)
    copies: np.ndarray = field(default_factory=lambda: np.zeros(0, COPY))


class Executor(Protocol):
    """Holds keys and values and computes iterations. Requests are known by their place in the scheduler's table."""

    profile: EngineProfile
    vocab_size: int
    end_tokens: tuple[int, ...]
    image_token: int | None  # stands in a prompt for every token of an image; None: the model takes no images

    @property
    def free_host_blocks(self) -> int:
        """Blocks of host memory that hold nothing."""
        ...

    def move(self, moves: Moves) -> dict[int, int]:
        """Moves keys and values before an iteration; see `HostCache.move`."""
        ...

    def execute(self, batch: Batch, sampling: np.ndarray | None, interrupted: Callable[[], bool] | None) -> Outcome:
        """Computes an iteration.

        sampling: `SAMPLING` (S,), None if all take the most likely token and ask for nothing else. interrupted: asked
        between two layers. Raises Interrupted if that says so, or OutOfMemory.
        """
        ...

    def check_images(self, request: Request) -> int:
        """Tokens of the prompt that stand for the request's images; raises UserError if it cannot take them."""
        ...

    def take_images(self, r: int, request: Request) -> None:
        """Request r has images, which were checked."""
        ...

    def draw_image(self, tokens: int, rng: np.random.Generator) -> Image:
        """A random image for which so many tokens stand; only where there is an `image_token`."""
        ...

    def forget(self, r: int) -> None:
        """Request r has ended."""
        ...
