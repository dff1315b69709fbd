"""Program: trains an agent, compares it with the heuristics, exports it: `python -m flexirl.train`.

On the surrogate, or (`env=live model=tiny`) on a live engine.
"""

from __future__ import annotations

import json
import shlex
import sys
import zipfile
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.image import imread
from omegaconf import DictConfig, OmegaConf
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.base_class import BaseAlgorithm
from torch.utils.tensorboard import SummaryWriter

from flexirl.envs.fleet import Fleet, Task
from flexirl.envs.vector import BatchingVecEnv
from flexirl.errors import UserError
from flexirl.experiments.comparison import (
    TUNING_SEED,
    Runner,
    compare,
    on_live,
    on_surrogate,
    table,
    worth_of_dials,
    write_leaderboard,
)
from flexirl.experiments.configuration import (
    count_of,
    load_executor,
    load_live_fleet,
    load_task,
    load_tasks,
    load_validation_tasks,
    names_of,
    seed_of,
)
from flexirl.experiments.plots import plot_comparison, plot_history, plot_timeline
from flexirl.experiments.program import output_folder, run_program
from flexirl.policies.heuristics.fixed_dials import search_dials
from flexirl.policies.interface.action import NUM_DIALS
from flexirl.policies.registry import check_names
from flexirl.policies.training import probing
from flexirl.policies.training.agents import ALGORITHMS, make_agent, start_at
from flexirl.policies.training.export import export
from flexirl.policies.training.training import Training

VALIDATION_SEED = 250_000
LESSONS = "lessons.npz"  # beside policy.zip while probing goes on
TUNED_ON = 16  # tasks of a mixture on which the constant dials to start from are searched


def command() -> str:
    """What started this run."""
    return "python -m flexirl.train " + shlex.join(sys.argv[1:])


def record_run(config: DictConfig, folder: Path) -> None:
    """What it takes to repeat the run: configuration, exact command, package versions."""
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    (folder / "command.txt").write_text(command() + "\n")
    versions = sorted(f"{d.metadata['Name']}=={d.version}" for d in distributions())
    (folder / "packages.txt").write_text("\n".join(dict.fromkeys(versions)) + "\n")


def held_out_task(config: DictConfig, task: Task) -> Task:
    """The task to validate and compare on: the held-out part of a recorded trace, else the same with other seeds."""
    path = config.validation.path
    if path is None and config.workload.immediate.kind == "trace":
        recorded = Path(config.workload.path)
        beside = recorded.with_name(recorded.name.replace(".csv", ".val.csv", 1))
        path = str(beside) if beside != recorded and beside.is_file() else None
    if path is None:
        return task
    changed = OmegaConf.merge(config, {"workload": {"path": path}})
    held_out = load_task(changed)  # type: ignore[arg-type]
    duration_s = held_out.scenario.duration_s
    if duration_s is not None and held_out.scenario.immediate.length_s(None, held_out.service_time_s) < duration_s:
        # Too short for a window of that length: all of it.
        held_out = replace(held_out, scenario=replace(held_out.scenario, duration_s=None))
    return held_out


@dataclass(frozen=True)
class Engines:
    """What an agent is prepared, trained and validated on, and what runs policies for the comparison."""

    preparation: Fleet  # on which observations are normalised: the surrogate, since that costs no time
    training: Fleet
    validation: Fleet
    runner: Runner


def load_engines(config: DictConfig, tasks: list[Task], held_out: Task) -> Engines:
    """The engines of `env.executor`; a mixture is validated on further tasks of its kind.

    Raises UserError for bad figures, or a model that cannot be loaded.
    """
    members, group_size, traces = (
        count_of(config.env[name], f"env.{name}") for name in ("members", "group_size", "traces")
    )
    episodes = count_of(config.validation.members, "validation.members")
    if config.env.executor == "surrogate":
        training = Fleet(tasks, members, group_size, traces)
        watched = load_validation_tasks(config) if len(tasks) > 1 else held_out
        return Engines(training, training, Fleet(watched, episodes, 1, episodes), on_surrogate)
    if config.env.executor != "live":
        raise UserError(f"env.executor={config.env.executor} is no engine to train on; choose surrogate or live.")
    if members != 1 or episodes != 1:
        raise UserError("A live engine is one engine; leave env.members and validation.members at 1.")
    if len(tasks) > 1:
        raise UserError("A live engine is one engine; train a mixture on the surrogate, with env.executor=surrogate.")
    model, executor = load_executor(config)
    training = load_live_fleet(config, tasks[0], executor)
    # Validation comes in the middle of a training episode, whose keys and values must stay where they are.
    judge = type(executor)(model, executor.profile)
    preparation = Fleet(training.task, 1, 1, traces)
    return Engines(preparation, training, load_live_fleet(config, held_out, judge), on_live(judge))


def load_agent(config: DictConfig, env: BatchingVecEnv, log_folder: Path, seed: int) -> BaseAlgorithm:
    """A new agent, or the one of `resume`."""
    settings: dict[str, Any] = OmegaConf.to_container(config.agent, resolve=True)  # type: ignore[assignment]
    if config.resume is None:
        return make_agent(settings, env, int(config.env.group_size), seed, log_folder)
    if not Path(config.resume).is_file():
        raise UserError(f"resume={config.resume} does not exist; give a run's policy.zip.")
    grouping: dict[str, Any] = {}
    if settings["algorithm"] == "grouped_ppo":  # the saved agent's groups may have been others
        size = int(config.env.group_size)
        grouping = {"group_size": size, "rollout_buffer_kwargs": {"group_size": size}}
    try:
        agent = ALGORITHMS[settings["algorithm"]].load(config.resume, env=env, device="cpu", **grouping)
    except (ValueError, KeyError, AssertionError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"resume={config.resume} cannot go on here ({error}); give the same agent and env.") from None
    agent.tensorboard_log = str(log_folder)
    return agent


