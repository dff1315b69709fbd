"""Statistics of arrival times: how bursty they are."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def counts(times: NDArray[np.float64], duration_s: float, bins: int) -> NDArray[np.int64]:
    """Arrivals in each of `bins` equal bins of [0, duration_s], int64 of shape (bins,)."""
    return np.histogram(times, bins, (0.0, duration_s))[0]


def peak_to_mean(times: NDArray[np.float64], duration_s: float, bins: int = 400) -> float:
    """The fullest of `bins` equal bins over their mean; nan without arrivals."""
    if len(times) == 0:
        return math.nan
    count = counts(times, duration_s, bins)
    return float(count.max() / count.mean())


def index_of_dispersion(times: NDArray[np.float64], duration_s: float, window_s: float) -> float:
    """Variance over mean of the counts in windows of window_s seconds (1 for Poisson).

    The last, incomplete window is left out; nan with fewer than two windows or no arrivals.
    """
    windows = int(duration_s / window_s + 1e-9)
    if windows < 2:
        return math.nan
    count = counts(times, windows * window_s, windows)
    return float(count.var(ddof=1) / count.mean()) if count.any() else math.nan


def gap_cv(times: NDArray[np.float64]) -> float:
    """Coefficient of variation of the gaps between arrivals; nan with fewer than three arrivals."""
    if len(times) < 3:
        return math.nan
    gaps = np.diff(times)
    return float(gaps.std() / gaps.mean()) if gaps.any() else math.nan
