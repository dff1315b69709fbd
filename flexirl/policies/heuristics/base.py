"""What hand-written policies share: knobs as fields, one decision array that the rule fills in, a name to be found by.

A rule's knobs are the fields of a frozen dataclass; those of the rules here have their values in
`conf/policy/<name>.yaml` and nowhere else. What a rule remembers during a run lives in arrays made by `reset`, so one
policy object may serve many runs in turn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from flexirl.errors import UserError
from flexirl.policies.interface.decision import DEADLINE, default_decision
from flexirl.policies.interface.policy import Policy
from flexirl.policies.interface.view import View
from flexirl.runtime.profile.step_time import BATCH, step_time
from flexirl.workloads.slo import SLO
from flexirl.workloads.trace import DEFERRED, IMMEDIATE

TOKEN_TILE = 128  # tokens: matrix multiplications run in tiles of this size, so budgets are multiples of it
LEAST_TOKEN_BUDGET = 512  # Sarathi-Serve's budget for strict promises; a smaller one starves prefill


RULES: dict[str, type[Heuristic]] = {}  # by name: every rule that has been defined, whoever defined it


class Episodes(Protocol):
    """The episodes of a scenario on which open knobs are searched, the same ones every time."""

    def attainment(self, policy: Policy) -> float:
        """Share of immediate promises that a policy keeps, averaged over the episodes."""
        ...

    def worths(self, settings: np.ndarray) -> np.ndarray:
        """Worth of constant dial settings in any unit, averaged over the episodes: (n, dials) to (n,)."""
        ...


@dataclass(frozen=True)
class Heuristic:
    """A rule written by hand. A constant one overrides `prepare`; one that watches the engine `decide` as well.

    A subclass with a `name` of its own is known by it from then on.
    """

    name = ""
    every_iteration = False

    # One array for the whole run: whoever asks copies it into the state at once, and making one costs more than that.
    _decision: np.ndarray = field(default_factory=default_decision, init=False, repr=False, compare=False)

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__:
            RULES[cls.name] = cls

    def tuned(self, episodes: Episodes, slo: SLO, seed: int) -> Heuristic:
        """The rule ready to run on such episodes: with its open knobs searched, or as it is where none is open."""
        return self

    def reset(self, view: View) -> None:
        """See `Policy.reset`."""
        self._decision[()] = default_decision()
        self.prepare(self._decision, view)

    def prepare(self, decision: np.ndarray, view: View) -> None:
        """Changes the default decision to what the rule holds on to all the time."""

    def decide(self, view: View) -> np.ndarray:
        """See `Policy.decide`."""
        return self._decision


@dataclass(frozen=True)
class ChunkedPrefill(Heuristic):
    """A rule whose iterations are bounded by a token budget.

    token_budget: tokens per iteration; "engine" takes the engine's own, "slo" the largest that keeps the promised time
    per output token, which is how an operator, and Sarathi-Serve's profiling, would set it.
    """

    token_budget: int | str

    def __post_init__(self) -> None:
        tokens = self.token_budget
        ok = tokens in ("engine", "slo") if isinstance(tokens, str) else tokens >= 1
        require(ok, "token_budget", tokens, "give a number of tokens from 1, engine or slo")

    def prepare(self, decision: np.ndarray, view: View) -> None:
        """See `Heuristic.prepare`."""
        if self.token_budget == "slo":
            decision["token_budget"] = slo_token_budget(view.engine, view.slo)
        elif self.token_budget != "engine":
            decision["token_budget"] = self.token_budget


def slo_token_budget(engine: np.ndarray, slo: SLO) -> int:
    """The largest multiple of TOKEN_TILE whose iteration stays within the promised time per output token.

    By the step-time model, with all seats decoding over a full cache beside one chunk. Not below LEAST_TOKEN_BUDGET,
    since some engines cannot keep a promise with a full cache at all.
    """
    batch = np.zeros((), dtype=BATCH)
    seats = int(engine["max_running"])
    batch["decode_sequences"] = batch["sampled_sequences"] = seats
    batch["decode_context"] = float(engine["kv_blocks"]) * float(engine["block_size"])
    budget = LEAST_TOKEN_BUDGET
    for tokens in range(LEAST_TOKEN_BUDGET, int(engine["max_tokens_per_step"]) + 1, TOKEN_TILE):
        chunk = max(tokens - seats, 1)
        batch["prefill_tokens"], batch["chunk_context"] = chunk, 0.5 * chunk * chunk
        if step_time(engine, batch[()]) > slo.tpot_s:
            break
        budget = tokens
    return budget


def require(ok: bool, knob: str, value: object, rule: str) -> None:
    """Raises UserError, naming the knob, unless `ok`."""
    if not ok:
        raise UserError(f"policy knob {knob}={value!r} is out of range; {rule}.")


def deferred_head_first(view: View) -> bool:
    """True if the head of the deferred queue is more urgent than the head of the immediate one.

    Both queues are sorted by key, so heads compare as in one merged queue once both are in the DEADLINE order; until
    the decision that sorts them is in force, no deferred request goes first.
    """
    immediate, deferred = view.group(IMMEDIATE), view.group(DEFERRED)
    if not (immediate["order"] == deferred["order"] == DEADLINE and immediate["head"] and deferred["head"]):
        return False
    return bool(deferred["head_key"] < immediate["head_key"])


def tune(policy: Policy, episodes: Episodes, slo: SLO, seed: int) -> Policy:
    """The policy ready to run: a rule with its open knobs searched, any other as it is."""
    return policy.tuned(episodes, slo, seed) if isinstance(policy, Heuristic) else policy
