"""The start of training on a mixture: constant dials, then probing, which can be interrupted and gone on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agent_toys import make
from stable_baselines3.common.base_class import BaseAlgorithm
from test_probing import TASKS

from flexirl.experiments import training_run
from flexirl.policies.interface.action import NUM_DIALS
from flexirl.policies.interface.observation import SIZE
from flexirl.policies.training import probing
from flexirl.policies.training.grouped_ppo import GroupedPPO


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ROUNDS": 3, "UPDATES": 20, "BATCH": 256, "REMEMBERED": 2}.items():
        monkeypatch.setattr(probing, name, value)
    monkeypatch.setattr(training_run, "search_dials", lambda *_: np.full(NUM_DIALS, 0.1))


def acts(agent: BaseAlgorithm) -> np.ndarray:
    return probing.mean_action(agent, np.zeros((1, SIZE), np.float32))


def test_probing_that_was_interrupted_goes_on_to_the_same_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make("grouped_ppo", tmp_path)
    training_run.warm_start(whole, TASKS, 0, tmp_path, None, progress=False)
    assert acts(whole) != pytest.approx(0.1) and not (tmp_path / training_run.LESSONS).exists()

    probe, calls = probing.probe, []

    def interrupted(*given: Any) -> list[probing.Lesson]:
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return probe(*given)

    folder = tmp_path / "interrupted"
    folder.mkdir()
    monkeypatch.setattr(probing, "probe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training_run.warm_start(make("grouped_ppo", tmp_path), TASKS, 0, folder, None, progress=False)
    agent = GroupedPPO.load(folder / "policy.zip")
    training_run.warm_start(agent, TASKS, 0, folder, folder / "policy.zip", progress=False)
    assert len(calls) == 4 and (acts(agent) == acts(whole)).all()
    assert not (folder / training_run.LESSONS).exists()


def test_an_agent_that_was_trained_on_is_left_as_it_is(tmp_path: Path) -> None:
    agent = make("grouped_ppo", tmp_path)
    agent.save(tmp_path / "policy.zip")
    before = acts(agent)
    training_run.warm_start(agent, TASKS, 0, tmp_path, tmp_path / "policy.zip", progress=False)
    assert (acts(agent) == before).all()


def test_one_task_has_constant_dials(tmp_path: Path) -> None:
    agent = make("grouped_ppo", tmp_path)
    training_run.warm_start(agent, TASKS[:1], 0, tmp_path, None, progress=False)
    assert acts(agent) == pytest.approx(0.1, abs=0.05)
    assert not list(tmp_path.glob("*.npz"))
