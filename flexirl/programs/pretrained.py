"""Program: puts the mean of several runs of one training into the package: `python -m flexirl.pretrained FOLDER ...`.

The runs differ by their seeds. They and their mean play the same episodes, one of each task that they were validated on
and not trained on, with arrivals that none of them has met; what each earns is kept in the metadata of the mean.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from omegaconf import OmegaConf
from onnx import helper

from flexirl.envs.fleet import Fleet, Task
from flexirl.envs.rollout import play
from flexirl.errors import UserError
from flexirl.experiments.configuration import load_tasks, load_validation_tasks
from flexirl.experiments.seeds import PRETRAINED_SEED
from flexirl.policies.deploy.learned import load_policy
from flexirl.policies.deploy.network import Network, read_network, run_each
from flexirl.policies.registry import PRETRAINED_FILE
from flexirl.policies.training.averaging import average


def worth_shares(network: Network, tasks: Sequence[Task], seed: int) -> list[float]:
    """What a network that sets dials earns in one run of each task: `worth_share` of `Fleet.episode_figures`."""
    fleet = Fleet(list(tasks), len(tasks), 1, len(tasks))
    played = play(fleet, seed, partial(run_each, network))
    fleet.close()
    return [figures["worth_share"] for figures in played.figures]


def validated_tasks(training: dict[str, Any], members: int | None = None) -> list[Task]:
    """The tasks that a training, as it stands in a policy's metadata, was validated on; of a mixture the first few."""
    config = OmegaConf.create(training)
    config.validation.members = members or config.validation.members
    return load_tasks(config) if config.get("mixture") is None else load_validation_tasks(config)


def ship_mean(runs: Sequence[Path], target: Path) -> tuple[dict[int, float], float]:
    """Writes the mean of the runs' policies to `target`; returns what each earned, by training seed, and what it did.

    Its metadata are those of the first run, with `seeds` and, by task, `worth_shares` from here. Raises UserError for a
    folder without a policy, or runs of different trainings.
    """
    shares: dict[int, float] = {}
    models: list[onnx.ModelProto] = []
    trainings: list[dict[str, Any]] = []
    tasks: list[Task] = []
    for run in runs:
        policy = load_policy(run / "policy.onnx")
        training = dict(policy.metadata["training"])
        seed = training.pop("seed")
        training.pop("resume")  # a run that was interrupted is the same training
        trainings.append(training)
        if training != trainings[0] or seed in shares:
            raise UserError(f"{run} is not the training of {runs[0]} with another seed; give runs that differ by it.")
        tasks = tasks or validated_tasks(training)
        models.append(onnx.load(run / "policy.onnx"))
        shares[seed] = float(np.mean(worth_shares(policy.network, tasks, PRETRAINED_SEED)))
        print(f"seed {seed}: worth {shares[seed]:.4f}")
    mean = average(models)
    earned = worth_shares(read_network(mean), tasks, PRETRAINED_SEED)
    properties = {entry.key: entry.value for entry in mean.metadata_props if entry.key != "validation"}
    helper.set_model_props(mean, {**properties, "seeds": json.dumps(shares), "worth_shares": json.dumps(earned)})
    target.write_bytes(mean.SerializeToString())
    return shares, float(np.mean(earned))


def run(folders: Sequence[Path], output: Path | None) -> None:
    """Makes the mean, prints what each earned; output: where it goes, the package's own place if None."""
    target = output or PRETRAINED_FILE
    shares, share = ship_mean(folders, target)
    spread = np.array(list(shares.values()))
    print(f"{len(spread)} seeds: {spread.min():.4f} to {spread.max():.4f}; their mean policy {share:.4f}")
    print(f"written to {target}")
