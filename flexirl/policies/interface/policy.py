"""The protocol between an engine and whoever decides: a policy turns a View into a Decision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from flexirl.runtime.profile.step_time import step_time
from flexirl.runtime.scheduler.state import State
from flexirl.workloads.scenario import SLO

# What a policy may know of a request. The true output length is not among it.
VISIBLE = (
    "arrival_s", "ttft_deadline_s", "tpot_slo_s", "deadline_s", "request_class", "tenant", "prompt_tokens",
    "max_tokens", "predicted_output_tokens", "num_images", "image_tokens", "status", "generated", "computed",
    "kv_blocks", "preemptions", "relegated", "first_token_s", "last_token_s",
)  # fmt: skip


@dataclass(frozen=True)
class View:
    """What a policy sees of an engine between two iterations.

    state: the live state, to be read and not changed; slo: the default promise to immediate requests.
    """

    state: State
    slo: SLO

    @property
    def now_s(self) -> float:
        """Seconds on the engine's clock."""
        return float(self.state.scheduler["now_s"][0])

    @property
    def iterations(self) -> int:
        """Iterations since the start."""
        return int(self.state.scheduler["iterations"][0])

    @property
    def engine(self) -> np.ndarray:
        """The engine's figures: a 0-d array of `ENGINE`."""
        return self.state.engine[0]

    @property
    def free_blocks(self) -> int:
        """Free blocks of KV cache."""
        return int(self.state.scheduler["free_blocks"][0])

    def waiting(self, request_class: int) -> int:
        """Waiting requests of a class."""
        return int(self.state.classes["waiting"][request_class])

    def waiting_tokens(self, request_class: int) -> int:
        """Prefill tokens owed to the waiting requests of a class."""
        return int(self.state.classes["waiting_tokens"][request_class])

    def running(self) -> np.ndarray:
        """The running requests in order of admission, with the fields of `VISIBLE`."""
        numbers = self.state.running[: int(self.state.scheduler["running"][0])]
        return self.state.requests[numbers][list(VISIBLE)]

    def preemptions(self) -> int:
        """Preemptions since the start."""
        return int(self.state.classes["preemptions"].sum())

    def last_step_s(self) -> float:
        """Predicted seconds of the last planned iteration."""
        return float(step_time(self.state.engine[0], self.state.batch[0]))


class Policy(Protocol):
    """Decides for an engine. Deterministic: the same views give the same decisions."""

    name: str
    every_iteration: bool  # True: asked before each iteration; False: once per decision interval

    def reset(self, view: View) -> None:
        """Called once at the start of a run, before the first decision."""
        ...

    def decide(self, view: View) -> np.ndarray:
        """The decision from now on: a 0-d array of `DECISION`."""
        ...
