"""The policy that comes with the package: it loads by name, is small, and earns what its metadata says."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from test_agents import make

from flexirl.configured import CONF, load_tasks
from flexirl.envs.action import NUM_DIALS
from flexirl.errors import UserError
from flexirl.policies.agents import start_at
from flexirl.policies.export import export
from flexirl.policies.learned import LearnedPolicy, load_policy
from flexirl.policies.registry import PRETRAINED, PRETRAINED_FILE, make_policy
from flexirl.pretrained import revenue_share, ship_best, validated_tasks
from flexirl.train import VALIDATION_SEED


def test_it_comes_with_the_package() -> None:
    policy = make_policy(PRETRAINED)
    assert isinstance(policy, LearnedPolicy) and policy.name == PRETRAINED
    assert PRETRAINED_FILE.stat().st_size < 2_000_000
    assert policy.metadata["command"].startswith("python -m flexirl.train mixture=general")


def test_it_earns_what_its_metadata_says() -> None:
    """Its validation again, by the exported network: the mean revenue share over tasks it was trained on."""
    metadata = make_policy(PRETRAINED).metadata  # type: ignore[attr-defined]
    tasks = validated_tasks(metadata["training"])
    share = revenue_share(PRETRAINED_FILE, tasks, VALIDATION_SEED + metadata["training"]["seed"])
    assert share == pytest.approx(metadata["validation"]["revenue_share"], abs=2e-3)


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


def test_the_best_of_several_runs_ships_and_says_what_all_earned(tmp_path: Path) -> None:
    bad, good = run_folder(tmp_path / "a", 3, -1.0), run_folder(tmp_path / "b", 4, 0.0)
    shares = ship_best([bad, good], tmp_path / "shipped.onnx")
    assert set(shares) == {3, 4} and shares[4] > shares[3]
    metadata = load_policy(tmp_path / "shipped.onnx").metadata
    assert metadata["training"]["seed"] == 4 and metadata["seeds"] == {str(seed): shares[seed] for seed in (3, 4)}
    tasks = load_tasks(OmegaConf.create(metadata["training"]))
    assert revenue_share(good / "policy.onnx", tasks, 5) == revenue_share(tmp_path / "shipped.onnx", tasks, 5)


def test_runs_that_differ_by_more_than_their_seed_are_refused(tmp_path: Path) -> None:
    one, other = run_folder(tmp_path / "a", 3, 0.0), run_folder(tmp_path / "b", 4, 0.0, "workload.load=0.6")
    for runs in ([one, other], [one, one]):
        with pytest.raises(UserError, match="with another seed"):
            ship_best(runs, tmp_path / "shipped.onnx")
    assert not (tmp_path / "shipped.onnx").exists()
