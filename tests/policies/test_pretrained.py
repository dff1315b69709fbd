"""The policy that comes with the package: it loads by name, is small, and earns what its metadata says."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from omegaconf import OmegaConf

from flexirl.configured import load_tasks
from flexirl.envs.fleet import Fleet
from flexirl.policies.learned import LearnedPolicy
from flexirl.policies.registry import PRETRAINED, PRETRAINED_FILE, make_policy
from flexirl.train import VALIDATION_SEED


def test_it_comes_with_the_package() -> None:
    policy = make_policy(PRETRAINED)
    assert isinstance(policy, LearnedPolicy) and policy.name == PRETRAINED
    assert PRETRAINED_FILE.stat().st_size < 2_000_000
    assert policy.metadata["command"].startswith("python -m flexirl.train mixture=general")


def test_it_earns_what_its_metadata_says() -> None:
    """Its validation again, by the exported network: the mean revenue share over the tasks it was trained on."""
    metadata = make_policy(PRETRAINED).metadata  # type: ignore[attr-defined]
    tasks = load_tasks(OmegaConf.create(metadata["training"]))
    session = onnxruntime.InferenceSession(PRETRAINED_FILE.read_bytes(), providers=["CPUExecutionProvider"])
    fleet = Fleet(tasks, len(tasks), 1, len(tasks))
    observations = fleet.reset(VALIDATION_SEED + metadata["training"]["seed"])
    over = np.zeros(len(tasks), bool)
    while not over.all():
        observations, _, over = fleet.step(session.run(["action"], {"observation": observations})[0])
    share = np.mean([fleet.episode_figures(m)["revenue_share"] for m in range(len(tasks))])
    fleet.close()
    assert share == pytest.approx(metadata["validation"]["revenue_share"], abs=2e-3)
