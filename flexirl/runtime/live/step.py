"""What is told of one iteration to whoever records them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flexirl.runtime.scheduler.state import State


class Step(NamedTuple):
    """One iteration, just booked."""

    state: State  # of the engine, live
    began_s: float  # on the engine's clock
    elapsed_s: float
    abandoned: bool
    requests: list[str]  # their ids
    tokens: list[int]  # of each
    features: np.ndarray  # 0-d `BATCH`: what the step-time model predicts from
    decision: np.ndarray  # 0-d `DECISION` in force
    prepare_s: float  # planning, block table and flattened batch
    execute_s: float  # in the executor
    forward_s: float  # of that, in the model
    finish_s: float  # booking what came of it
