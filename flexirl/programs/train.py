"""Program: trains an agent, compares it with the heuristics, exports it: `python -m flexirl.train`.

On the surrogate, or (`env=live model=tiny`) on a live engine.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from stable_baselines3.common.base_class import BaseAlgorithm
from torch.utils.tensorboard import SummaryWriter

from flexirl.envs.fleet import Task
from flexirl.envs.sb3 import BatchingVecEnv
from flexirl.experiments.answer import answer_in_words, training_in_words, workload_in_words
from flexirl.experiments.comparison import Runner, compare, table, write_leaderboard
from flexirl.experiments.configuration import held_out_task, load_task, load_tasks
from flexirl.experiments.plots import plot_comparison, plot_history, plot_timeline
from flexirl.experiments.program import output_folder
from flexirl.experiments.records import command, record_run
from flexirl.experiments.seeds import VALIDATION_SEED
from flexirl.experiments.training_run import load_agent, load_engines, warm_start
from flexirl.experiments.values import count_of, flag_of, names_of, seed_of
from flexirl.policies.registry import check_names
from flexirl.policies.training.export import export
from flexirl.policies.training.probing import Probing
from flexirl.policies.training.training import Training


def run(config: DictConfig) -> float:
    """Trains, compares, exports; returns the best validation worth, so that sweeps can rank runs."""
    folder = output_folder()
    seed = seed_of(config.seed)
    total_steps = count_of(config.total_steps, "total_steps", least=0)
    every_steps = count_of(config.validation.every_steps, "validation.every_steps")
    count_of(config.seeds, "seeds")
    progress = flag_of(config.progress, "progress")
    check_names(names_of(config.policies, "policies"))
    task, tasks = load_task(config), load_tasks(config)
    held_out = held_out_task(config, task)
    record_run(config, "train", folder)
    for sentence in workload_in_words(task):
        print(sentence)
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
    watching = Training(engines.validation, folder, total_steps, every_steps, VALIDATION_SEED + seed, progress)
    print(f"{task.scenario.name} on {task.engine.name}: {task.reward.name} reward optimises {task.reward.optimises}")
    try:
        if task.action == "dials" and config.agent.warm_start and config.resume is None:
            warm_start(agent, tasks, seed, progress)
        agent.learn(total_steps, callback=watching, reset_num_timesteps=config.resume is None)
    except KeyboardInterrupt:
        if watching.history:
            agent.save(folder / "policy.zip")
        if (folder / "policy.zip").is_file():
            raise KeyboardInterrupt(f"go on with resume={folder / 'policy.zip'}") from None
        raise
    env.close()
    best = type(agent).load(folder / "best.zip", device="cpu")
    if isinstance(best, Probing):
        best.lessons = []  # of use in the middle of a training only
    best.save(folder / "policy.zip")
    report(config, folder, best, watching, task, held_out, engines.runner)
    return watching.best["worth_share"]


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
    from matplotlib.image import imread  # a second, for which training need not wait

    plot_history(watching.history, folder / "reward.png")
    names = names_of(config.policies, "policies")
    if config.agent.algorithm == "recurrent_ppo":
        print("a recurrent agent is not exported: its memory lives outside the network; policy.zip holds it")
    else:
        metadata = {
            "action": task.action, "immediate_order": task.immediate_order, "deferred_order": task.deferred_order,
            "interval_s": task.interval_s, "command": command("train"),
            "training": OmegaConf.to_container(config, resolve=True), "validation": watching.best,
        }  # fmt: skip
        export(agent, folder / "policy.onnx", metadata)
        names.insert(0, str(folder / "policy.onnx"))
    held_out_scenario = replace(held_out, action=task.action)
    comparison = compare(
        held_out_scenario, names, int(config.seeds), task, seed_of(config.seed), runner, config.progress
    )
    write_leaderboard(comparison.rows, folder)
    plot_comparison(comparison.rows, folder / "comparison.png")
    first = next(iter(comparison.first_runs))
    plot_timeline(comparison.first_runs[first].timeline, first, folder / "timeline.png")
    with SummaryWriter(str(folder)) as tensorboard:
        for picture in ("reward", "comparison", "timeline"):
            tensorboard.add_image(picture, imread(folder / f"{picture}.png"), dataformats="HWC")
    print(table(comparison.rows))
    print(training_in_words(watching.history))
    for sentence in answer_in_words(comparison.rows, {str(comparison.rows[0]["policy"]): folder / "policy.onnx"}):
        print(sentence)
    best = json.dumps({"best_validation_revenue_per_s": watching.best["revenue_per_s"], "folder": str(folder)})
    (folder / "summary.json").write_text(best + "\n")
    print(f"written to {folder}")
