"""The same seed gives the same run, in another process too; members of one State do not touch each other."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
from toys import ToyRun, decision_with, heavy_trace, toy_engine

from flexirl.runtime.scheduler.state import State, new_states
from flexirl.runtime.simulator import surrogate

NOISY = toy_engine(kv_blocks=40, max_running=12, max_model_len=100, noise=0.1, prefix_caching=1)


def digest(state: State) -> str:
    """A hash of every field of every record."""
    sha = hashlib.sha256()
    for array in state:
        for column in array.dtype.names or (None,):
            sha.update(np.ascontiguousarray(array if column is None else array[column]).tobytes())
    return sha.hexdigest()


def digest_of_run(seed: int) -> str:
    """The hash at the end of a noisy run."""
    run = ToyRun(NOISY, heavy_trace(seed=2), seed=seed)
    run.advance(6.0)
    return digest(run.state)


def test_same_seed_same_run_in_another_process() -> None:
    here = Path(__file__).parent
    code = "import test_determinism; print(test_determinism.digest_of_run(4))"
    folders = [str(folder) for folder in (here, here.parents[1], here.parents[2])]
    path = f"import sys; sys.path[:0] = {folders!r}; "
    outputs = {subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, check=True).stdout
               for _ in range(2)}  # fmt: skip
    assert {output.strip() for output in outputs} == {digest_of_run(4)}


def test_other_seeds_are_other_runs_under_noise_only() -> None:
    assert len({digest_of_run(seed) for seed in range(5)}) == 5
    quiet = NOISY.replace(noise=0.0)
    runs = [ToyRun(quiet, heavy_trace(seed=2), seed=seed) for seed in (0, 1)]
    for run in runs:
        run.advance(6.0)
    assert runs[0].now_s == runs[1].now_s and runs[0]["finish_s"] == runs[1]["finish_s"]


def test_noise_has_median_one_and_is_cut() -> None:
    run = ToyRun(toy_engine(per_token_s=0.0, noise=0.1, max_model_len=4000, kv_blocks=1000), heavy_trace(1, 1))
    rows = run.trace.rows
    rows["prompt_tokens"], rows["output_tokens"], rows["max_tokens"], rows["arrival_s"] = 1, 3000, 3000, 0
    rows["ttft_slo_s"] = rows["tpot_slo_s"] = rows["window_s"] = np.inf
    run = ToyRun(toy_engine(per_token_s=0.0, noise=0.1, max_model_len=4000, kv_blocks=1000), run.trace)
    times = [0.0]
    for _ in range(2500):
        run.advance(iterations=1)
        times.append(run.now_s)
    logs = np.log(np.diff(times) * 64)  # the iteration takes 1 / 64 s without noise
    assert abs(np.median(logs)) < 0.01 and abs(logs.std() - 0.1) < 0.005 and abs(logs).max() <= 0.3 + 1e-9


def test_members_do_not_interact() -> None:
    """Engines of one State, advanced in turns on different traces, end as each does alone."""
    traces = [heavy_trace(seed) for seed in range(3)]
    states = new_states(3, NOISY, len(traces[0]), 3)
    members = [State(*(array[m] for array in states)) for m in range(3)]
    alone = [ToyRun(NOISY, trace, seed=m, discipline=m) for m, trace in enumerate(traces)]
    for m, (member, trace) in enumerate(zip(members, traces, strict=True)):
        surrogate.start(member, trace.rows, m, 4.0)
        member.decision[0] = decision_with(discipline=m)
    for until_s in np.arange(0.5, 5.0, 0.5).tolist():
        for member, trace in zip(members, traces, strict=True):
            surrogate.advance(member, trace.rows, until_s, 0)
    for member, run in zip(members, alone, strict=True):
        for until_s in np.arange(0.5, 5.0, 0.5).tolist():
            run.advance(until_s)
        assert digest(member) == digest(run.state)


def test_a_state_can_be_started_again() -> None:
    """A used state, started on another trace, runs as a new one does."""
    first, second = heavy_trace(7), heavy_trace(8)
    used = ToyRun(NOISY, first, seed=3)
    used.advance(3.0)
    surrogate.start(used.state, second.rows, 5, 4.0)
    fresh = ToyRun(NOISY, second, seed=5)
    for run in (used, fresh):
        surrogate.advance(run.state, second.rows, 200.0, 0)
    assert used["finish_s"] == fresh["finish_s"] and used["missed"] == fresh["missed"]
    assert all(
        used.state.classes[name].tolist() == fresh.state.classes[name].tolist()
        for name in used.state.classes.dtype.names or ()
    )
    assert np.array_equal(used.state.itl_histogram, fresh.state.itl_histogram)
