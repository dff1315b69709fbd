"""The exported file decides exactly as the agent does, says what it is, and stays small."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from agent_toys import KIND, decisive_agent, make, random_observations

from flexirl import __version__
from flexirl.errors import UserError
from flexirl.policies.deploy.network import read_network, run_each
from flexirl.policies.interface import action, observation
from flexirl.policies.training.export import FORMAT, export

EXPORTED = ["grouped_ppo", "ppo", "a2c", "dqn", "maskable_ppo"]
SAMPLES = 10_000


@pytest.mark.parametrize("name", EXPORTED)
def test_exported_policy_acts_as_the_agent_does(name: str, tmp_path: Path) -> None:
    agent = decisive_agent(name, tmp_path)
    path = tmp_path / "policy.onnx"
    export(agent, path, {})
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    observations = random_observations(SAMPLES)
    taken, raw = session.run(["action", "raw"], {"observation": observations})
    expected, _ = agent.predict(observations, deterministic=True)
    if KIND[name] == "grid":
        best_two = np.sort(raw, axis=1)[:, -2:]
        tied = best_two[:, 1] - best_two[:, 0] < 1e-5
        assert (taken[~tied] == expected[~tied]).all() and tied.mean() < 1e-3
        assert len(np.unique(taken)) > 3
    else:
        assert taken == pytest.approx(expected, abs=1e-5)
        assert (abs(taken) == 1).any() and (abs(taken) < 0.5).any()
    # The engine's own code against the runtime of ONNX.
    assert run_each(read_network(onnx.load(path)), observations) == pytest.approx(raw, abs=2e-5)
    assert path.stat().st_size < 100_000


def test_scores_are_exported_too(tmp_path: Path) -> None:
    agent = decisive_agent("ppo", tmp_path, "scores")
    export(agent, tmp_path / "policy.onnx", {})
    session = onnxruntime.InferenceSession(str(tmp_path / "policy.onnx"), providers=["CPUExecutionProvider"])
    observations = random_observations(500, with_requests=True)
    taken = session.run(["action"], {"observation": observations})[0]
    assert taken == pytest.approx(agent.predict(observations, deterministic=True)[0], abs=1e-5)


@pytest.mark.parametrize("activation, layers", [("relu", [64, 64]), ("tanh", [7]), ("relu", [5, 9, 3])])
def test_networks_of_other_shapes_run_too(activation: str, layers: list[int], tmp_path: Path) -> None:
    network = {"layers": layers, "activation": activation, "log_std": -3.0, "lstm": 64}
    export(make("ppo", tmp_path, network=network), tmp_path / "policy.onnx", {})
    session = onnxruntime.InferenceSession(str(tmp_path / "policy.onnx"), providers=["CPUExecutionProvider"])
    observations = random_observations(500)
    ours = run_each(read_network(onnx.load(tmp_path / "policy.onnx")), observations)
    assert ours == pytest.approx(session.run(["raw"], {"observation": observations})[0], abs=1e-5)


def test_trained_weights_are_exported(tmp_path: Path) -> None:
    agent = make("grouped_ppo", tmp_path)
    export(agent, tmp_path / "before.onnx", {})
    agent.learn(256)
    export(agent, tmp_path / "after.onnx", {})
    observations = random_observations(200)
    taken = [
        onnxruntime.InferenceSession(str(tmp_path / f"{when}.onnx")).run(["action"], {"observation": observations})[0]
        for when in ("before", "after")
    ]
    assert taken[1] == pytest.approx(agent.predict(observations, deterministic=True)[0], abs=1e-5)
    assert abs(taken[1] - taken[0]).max() > 1e-4


@pytest.mark.parametrize("name, masked", [("grouped_ppo", False), ("dqn", False), ("maskable_ppo", True)])
def test_the_file_says_what_it_is(name: str, masked: bool, tmp_path: Path) -> None:
    given = {"action": KIND[name], "validation": {"revenue_per_s": 1.5}, "training": {"seed": 0, "resume": None}}
    export(make(name, tmp_path), tmp_path / "policy.onnx", given)
    model = onnx.load(tmp_path / "policy.onnx")
    onnx.checker.check_model(model, full_check=True)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties.pop("format") == FORMAT
    assert properties.pop("observation_schema") == observation.SCHEMA
    assert properties.pop("action_schema") == action.SCHEMA
    assert properties.pop("package_version") == __version__
    assert {key: json.loads(value) for key, value in properties.items()} == {**given, "masked": masked}


def test_a_recurrent_agent_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recurrent agent.*cannot be exported; use policy\.zip"):
        export(make("recurrent_ppo", tmp_path), tmp_path / "policy.onnx", {})
    assert not (tmp_path / "policy.onnx").exists()


def test_layers_that_are_not_known_are_refused(tmp_path: Path) -> None:
    agent = make("ppo", tmp_path)
    agent.policy.mlp_extractor.policy_net.append(torch.nn.GELU())  # type: ignore[union-attr, operator]
    with pytest.raises(UserError, match="GELU layer cannot be exported"):
        export(agent, tmp_path / "policy.onnx", {})
