"""One run of a policy on the surrogate engine over one trace, with its timeline and accounts."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from flexirl.policies.interface.policy import Policy
from flexirl.runtime.profile.engine import EngineProfile
from flexirl.runtime.scheduler.accounts import Prices, Snapshot, account
from flexirl.runtime.scheduler.looking import Lookout
from flexirl.runtime.scheduler.state import State, new_states
from flexirl.runtime.simulator import surrogate
from flexirl.workloads.slo import PATIENCE, SLO
from flexirl.workloads.trace import DEFERRED, IMMEDIATE, Trace

# One row per decision, or per TIMELINE_STEP_S where decisions are denser.
TIMELINE = np.dtype(
    [
        ("now_s", "f8"),
        ("immediate_waiting", "i4"),
        ("deferred_waiting", "i4"),
        ("immediate_running", "i4"),
        ("deferred_running", "i4"),
        (
            "immediate_kv_share",
            "f4",
        ),  # of the KV cache: in use; a block that several share counts for all of them alike
        ("deferred_kv_share", "f4"),
        ("immediate_idle_share", "f4"),  # of the KV cache: kept for it, and in use by nobody
        ("deferred_idle_share", "f4"),
        ("prefill_tokens", "i4"),  # of the last iteration
        ("decode_sequences", "i4"),
        ("preemptions", "i4"),  # since the start
    ]
)
TIMELINE_STEP_S = 0.2


@dataclass(frozen=True)
class Run:
    """What came of a run: `figures` are the leaderboard's, `timeline` an array of `TIMELINE`, `state` the end."""

    figures: dict[str, float | int | None]
    timeline: np.ndarray
    state: State


def start(engine: EngineProfile, trace: Trace, seed: int, patience: float = PATIENCE) -> State:
    """A surrogate engine at the start of a trace; patience: see `SLO`."""
    states = new_states(1, engine, max(len(trace), 1), max(trace.num_tenants, 1), len(trace.contents))
    state = State(*(array[0] for array in states))
    state.contents[:] = trace.contents
    surrogate.start(state, trace.rows, seed, patience)
    return state


def simulate(
    policy: Policy,
    engine: EngineProfile,
    trace: Trace,
    slo: SLO,
    duration_s: float,
    warmup_s: float = 0.0,
    interval_s: float = 0.2,
    seed: int = 0,
    prices: Prices | None = None,
) -> Run:
    """Runs `policy` for `duration_s` simulated seconds; the first `warmup_s` are left out of the accounts.

    interval_s: seconds between decisions, for policies that are not asked every iteration; seed: of the step noise.
    """
    began = time.perf_counter()
    state = start(engine, trace, seed, slo.patience)
    lookout = Lookout(state, slo)
    view = lookout.view
    policy.reset(view)
    now_s = 0.0
    before: Snapshot | None = None
    timeline: list[tuple[float, ...]] = []
    decisions = 0
    while now_s < duration_s:
        if before is None and now_s >= warmup_s:
            before = Snapshot.of(state)
        if not timeline or now_s >= timeline[-1][0] + TIMELINE_STEP_S * 0.999:
            timeline.append(timeline_row(state))
        state.decision[0] = policy.decide(lookout.look())
        if policy.every_iteration:
            surrogate.advance(state, trace.rows, duration_s, 1)
        else:
            decisions += 1
            until_s = min(decisions * interval_s, duration_s)
            surrogate.advance(state, trace.rows, until_s, 0)
            decisions = max(decisions, int(state.scheduler["now_s"][0] / interval_s))
        now_s = float(state.scheduler["now_s"][0])
    timeline.append(timeline_row(state))
    figures = account(state, before or Snapshot.of(state), warmup_s, prices or Prices())
    figures["wall_s"] = time.perf_counter() - began
    return Run(figures, np.array(timeline, dtype=TIMELINE), state)


def timeline_row(state: State) -> tuple[float, ...]:
    """How an engine stands now, in the order of `TIMELINE`."""
    classes, batch = state.classes, state.batch[0]
    total = float(state.engine["kv_blocks"][0])
    held = float(classes["kv_blocks"].sum())
    used_share = (total - float(state.scheduler["free_blocks"][0])) / total
    return (
        float(state.scheduler["now_s"][0]),
        *(int(classes["waiting"][c]) for c in (IMMEDIATE, DEFERRED)),
        *(int(classes["running"][c]) for c in (IMMEDIATE, DEFERRED)),
        *(used_share * classes["kv_blocks"][c] / held if held else 0.0 for c in (IMMEDIATE, DEFERRED)),
        *(classes["idle_blocks"][c] / total for c in (IMMEDIATE, DEFERRED)),
        int(batch["prefill_tokens"]),
        int(batch["decode_sequences"]),
        int(classes["preemptions"].sum()),
    )
