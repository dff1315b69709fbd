"""Compiled functions exist once for all whole numbers, with the same results."""

from __future__ import annotations

import numpy as np

from flexirl.compiled import compiled


@compiled
def _add(number: int, factor: float) -> float:
    return number * factor + 1


@compiled
def _calls(numbers: np.ndarray) -> float:
    return _add(1, 2.0) + _add(numbers[0], 2.0) + _add(len(numbers), 2.0) + _add(2, 0.5)


def test_one_version_for_constants_and_integers_of_any_width() -> None:
    assert _calls(np.array([-7, 2, 3], np.int32)) == 3 - 13 + 7 + 2
    _calls.recompile()  # type: ignore[attr-defined]  # what an earlier run has kept calls nothing anew
    assert [str(kinds) for kinds in _add.signatures] == ["(int64, float64)"]  # type: ignore[attr-defined]
    assert _add(3, 0.5) == 2.5
