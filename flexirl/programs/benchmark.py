"""Program: compares policies over a suite of scenarios: `python -m flexirl.benchmark suite=bursts`.

Runs in parallel, goes on where it was interrupted, and writes report.html, results.json, tables and figures.
"""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from flexirl.benchmarks.report import write_report
from flexirl.benchmarks.results import collect
from flexirl.benchmarks.runs import UPPER_BOUND, Job, run_all
from flexirl.benchmarks.suites import expand
from flexirl.cores import available_cores
from flexirl.errors import UserError
from flexirl.experiments.comparison import ANCHORS
from flexirl.experiments.program import output_folder
from flexirl.experiments.values import count_of, names_of, seed_of
from flexirl.policies.registry import check_names


def run(config: DictConfig) -> None:
    """Expands, runs and reports; raises UserError for bad configuration."""
    folder = output_folder()
    names = list(dict.fromkeys([*names_of(config.policies, "policies"), *ANCHORS]))
    check_names(names)
    seed = seed_of(config.seed)
    processes = count_of(available_cores() if config.processes is None else config.processes, "processes")
    cells, skipped = expand(config.suite, config.seeds)
    if not cells:
        raise UserError(f"suite={config.suite.name} has no scenarios; {' '.join(skipped) or 'give it grids.'}")
    for sentence in skipped:
        print(sentence, file=sys.stderr)
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    jobs = [Job(cell, name, seed) for cell in cells for name in names]
    if config.upper_bound:
        jobs += [Job(cell, UPPER_BOUND, seed) for cell in cells]
    try:
        results = run_all(jobs, Path(config.cache), processes, config.progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on from here") from None
    benchmark = collect(jobs, results, skipped)
    write_report(benchmark, folder)
    print(f"written to {folder}")