def warm_start(
    agent: BaseAlgorithm, tasks: list[Task], seed: int, folder: Path, resume: Path | None, progress: bool
) -> None:
    """Sets a new agent to the best constant dials found for all tasks; of a mixture, goes on from there by probing.

    While that goes on, `folder` holds the agent of the last round, and LESSONS beside it. resume: the agent's file; if
    LESSONS lies beside it, probing is gone on with, else nothing is left to do.
    """
    tuning_seed = TUNING_SEED + 1000 * seed
    after = probing.NOTHING
    if resume is None:
        worth = partial(worth_of_dials, tasks, episodes=max(3, len(tasks[:TUNED_ON])), seed=tuning_seed)
        dials = search_dials(np.zeros(NUM_DIALS), worth, seed)
        print(f"starting from the best constant dials found: {np.round(dials, 2).tolist()}")
        start_at(agent, dials.tolist())
    elif resume.with_name(LESSONS).is_file():
        after = probing.Progress.load(resume.with_name(LESSONS))
    else:
        return
    if len(tasks) > 1 and not isinstance(agent, RecurrentPPO):  # whose memory single observations cannot teach
        for reached in probing.improve(agent, tasks, tuning_seed, after, progress):
            agent.save(folder / "policy.zip")
            reached.save(folder / LESSONS)
        (folder / LESSONS).unlink(missing_ok=True)


def run(config: DictConfig) -> float:
    """Trains, compares, exports; returns the best validation revenue share, so that sweeps can rank runs."""
    folder = output_folder()
    seed = seed_of(config.seed)
    total_steps = count_of(config.total_steps, "total_steps", least=0)
    every_steps = count_of(config.validation.every_steps, "validation.every_steps")
    count_of(config.compare.seeds, "compare.seeds")
    check_names(names_of(config.compare.policies, "compare.policies"))
    task, tasks = load_task(config), load_tasks(config)
    held_out = held_out_task(config, task)
    record_run(config, folder)
    torch.set_num_threads(1)  # these networks are too small to share; waiting threads would rob the engines
    engines = load_engines(config, tasks, held_out)
    if len(tasks) == 1:  # else the agent is compared on the scenario of `config`
        task, held_out = engines.training.task, engines.validation.task
    env = BatchingVecEnv(engines.preparation, seed)
    agent = load_agent(config, env, folder, seed)
    if engines.training is not engines.preparation:
        env.close()
        env = BatchingVecEnv(engines.training, seed)
        agent.set_env(env)
    watching = Training(
        engines.validation, folder, total_steps, every_steps, VALIDATION_SEED + seed, bool(config.progress)
    )
    print(f"{task.scenario.name} on {task.engine.name}: {task.reward.name} reward optimises {task.reward.optimises}")
    try:
        if task.action == "dials" and config.agent.warm_start:
            resume = None if config.resume is None else Path(config.resume)
            warm_start(agent, tasks, seed, folder, resume, bool(config.progress))
        agent.learn(total_steps, callback=watching, reset_num_timesteps=config.resume is None)
    except KeyboardInterrupt:
        if watching.history:
            agent.save(folder / "policy.zip")
        if (folder / "policy.zip").is_file():
            print(f"interrupted; go on with resume={folder / 'policy.zip'}")
        raise
    env.close()
    best = type(agent).load(folder / "best.zip", device="cpu")
    best.save(folder / "policy.zip")
    report(config, folder, best, watching, task, held_out, engines.runner)
    return watching.best["revenue_share"]


def report(
    config: DictConfig,
    folder: Path,
    agent: BaseAlgorithm,
    watching: Training,
    task: Task,
    held_out: Task,
    runner: Runner,
) -> None:
    """Exports the agent, compares it, writes tables and pictures."""
    plot_history(watching.history, folder / "reward.png")
    names = names_of(config.compare.policies, "compare.policies")
    if config.agent.algorithm == "recurrent_ppo":
        print("a recurrent agent is not exported: its memory lives outside the network; policy.zip holds it")
    else:
        metadata = {
            "action": task.action, "immediate_order": task.immediate_order, "deferred_order": task.deferred_order,
            "interval_s": task.interval_s, "command": command(),
            "training": OmegaConf.to_container(config, resolve=True), "validation": watching.best,
        }  # fmt: skip
        export(agent, folder / "policy.onnx", metadata)
        names.insert(0, str(folder / "policy.onnx"))
    held_out_scenario = replace(held_out, action=task.action)
    comparison = compare(held_out_scenario, names, int(config.compare.seeds), task, seed_of(config.seed), runner)
    write_leaderboard(comparison.rows, folder)
    plot_comparison(comparison.rows, folder / "comparison.png")
    first = next(iter(comparison.first_runs))
    plot_timeline(comparison.first_runs[first].timeline, first, folder / "timeline.png")
    with SummaryWriter(str(folder)) as tensorboard:
        for picture in ("reward", "comparison", "timeline"):
            tensorboard.add_image(picture, imread(folder / f"{picture}.png"), dataformats="HWC")
    print(table(comparison.rows))
    best = json.dumps({"best_validation_revenue_per_s": watching.best["revenue_per_s"], "folder": str(folder)})
    (folder / "summary.json").write_text(best + "\n")
    print(f"written to {folder}")


if __name__ == "__main__":
    run_program("train", run)
