"""Program: puts the best of several runs of one training into the package: `python -m flexirl.pretrained FOLDER ...`.

The runs differ by their seeds. Their policies play the same episodes, one of each task that they were validated on and
not trained on, with arrivals that none of them has met; what each earns is kept in the metadata of the one that ships.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from omegaconf import OmegaConf
from onnx import helper

from flexirl.configured import load_tasks, load_validation_tasks
from flexirl.envs.fleet import Fleet, Task
from flexirl.errors import UserError
from flexirl.policies.learned import load_policy
from flexirl.policies.network import run_each
from flexirl.policies.registry import PRETRAINED_FILE
from flexirl.train import VALIDATION_SEED

SELECTION_SEED = VALIDATION_SEED + 100_000


def revenue_share(path: Path, tasks: Sequence[Task], seed: int) -> float:
    """Mean revenue share of an exported policy, which sets dials, over one episode of each task."""
    network = load_policy(path).network
    fleet = Fleet(list(tasks), len(tasks), 1, len(tasks))
    observations, over = fleet.reset(seed), np.zeros(len(tasks), bool)
    while not over.all():
        observations, _, over = fleet.step(run_each(network, observations))
    share = np.mean([fleet.episode_figures(m)["revenue_share"] for m in range(len(tasks))])
    fleet.close()
    return float(share)


def validated_tasks(training: dict[str, Any]) -> list[Task]:
    """The tasks that a training, as it stands in a policy's metadata, was validated on."""
    config = OmegaConf.create(training)
    return load_tasks(config) if config.get("mixture") is None else load_validation_tasks(config)


def ship_best(runs: Sequence[Path], target: Path) -> dict[int, float]:
    """Writes the best run's policy to `target` and returns what all earned, by training seed.

    Raises UserError for a folder without a policy, or runs of different trainings.
    """
    shares: dict[int, float] = {}
    files: dict[int, Path] = {}
    trainings: list[dict[str, Any]] = []
    for run in runs:
        path = run / "policy.onnx"
        training = dict(load_policy(path).metadata["training"])
        seed = training.pop("seed")
        trainings.append(training)
        if training != trainings[0] or seed in files:
            raise UserError(f"{run} is not the training of {runs[0]} with another seed; give runs that differ by it.")
        files[seed] = path
        shares[seed] = revenue_share(path, validated_tasks(training), SELECTION_SEED)
        print(f"seed {seed}: revenue share {shares[seed]:.4f}")
    best = onnx.load(files[max(shares, key=shares.__getitem__)])
    properties = {entry.key: entry.value for entry in best.metadata_props}
    helper.set_model_props(best, {**properties, "seeds": json.dumps(shares)})
    target.write_bytes(best.SerializeToString())
    return shares


def main(arguments: Sequence[str] | None = None) -> None:
    """Does what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m flexirl.pretrained", description="Puts the best of several training runs into the package."
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of python -m flexirl.train, one per seed")
    parser.add_argument("--output", type=Path, default=PRETRAINED_FILE, help="where the policy goes")
    options = parser.parse_args(arguments)
    try:
        shares = ship_best(options.runs, options.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    spread = np.array(list(shares.values()))
    print(f"{len(spread)} seeds: {spread.min():.4f} to {spread.max():.4f}, mean {spread.mean():.4f}")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
