"""One run of a policy on the live engine over one trace: what `simulation.simulate` is on the surrogate."""

from __future__ import annotations

import time

import numpy as np

from flexirl.errors import UserError
from flexirl.policies.interface.policy import Policy
from flexirl.runtime.live.clock import VirtualClock
from flexirl.runtime.live.engine import LiveEngine
from flexirl.runtime.live.executor import Executor
from flexirl.runtime.live.options import Options
from flexirl.runtime.live.random_prompts import draw_prompt
from flexirl.runtime.live.requests import Request
from flexirl.runtime.live.sampling import Sampling
from flexirl.runtime.live.step import Step
from flexirl.runtime.scheduler.accounts import Prices, Snapshot, account
from flexirl.runtime.simulator.simulation import TIMELINE, TIMELINE_STEP_S, Run, timeline_row
from flexirl.workloads.slo import SLO
from flexirl.workloads.trace import Trace

_ALL_TOKENS = Sampling(ignore_eos=True)  # outputs are as long as the trace has them


def run_live(
    policy: Policy,
    executor: Executor,
    trace: Trace,
    slo: SLO,
    duration_s: float,
    warmup_s: float,
    interval_s: float,
    seed: int,
    prices: Prices,
) -> Run:
    """Runs `policy` on an executor for `duration_s` seconds of measured work; arguments as of `simulate`.

    Idle time is skipped; prompts are random tokens and images, drawn with `seed`, and outputs have the trace's lengths.
    What is still running at the end is cancelled after the accounts are taken, so that the executor can be used again.
    Raises UserError for requests that the executor's cache or model cannot hold.
    """
    began = time.perf_counter()
    timeline: list[tuple[float, ...]] = []
    before: list[Snapshot] = []

    def watch(step: Step) -> None:
        now_s = step.began_s + step.elapsed_s
        if not before and now_s >= warmup_s:
            before.append(Snapshot.of(step.state))
        if not timeline or now_s >= timeline[-1][0] + TIMELINE_STEP_S * 0.999:
            timeline.append(timeline_row(step.state))

    options = Options(
        clock=VirtualClock(), interval_s=interval_s, max_requests=max(len(trace), 1),
        num_tenants=max(trace.num_tenants, 1), safepoints=False, seed=seed, on_step=watch,
    )  # fmt: skip
    live = LiveEngine(executor, policy, slo, options)
    add_trace(live, executor, trace, duration_s, seed)
    if warmup_s <= 0:
        before.append(Snapshot.of(live.state))
    live.run(duration_s)
    timeline.append(timeline_row(live.state))
    figures = account(live.state, before[0] if before else Snapshot.of(live.state), warmup_s, prices)
    figures["wall_s"] = time.perf_counter() - began
    state = type(live.state)(*(array.copy() for array in live.state))
    live.cancel_all()
    return Run(figures, np.array(timeline, dtype=TIMELINE), state)


def add_trace(live: LiveEngine, executor: Executor, trace: Trace, duration_s: float, seed: int) -> None:
    """Gives an engine the requests of a trace that arrive in its first `duration_s` seconds, with random prompts.

    Where the model takes no images, the trace's are text.
    Raises UserError for requests that the executor's cache or model cannot hold.
    """
    longest = int(executor.profile.values["max_model_len"])
    too_long = int((trace.rows["prompt_tokens"] + trace.rows["max_tokens"] > longest).sum())
    if too_long:
        raise UserError(
            f"{too_long} of {len(trace)} requests of {trace.name} are longer than the {longest} tokens that the engine "
            "holds; choose shorter lengths, such as workload=tiny, or a larger model."
        )
    rng = np.random.default_rng(seed)
    for i, row in enumerate(trace.rows):
        if row["arrival_s"] < duration_s:
            prompt, images = draw_prompt(
                executor, int(row["prompt_tokens"]), int(row["num_images"]), int(row["image_tokens"]), rng
            )
            live.add_request(
                Request(
                    str(i), prompt, int(row["output_tokens"]), int(row["request_class"]), _ALL_TOKENS,
                    int(row["tenant"]), float(row["ttft_slo_s"]), float(row["tpot_slo_s"]), float(row["window_s"]),
                    int(row["predicted_output_tokens"]), float(row["arrival_s"]), images=images,
                )
            )  # fmt: skip
