"""Program: compares policies on the same arrivals: `python -m flexirl.evaluate policies='[hygen,PATH.onnx]'`.

On the surrogate, on a live engine (`executor=live model=tiny`), or on both, side by side (`compare=live,surrogate`, the
surrogate at the pace that this process has; `compare=live,live` shows how far two runs on the machine differ).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from flexirl.errors import UserError
from flexirl.experiments.answer import answer_in_words, workload_in_words
from flexirl.experiments.comparison import (
    Row,
    Runner,
    compare,
    on_live,
    on_surrogate,
    on_surrogate_at,
    table,
    write_leaderboard,
)
from flexirl.experiments.configuration import load_executor, load_task, load_task_on
from flexirl.experiments.fidelity import rank_agreement, side_by_side, write_fidelity
from flexirl.experiments.fidelity import table as fidelity_table
from flexirl.experiments.plots import plot_comparison, plot_fidelity, plot_timeline
from flexirl.experiments.program import output_folder
from flexirl.experiments.records import record_run
from flexirl.experiments.seeds import TUNING_SEED
from flexirl.experiments.values import count_of, flag_of, names_of, seed_of
from flexirl.policies.registry import check_names, make_policy
from flexirl.policies.rules import save_rule

ENGINES = ("surrogate", "live")
PACE_RULE = "qoserve"  # decides while the machine's pace is measured


def run(config: DictConfig) -> None:
    """Compares, prints and writes; raises UserError for bad configuration."""
    folder = output_folder()
    names = names_of(config.policies, "policies")
    if not names:
        raise UserError("policies=[] names nobody to compare; give at least one.")
    check_names(names)
    seeds, seed = count_of(config.seeds, "seeds"), seed_of(config.seed)
    progress = flag_of(config.progress, "progress")
    engines = [str(config.executor)] if config.compare is None else str(config.compare).split(",")
    for engine in engines:
        if engine not in ENGINES:
            raise UserError(f"{engine} is no engine to run on; choose from {', '.join(ENGINES)}.")
    if len(engines) > 2:
        raise UserError(f"compare={config.compare} names {len(engines)} engines; give two, such as live,surrogate.")
    given = {make_policy(name).name: Path(name) for name in names if Path(name).suffix}
    task = load_task(config)
    record_run(config, "evaluate", folder)
    for sentence in workload_in_words(task):
        print(sentence)
    tuning = None
    if config.tuning.path is not None:
        tuning = load_task_on(config, config.tuning.path)
    runners: dict[str, Runner] = {"surrogate": on_surrogate}
    executor = None
    if "live" in engines:
        from flexirl.runtime.fitting.calibration import measure_pace  # PyTorch with it

        _, executor = load_executor(config)
        task, runners["live"] = replace(task, engine=executor.profile), on_live(executor)
    comparisons: dict[str, list[Row]] = {}
    paces: list[float] = []
    for engine in engines:
        runner = runners[engine]
        if executor is not None and len(set(engines)) > 1:
            # Before each of the two; the surrogate, if it comes second, takes the mean.
            paces.append(measure_pace(executor, make_policy(PACE_RULE), task.draw(TUNING_SEED + seed), seed))
            runner = runner if engine == "live" else on_surrogate_at(float(np.mean(paces)))
        comparison = compare(task, names, seeds, tuning, seed, runner, progress)
        label = f"{engine} again" if engine in comparisons else engine
        comparisons[label] = comparison.rows
        place = folder / label.replace(" ", "_") if len(engines) > 1 else folder
        place.mkdir(exist_ok=True)
        write_leaderboard(comparison.rows, place)
        saved = {name: place / f"{name}.yaml" for name in comparison.searched}
        for name, rule in comparison.searched.items():
            save_rule(rule, saved[name])
        plot_comparison(comparison.rows, place / "comparison.png")
        for name, result in comparison.first_runs.items():
            plot_timeline(result.timeline, name, place / f"timeline_{name.replace(':', '_')}.png")
        print(table(comparison.rows) if len(engines) == 1 else f"{label}\n{table(comparison.rows)}\n")
    if len(comparisons) == 2:
        labels, both = list(comparisons), list(comparisons.values())
        compared, tau = side_by_side(*both), rank_agreement(*both)
        write_fidelity(compared, labels, tau, paces, folder)
        plot_fidelity(compared, labels, folder / "fidelity.png")
        if paces:
            print(f"iterations took {' and then '.join(f'{pace:.3f}' for pace in paces)} times what the profile says")
        print(f"{fidelity_table(compared, labels)}\norders of the policies by revenue: Kendall's tau {tau:.2f}")
    else:
        for sentence in answer_in_words(comparison.rows, {**given, **saved}):
            print(sentence)
    print(f"written to {folder}")
