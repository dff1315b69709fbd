"""The benchmark's runs: one policy in one scenario each, over processes, remembered on disk by what they depend on."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

import flexirl
from flexirl.benchmarks.bound import upper_bound
from flexirl.benchmarks.suites import Cell, composed
from flexirl.compile_cache import sources
from flexirl.experiments.comparison import TuningEpisodes, episodes, row_of, run_policy
from flexirl.experiments.configuration import load_task
from flexirl.policies.heuristics.base import RULES, tune
from flexirl.policies.registry import make_policy
from flexirl.policies.rules import load_rule_spec, rule_names
from flexirl.progress import progress_bar
from flexirl.runtime.scheduler.accounts import latencies
from flexirl.runtime.simulator.simulation import Run
from flexirl.workloads.trace import IMMEDIATE

UPPER_BOUND = "upper_bound"  # in the place of a policy: the most that any could earn
TIMELINE_ROWS, SERIES_BINS = 300, 30
PACKAGE = Path(flexirl.__file__).parent
BOUND = "flexirl.benchmarks.bound"  # which runs of policies do not depend on

Result = dict[str, Any]


def code() -> list[str]:
    """Modules that, with all they import, make a result: this one, and the rules, which nobody imports by name."""
    return [__name__, *sorted({rule.__module__ for rule in RULES.values()})]


@dataclass(frozen=True)
class Job:
    """One policy in one scenario, on all its seeds; its knobs, where open, are searched for this scenario."""

    cell: Cell
    policy: str
    seed: int

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The scenario's configuration: what `flexirl.evaluate` would run on."""
        return _settings(self.cell.overrides)

    @cached_property
    def key(self) -> str:
        """A hash of everything the result depends on."""
        workload, engine = self.settings["workload"], str(self.settings["engine"]["profile"])
        parts = {
            "settings": self.settings,
            "files": [_digest(path) for path in (workload.get("path"), engine) if path and Path(path).is_file()],
            "policy": _policy_identity(self.policy),
            "seeds": [self.seed, self.cell.seeds],
            "version": flexirl.__version__,
            "code": sources().stamp(*code(), later=True, without=() if self.policy == UPPER_BOUND else (BOUND,)),
            "data": _data_digest(),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def run(self) -> Result:
        """Rows of the leaderboard, one per seed, and the course of the first seed; or the bounds, one per seed."""
        task = load_task(OmegaConf.create(self.settings))
        if self.policy == UPPER_BOUND:
            return {"upper_bounds": [upper_bound(task, trace) for trace in episodes(task, self.cell.seeds, self.seed)]}
        policy = make_policy(self.policy)
        ready = tune(policy, TuningEpisodes(task, self.seed), task.slo, self.seed)
        rows, course = [], {}
        for i, trace in enumerate(episodes(task, self.cell.seeds, self.seed)):
            run = run_policy(ready, task, trace, i)
            rows.append(row_of(policy, task, trace, i, run))
            if i == 0:
                course = course_of(run)
        return {"rows": rows, **course}


@cache
def _settings(overrides: tuple[str, ...]) -> dict[str, Any]:
    config = composed(overrides)
    return {
        group: OmegaConf.to_container(config[group], resolve=True)
        for group in ("workload", "engine", "slo", "reward", "env")
    }


def _policy_identity(name: str) -> Any:
    """A rule's knobs, the content of a file, or the name of what comes with the package, whose content is hashed."""
    if name in rule_names():
        return [name, load_rule_spec(name)]
    return _digest(name) if Path(name).is_file() else name


@lru_cache
def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@cache
def _data_digest() -> str:
    """A hash of the package's files beside its code: engine profiles, networks, knobs of rules."""
    files = [path for path in PACKAGE.rglob("*") if path.suffix in (".json", ".onnx")]
    digest = hashlib.sha256()
    for path in sorted([*files, *(PACKAGE / "conf" / "policy").glob("*.yaml")]):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def course_of(run: Run) -> Result:
    """A run over time, for figures: its timeline thinned out, and mean latencies by time of arrival.

    timeline: columns of `simulation.TIMELINE` as lists; series: time_s (middle of a bin), ttft_s and tpot_s (mean over
    the immediate requests that arrived in it, None where there is none).
    """
    chosen = np.unique(np.linspace(0, len(run.timeline) - 1, TIMELINE_ROWS).astype(int))
    timeline = {name: run.timeline[name][chosen].tolist() for name in run.timeline.dtype.names or ()}
    end_s = float(run.state.scheduler["now_s"][0])
    requests = run.state.requests
    requests = requests[(requests["request_class"] == IMMEDIATE) & (requests["status"] != 0)]
    edges = np.linspace(0, end_s, SERIES_BINS + 1)
    bins = np.clip(np.digitize(requests["arrival_s"], edges) - 1, 0, SERIES_BINS - 1)
    series: dict[str, list[float | None]] = {
        "time_s": ((edges[1:] + edges[:-1]) / 2).tolist(),
        "ttft_s": [],
        "tpot_s": [],
    }
    for i in range(SERIES_BINS):
        ttft_s, tpot_s, _ = latencies(requests[bins == i], end_s)
        series["ttft_s"].append(float(ttft_s.mean()) if len(ttft_s) else None)
        series["tpot_s"].append(float(tpot_s.mean()) if len(tpot_s) else None)
    return {"timeline": timeline, "series": series}


def run_all(jobs: Sequence[Job], cache: Path, processes: int, progress: bool = True) -> list[Result]:
    """The results of all jobs in their order: from the cache, or run now and put into it one by one.

    Interrupted, it leaves the cache with what has finished and raises KeyboardInterrupt.
    """
    cache.mkdir(parents=True, exist_ok=True)
    missing = {job.key: job for job in jobs if not _place(cache, job).is_file()}
    with progress_bar(len(jobs), " runs", progress, initial=len(jobs) - len(missing)) as bar:
        for job in _work_off(list(missing.values()), cache, processes):
            bar.set_postfix_str(f"{job.cell.suite}: {job.policy}")
            bar.update()
    return [json.loads(_place(cache, job).read_text()) for job in jobs]


def _work_off(jobs: list[Job], cache: Path, processes: int) -> Iterator[Job]:
    """Runs jobs in any order, each as it is done."""
    run = partial(_run_into, cache)
    if processes == 1 or len(jobs) <= 1:
        yield from map(run, jobs)
        return
    # Spawned, not forked: compiled code and PyTorch keep threads.
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(processes, len(jobs)), _start_worker) as pool:  # leaving it ends the workers
        yield from pool.imap_unordered(run, jobs)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    torch.set_num_threads(1)


def _run_into(cache: Path, job: Job) -> Job:
    document = {"cell": asdict(job.cell), "policy": job.policy, **job.run()}
    place = _place(cache, job)
    partly = place.with_suffix(f".{os.getpid()}")
    partly.write_text(json.dumps(document))
    partly.replace(place)  # at once: an interrupted run leaves no half result
    return job


def _place(cache: Path, job: Job) -> Path:
    return cache / f"{job.key}.json"
