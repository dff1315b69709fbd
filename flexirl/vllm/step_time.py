"""How long this engine's steps take, learned from the steps it sees: recursive least squares, no figure below zero.

A part of the model of `flexirl.runtime.profile.step_time`: base, requests, tokens, context, chunk x context. Errors are
relative, so that small steps weigh as much as large ones and one that was held up hardly counts.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import nnls

from flexirl.runtime.profile.step_time import COEFFICIENTS

FITTED = ("base_s", "per_sequence_s", "per_token_s", "per_context_s", "per_chunk_context_s")
_REMEMBERED = 2000.0  # steps: one so long ago counts 1/e
_TOGETHER = 16  # steps that are added at a time: one by one, each would cost what all do
_LEAST_S = 1e-9  # of base and per token: what divides by them goes on


class OnlineFit:
    """Keeps the step-time figures of `engine`, an `ENGINE` record, up to date; until then they are what they were.

    steps: that it has learned from.
    """

    def __init__(self, engine: np.ndarray) -> None:
        self.steps = 0
        self._engine = engine
        self._rows = np.zeros((_TOGETHER, len(FITTED)))
        self._products = np.zeros((len(FITTED), len(FITTED)))
        self._sums = np.zeros(len(FITTED))

    def add(self, batch: np.ndarray, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long; batch: its `BATCH` record, as planned."""
        share = 1.0 / seconds
        _, _, sampled, context, chunk_context, _, _ = batch.item()
        self._rows[self.steps % _TOGETHER] = (share, sampled * share, tokens * share, context * share,
                                              chunk_context * share)  # fmt: skip
        self.steps += 1
        if self.steps % _TOGETHER == 0:
            keep = np.exp(-_TOGETHER / _REMEMBERED)
            self._products = keep * self._products + self._rows.T @ self._rows
            self._sums = keep * self._sums + self._rows.sum(axis=0)
            if self.steps > _TOGETHER:
                self._refit()

    def _refit(self) -> None:
        # Columns differ by ten orders of magnitude; scaled to unit length they keep the solver well conditioned.
        length = np.sqrt(np.diag(self._products))
        length[length == 0] = 1.0
        products = self._products / np.outer(length, length) + 1e-9 * np.eye(len(FITTED))
        lower = np.linalg.cholesky(products)
        figures = nnls(lower.T, np.linalg.solve(lower, self._sums / length))[0] / length
        for name in COEFFICIENTS:
            self._engine[name] = 0.0
        for name, figure in zip(FITTED, figures.tolist(), strict=True):
            self._engine[name] = figure
        self._engine["host_s"] = 0.0
        for name in ("base_s", "per_token_s"):
            self._engine[name] = max(float(self._engine[name]), _LEAST_S)
