"""How many tokens an iteration may have: the engine's limit, or fewer for a while where memory has run out."""

from __future__ import annotations

import logging

import numpy as np

_LOG = logging.getLogger(__name__)
_PATIENCE = 256  # iterations that have to fit before larger ones are tried again
_TRIES = 3  # of one token, since memory that others use may be free a moment later


class TokenBudget:
    """Keeps `max_tokens_per_step` of an engine's figures, `ENGINE` (1,), at what fits."""

    def __init__(self, engine: np.ndarray) -> None:
        self._engine = engine
        self._most = int(engine["max_tokens_per_step"][0])
        self._since = 0  # the iteration at which it was set
        self._tries = 0
        self.short = False  # memory has run out not long ago

    def ran_out(self, tokens: int, iterations: int) -> bool:
        """An iteration of so many tokens did not fit: smaller ones may. False if none will, or not soon."""
        self.short = True
        if tokens > 1:
            self._set(tokens // 2, iterations)
            _LOG.warning("out of memory: an iteration has at most %d tokens for now", tokens // 2)
            return True
        self._tries += 1
        if self._tries < _TRIES:
            return True
        self._tries = 0
        return False

    def fitted(self, iterations: int) -> None:
        """An iteration has fitted: lets them grow in time, since whatever took the memory may be gone."""
        self._tries = 0
        if iterations >= self._since + _PATIENCE:
            self._set(min(2 * int(self._engine["max_tokens_per_step"][0]), self._most), iterations)
            self.short = int(self._engine["max_tokens_per_step"][0]) < self._most

    def _set(self, tokens: int, iterations: int) -> None:
        self._engine["max_tokens_per_step"] = tokens
        self._since = iterations
