"""The policy that comes with the package: it loads by name, is small, and earns what its metadata says."""

from __future__ import annotations

from pathlib import Path

import pytest
from agent_toys import make, setting
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from flexirl.errors import UserError
from flexirl.experiments.configuration import CONF, load_tasks
from flexirl.experiments.seeds import PRETRAINED_SEED
from flexirl.policies.deploy.learned import LearnedPolicy, load_policy
from flexirl.policies.interface.action import NUM_DIALS
from flexirl.policies.registry import PRETRAINED, PRETRAINED_FILE, make_policy
from flexirl.policies.training.agents import start_at
from flexirl.policies.training.export import export
from flexirl.programs.pretrained import ship_mean, validated_tasks, worth_shares


def test_it_comes_with_the_package() -> None:
    policy = make_policy(PRETRAINED)
    assert isinstance(policy, LearnedPolicy) and policy.name == PRETRAINED
    assert PRETRAINED_FILE.stat().st_size < 2_000_000
    assert policy.metadata["command"].startswith("python -m flexirl.train mixture=general")
    assert policy.metadata["training"]["agent"] == setting("probing", "dials", tiny=False)[0]  # as it is here


def test_it_earns_what_its_metadata_says() -> None:
    policy = make_policy(PRETRAINED)
    assert isinstance(policy, LearnedPolicy)
    said = policy.metadata["worth_shares"]
    some = worth_shares(policy.network, validated_tasks(policy.metadata["training"], 8), PRETRAINED_SEED)
    assert some == pytest.approx(said[:8], rel=0.01) and len(said) == 66
    assert len(policy.network.numbers) == len(policy.metadata["seeds"]) == 2


TRAINING = ("workload=tiny", "workload.duration_s=6", "workload.warmup_s=0", "engine=cpu-tiny")


def run_folder(folder: Path, seed: int, dials: float, *overrides: str) -> Path:
    """What a training run leaves: here an agent that has all dials at one position."""
    folder.mkdir()
    agent = make("grouped_ppo", folder)
    start_at(agent, [dials] * NUM_DIALS)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [*TRAINING, *overrides, f"seed={seed}"])
    export(agent, folder / "policy.onnx", {"training": OmegaConf.to_container(config, resolve=True)})
    return folder


def test_the_mean_of_several_runs_ships_and_says_what_all_earned(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / "a", 3, -1.0), run_folder(tmp_path / "b", 4, 0.0)]
    shares, share = ship_mean(runs, tmp_path / "shipped.onnx")
    shipped = load_policy(tmp_path / "shipped.onnx")
    tasks = load_tasks(OmegaConf.create(shipped.metadata["training"]))
    alone = [worth_shares(load_policy(run / "policy.onnx").network, tasks, PRETRAINED_SEED)[0] for run in runs]
    between = load_policy(run_folder(tmp_path / "c", 5, -0.5) / "policy.onnx").network
    assert shares == {3: alone[0], 4: alone[1]} and alone[0] < alone[1]
    assert share == pytest.approx(worth_shares(between, tasks, PRETRAINED_SEED)[0], rel=1e-3)
    assert shipped.metadata["seeds"] == {str(seed): earned for seed, earned in shares.items()}
    assert shipped.metadata["worth_shares"] == [share]


def test_runs_that_differ_by_more_than_their_seed_are_refused(tmp_path: Path) -> None:
    one, other = run_folder(tmp_path / "a", 3, 0.0), run_folder(tmp_path / "b", 4, 0.0, "workload.load=0.6")
    for runs in ([one, other], [one, one]):
        with pytest.raises(UserError, match="with another seed"):
            ship_mean(runs, tmp_path / "shipped.onnx")
    assert not (tmp_path / "shipped.onnx").exists()
