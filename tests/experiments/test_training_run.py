"""Where an agent starts: at constant dials that are searched, or where another agent has come to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from agent_toys import GROUP, MEMBERS, decisive_agent, make, setting

from flexirl.envs.fleet import Fleet
from flexirl.envs.sb3 import BatchingVecEnv
from flexirl.errors import UserError
from flexirl.experiments import training_run
from flexirl.experiments.configuration import _train_config
from flexirl.experiments.training_run import load_agent, load_engines, warm_start
from flexirl.policies.interface.action import NUM_DIALS
from flexirl.policies.interface.observation import SIZE
from flexirl.policies.training.grouped_ppo import GroupedPPO
from flexirl.policies.training.probing import mean_action


def test_a_new_agent_starts_at_the_dials_that_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = np.linspace(-0.5, 0.5, NUM_DIALS)
    monkeypatch.setattr(training_run, "search_dials", lambda *_: found)
    agent = make("probing", tmp_path)
    warm_start(agent, [setting("probing", "dials")[1]], 0, progress=False)
    assert mean_action(agent, np.zeros((3, SIZE), np.float32)) == pytest.approx(np.tile(found, (3, 1)), abs=0.05)


def test_grouped_ppo_goes_on_from_what_probing_found(tmp_path: Path) -> None:
    before = decisive_agent("probing", tmp_path)
    before.save(tmp_path / "policy.zip")
    config = _train_config(["agent=grouped_ppo", f"env.members={MEMBERS}", f"env.group_size={GROUP}"])
    config.agent.hyperparameters.n_steps, config.agent.hyperparameters.batch_size = 16, 64
    config.resume = str(tmp_path / "policy.zip")
    env = BatchingVecEnv(Fleet(setting("probing", "dials")[1], MEMBERS, GROUP, 4), 0)
    agent = load_agent(config, env, tmp_path, 0)
    assert type(agent) is GroupedPPO and agent.n_steps == 16
    seen = np.random.default_rng(0).uniform(0, 1, (20, SIZE)).astype(np.float32)
    assert (mean_action(agent, seen) == mean_action(before, seen)).all()
    agent.learn(MEMBERS * 16)


def test_a_live_engine_cannot_be_probed() -> None:
    config = _train_config(["env=live", "agent=probing"])
    with pytest.raises(UserError, match=r"agent=probing replays .* choose agent=grouped_ppo"):
        load_engines(config, [], setting("probing", "dials")[1])
