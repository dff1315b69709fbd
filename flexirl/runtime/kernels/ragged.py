"""Ragged arrays: rows of different lengths, one behind the other in a flat array."""

from __future__ import annotations

import numpy as np


def starts(lengths: np.ndarray) -> np.ndarray:
    """Where each row begins, and where the last one ends: (n + 1,) from (n,)."""
    bounds = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=bounds[1:])
    return bounds


def ramps(lengths: np.ndarray) -> np.ndarray:
    """0 .. lengths[0] - 1, then 0 .. lengths[1] - 1, and so on: each element's index in its row."""
    bounds = starts(lengths)
    return np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
