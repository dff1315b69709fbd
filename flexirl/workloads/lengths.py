"""Length models: how many tokens a request's prompt and output have, and how many of them come from images.

A model fills the length columns of `TRACE_ROW` rows. `max_tokens`, the limit that a client asks for, is one constant
per model, so it says nothing about the true output length of a request.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flexirl.errors import UserError
from flexirl.workloads.readers import read_lengths

Tokens = NDArray[np.int32]
MAX_TOKENS = 2**31 - 1  # trace columns are 32-bit


def _require(ok: bool, name: str, value: object, rule: str) -> None:
    if not ok:
        raise UserError(f"lengths.{name}={value!r} is out of range; {rule}.")


class Marginal(Protocol):
    """The distribution of one length, in tokens."""

    @property
    def max(self) -> int:
        """The longest possible length."""
        ...

    def draw(self, count: int, rng: np.random.Generator) -> Tokens:
        """`count` independent lengths of at least 1 and at most `max` tokens, int32 of shape (count,)."""
        ...


@dataclass(frozen=True)
class Fixed:
    """Always the same length."""

    tokens: int

    def __post_init__(self) -> None:
        _require(1 <= self.tokens <= MAX_TOKENS, "tokens", self.tokens, "a length is 1 token or more")

    @property
    def max(self) -> int:
        """The length."""
        return self.tokens

    def draw(self, count: int, rng: np.random.Generator) -> Tokens:
        """See `Marginal.draw`."""
        return np.full(count, self.tokens, dtype=np.int32)


@dataclass(frozen=True)
class Uniform:
    """Whole numbers from min to max, both included, with equal probability; mean (min + max) / 2."""

    min: int
    max: int

    def __post_init__(self) -> None:
        _require(1 <= self.min <= self.max <= MAX_TOKENS, "min", self.min, f"it is 1 to max={self.max}")

    def draw(self, count: int, rng: np.random.Generator) -> Tokens:
        """See `Marginal.draw`."""
        return rng.integers(self.min, self.max, count, dtype=np.int32, endpoint=True)


@dataclass(frozen=True)
class Lognormal:
    """A mixture of lognormals, rounded and clipped to [min, max]; one component is a plain lognormal.

    mu and sigma are the mean and standard deviation of the logarithm of the length, weights are relative. Before
    clipping the mean is sum(weight * exp(mu + sigma^2 / 2)). Lengths of served requests are close to such mixtures
    (ServeGen: Xiang et al., 2025).
    """

    mu: tuple[float, ...]
    sigma: tuple[float, ...]
    weights: tuple[float, ...] = (1.0,)
    min: int = 1
    max: int = 32768

    def __post_init__(self) -> None:
        same = len(self.mu) == len(self.sigma) == len(self.weights) > 0
        _require(same, "weights", self.weights, "mu, sigma and weights have one entry per component")
        _require(all(s >= 0 for s in self.sigma), "sigma", self.sigma, "standard deviations are 0 or more")
        valid = all(w >= 0 for w in self.weights) and sum(self.weights) > 0
        _require(valid, "weights", self.weights, "weights are 0 or more and one of them is positive")
        _require(1 <= self.min <= self.max <= MAX_TOKENS, "min", self.min, f"it is 1 to max={self.max}")

    def draw(self, count: int, rng: np.random.Generator) -> Tokens:
        """See `Marginal.draw`."""
        ends = np.cumsum(self.weights) / np.sum(self.weights)
        which = np.minimum(np.searchsorted(ends, rng.random(count), side="right"), len(ends) - 1)
        log = np.asarray(self.mu)[which] + np.asarray(self.sigma)[which] * rng.standard_normal(count)
        # Clipped as logarithms: exp of a far outlier would overflow.
        log = np.clip(log, np.log(self.min), np.log(self.max))
        return np.clip(np.rint(np.exp(log)), self.min, self.max).astype(np.int32)


class LengthModel(Protocol):
    """The joint distribution of a request's lengths."""

    def fill(self, rows: np.ndarray, rng: np.random.Generator) -> None:
        """Sets the length columns of `rows` (array of `TRACE_ROW`, shape (count,)), in place."""
        ...


@dataclass(frozen=True)
class Independent:
    """Prompt and output lengths drawn independently: the correlation in published traces is weak."""

    prompt: Marginal
    output: Marginal

    def fill(self, rows: np.ndarray, rng: np.random.Generator) -> None:
        """See `LengthModel.fill`."""
        rows["prompt_tokens"] = self.prompt.draw(len(rows), rng)
        rows["output_tokens"] = self.output.draw(len(rows), rng)
        rows["max_tokens"] = self.output.max


@dataclass(frozen=True)
class Images:
    """Text, a number of images, and for each image a number of tokens; the prompt is text and images together.

    text, output, tokens_per_image: distributions of tokens. num_images: relative weight of 0, 1, 2, ... images.
    The mean of image tokens is the mean number of images times the mean of tokens_per_image.
    """

    text: Marginal
    output: Marginal
    tokens_per_image: Marginal
    num_images: tuple[float, ...] = (0.0, 1.0)

    def __post_init__(self) -> None:
        valid = all(w >= 0 for w in self.num_images) and sum(self.num_images) > 0
        _require(valid, "num_images", self.num_images, "it lists the weights of 0, 1, 2, ... images")

    def fill(self, rows: np.ndarray, rng: np.random.Generator) -> None:
        """See `LengthModel.fill`."""
        text = self.text.draw(len(rows), rng)
        rows["output_tokens"] = self.output.draw(len(rows), rng)
        rows["max_tokens"] = self.output.max
        ends = np.cumsum(self.num_images) / np.sum(self.num_images)
        images = np.minimum(np.searchsorted(ends, rng.random(len(rows)), side="right"), len(ends) - 1)
        owner = np.repeat(np.arange(len(rows)), images)
        tokens = np.bincount(owner, self.tokens_per_image.draw(len(owner), rng), minlength=len(rows))
        rows["num_images"] = images
        rows["image_tokens"] = tokens
        rows["prompt_tokens"] = text + rows["image_tokens"]


@dataclass(frozen=True)
class Empirical:
    """Lengths of the requests in a trace file, drawn with replacement; each draw keeps a request's lengths together.

    path: any file that `read_lengths` reads; a `prob` column gives the rows' relative weights. `max_tokens` is the
    longest output in the file. Raises UserError where the file cannot be read.
    """

    path: str
    format: str | None = None
    _rows: np.ndarray = field(init=False, repr=False, compare=False)
    _ends: NDArray[np.float64] | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rows, weights = read_lengths(self.path, self.format)
        object.__setattr__(self, "_rows", rows)
        object.__setattr__(self, "_ends", None if weights is None else np.cumsum(weights) / weights.sum())

    def fill(self, rows: np.ndarray, rng: np.random.Generator) -> None:
        """See `LengthModel.fill`."""
        at = rng.random(len(rows))
        source = at * len(self._rows) if self._ends is None else np.searchsorted(self._ends, at, side="right")
        chosen = self._rows[np.minimum(source.astype(np.int64), len(self._rows) - 1)]
        for column in ("prompt_tokens", "output_tokens", "max_tokens", "num_images", "image_tokens"):
            rows[column] = chosen[column]
