"""What a training run is made of: engines to prepare, train and validate on, an agent, and where it starts."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file

from flexirl.envs.fleet import Fleet, Task
from flexirl.envs.sb3 import BatchingVecEnv
from flexirl.errors import UserError
from flexirl.experiments.comparison import Runner, on_live, on_surrogate, worth_of_dials
from flexirl.experiments.configuration import load_executor, load_live_fleet, load_validation_tasks
from flexirl.experiments.seeds import TUNING_SEED
from flexirl.experiments.values import count_of
from flexirl.policies.heuristics.fixed_dials import SETTINGS_SEARCHED, search_dials
from flexirl.policies.interface.action import NUM_DIALS
from flexirl.policies.training.agents import ALGORITHMS, make_agent, start_at
from flexirl.policies.training.probing import Probing
from flexirl.progress import progress_bar

TUNED_ON = 16  # tasks of a mixture on which the constant dials to start from are searched


@dataclass(frozen=True)
class Engines:
    """What an agent is prepared, trained and validated on, and what runs policies for the comparison."""

    preparation: Fleet  # on which observations are normalised: the surrogate, since that costs no time
    training: Fleet
    validation: Fleet
    runner: Runner


def load_engines(config: DictConfig, tasks: list[Task], held_out: Task) -> Engines:
    """The engines of `executor`; a mixture is validated on further tasks of its kind.

    Raises UserError for bad figures, or a model that cannot be loaded.
    """
    members, group_size, traces = (
        count_of(config.env[name], f"env.{name}") for name in ("members", "group_size", "traces")
    )
    episodes = count_of(config.validation.members, "validation.members")
    if config.executor == "surrogate":
        training = Fleet(tasks, members, group_size, traces)
        watched = load_validation_tasks(config) if len(tasks) > 1 else held_out
        return Engines(training, training, Fleet(watched, episodes, 1, episodes), on_surrogate)
    if config.agent.algorithm == "probing":
        raise UserError(
            "agent=probing replays arrivals side by side, which no live engine can; choose agent=grouped_ppo."
        )
    if config.executor != "live":
        raise UserError(f"executor={config.executor} is no engine to train on; choose surrogate or live.")
    if members != 1 or episodes != 1:
        raise UserError("A live engine is one engine; leave env.members and validation.members at 1.")
    if len(tasks) > 1:
        raise UserError("A live engine is one engine; train a mixture on the surrogate, with executor=surrogate.")
    model, executor = load_executor(config)
    training = load_live_fleet(config, tasks[0], executor)
    # Validation comes in the middle of a training episode, whose keys and values must stay where they are.
    judge = type(executor)(model, executor.profile)
    preparation = Fleet(training.task, 1, 1, traces)
    return Engines(preparation, training, load_live_fleet(config, held_out, judge), on_live(judge))


def load_agent(config: DictConfig, env: BatchingVecEnv, log_folder: Path, seed: int) -> BaseAlgorithm:
    """A new agent, or the one of `resume`; grouped PPO can go on from what probing has found."""
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
        if settings["algorithm"] == "grouped_ppo" and "probed" in (load_from_zip_file(config.resume)[0] or {}):
            agent = make_agent(settings, env, int(config.env.group_size), seed, log_folder)
            agent.policy.load_state_dict(Probing.load(config.resume, env=env, device="cpu").policy.state_dict())
        else:
            agent = ALGORITHMS[settings["algorithm"]].load(config.resume, env=env, device="cpu", **grouping)
    except (ValueError, KeyError, AssertionError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"resume={config.resume} cannot go on here ({error}); give the same agent and env.") from None
    agent.tensorboard_log = str(log_folder)
    return agent


def warm_start(agent: BaseAlgorithm, tasks: list[Task], seed: int, progress: bool) -> None:
    """Sets a new agent to the best constant dials found for all tasks."""
    with progress_bar(SETTINGS_SEARCHED, " settings", progress, desc="searching dials", leave=False) as bar:

        def worth(settings: np.ndarray) -> np.ndarray:
            found = worth_of_dials(tasks, settings, max(3, len(tasks[:TUNED_ON])), TUNING_SEED + 1000 * seed)
            bar.update(len(settings))
            return found

        dials = search_dials(np.zeros(NUM_DIALS), worth, seed)
    print(f"starting from the best constant dials found: {np.round(dials, 2).tolist()}")
    start_at(agent, dials.tolist())
