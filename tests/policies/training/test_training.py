"""A training run under watch: what is validated, what is kept, what TensorBoard shows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from agent_toys import GROUP, KIND, MEMBERS, make, setting
from stable_baselines3.common.base_class import BaseAlgorithm
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from flexirl.envs.fleet import Fleet
from flexirl.policies.interface.action import DIALS, PREEMPTS
from flexirl.policies.training import training
from flexirl.policies.training.agents import ALGORITHMS
from flexirl.policies.training.probing import PROBED_DIALS
from flexirl.policies.training.training import FIGURES, Training, validate

SEED = 77


def watch(name: str, folder: Path, steps: int = 512, every: int = 256) -> tuple[BaseAlgorithm, Training]:
    agent = make(name, folder)
    fleet = Fleet(setting(name, KIND[name])[1], 3, 1, 3)
    watching = Training(fleet, folder, steps, every, SEED, progress=False)
    agent.learn(steps, callback=watching, log_interval=1)
    return agent, watching


@pytest.mark.parametrize("name", ["probing", "grouped_ppo", "dqn", "recurrent_ppo"])
def test_history_checkpoints_and_events(name: str, tmp_path: Path) -> None:
    agent, watching = watch(name, tmp_path)
    steps = [row["steps"] for row in watching.history]
    # Before anything is learned, now and then, and after the last update; probing goes by rounds.
    round_ = 2 * 30 * (1 + 2 * len(PROBED_DIALS))  # decisions of two episodes
    assert steps == ([0, round_, round_] if name == "probing" else [MEMBERS, 256, 512, 512])
    assert json.loads((tmp_path / "history.json").read_text()) == watching.history
    assert all(set(row) == {"steps", "reward", *FIGURES} for row in watching.history)
    best_row = max(watching.history, key=lambda row: row["worth_share"])
    assert watching.best == best_row

    # The files are what they are said to be: validated again, they earn the same.
    fleet = Fleet(setting(name, KIND[name])[1], 3)
    for file, row in (("best", best_row), ("policy", watching.history[-1])):
        loaded = ALGORITHMS[name].load(tmp_path / f"{file}.zip", device="cpu")
        assert validate(loaded, fleet, SEED) == {key: value for key, value in row.items() if key != "steps"}
    assert agent.num_timesteps == steps[-1]

    tags: dict[str, set[str]] = {"scalars": set(), "histograms": set()}
    last: dict[str, list[float]] = {}
    for path in sorted(tmp_path.rglob("events.out.tfevents*")):
        events = EventAccumulator(str(path)).Reload()
        for kind in tags:
            tags[kind] |= set(events.Tags()[kind])
        for tag in events.Tags()["scalars"]:
            last[tag] = last.get(tag, []) + [event.value for event in events.Scalars(tag)]
    for group in ("validation", "episode"):
        assert {f"{group}/{figure}" for figure in ("reward", *FIGURES)} <= tags["scalars"]
    assert any(tag.startswith("train/") and "loss" in tag for tag in tags["scalars"])
    assert last["validation/revenue_per_s"][-1] == pytest.approx(watching.history[-1]["revenue_per_s"])
    assert last["validation/best_worth_share"] == pytest.approx([best_row["worth_share"]])
    names = [dial.name for dial in DIALS] if KIND[name] == "dials" else ["0"]
    assert tags["histograms"] == {f"action/{number}" for number in names}


def test_the_best_checkpoint_is_that_of_the_best_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worths = iter([3.0, 1.0, 5.0, 4.0, 5.0, 2.0])
    monkeypatch.setattr(
        training, "validate", lambda *_: {**dict.fromkeys(FIGURES, 0.5), "reward": 0.0, "worth_share": next(worths)}
    )
    _, watching = watch("ppo", tmp_path, steps=512, every=128)
    assert [row["steps"] for row in watching.history] == [8, 128, 256, 384, 512, 512]
    assert watching.best["worth_share"] == 5.0 and watching.best["steps"] == 256
    assert ALGORITHMS["ppo"].load(tmp_path / "best.zip", device="cpu").num_timesteps == 256  # the earlier of two
    assert ALGORITHMS["ppo"].load(tmp_path / "policy.zip", device="cpu").num_timesteps == 512


def test_validation_plays_the_same_arrivals_each_time(tmp_path: Path) -> None:
    agent = make("grouped_ppo", tmp_path)
    task = setting("grouped_ppo", "dials")[1]
    first, again, other = (validate(agent, Fleet(task, 3), seed) for seed in (1, 1, 2))
    assert first == again != other
    assert validate(agent, Fleet(task, 3), 1) == first


def test_validation_masks_what_training_masks(tmp_path: Path) -> None:
    """An agent that would preempt for ever would admit nothing: the choice is hidden while nothing deferred runs."""
    agent = make("maskable_ppo", tmp_path)
    agent.policy.get_parameter("action_net.bias").data[PREEMPTS] = 100.0
    figures = validate(agent, Fleet(setting("maskable_ppo", "grid")[1], 2), 1)
    assert figures["deferred_tokens_per_s"] > 0 and figures["preemptions_per_s"] > 0


def test_groups_reach_the_algorithm(tmp_path: Path) -> None:
    agent, _ = watch("grouped_ppo", tmp_path, 128, 128)
    relative = agent.rollout_buffer.rewards.reshape(16, MEMBERS)  # type: ignore[attr-defined]
    sums = relative.reshape(16, MEMBERS // GROUP, GROUP).sum(axis=2)
    assert np.abs(sums).max() < 1e-4 < np.abs(relative).max()
