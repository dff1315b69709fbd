"""The mean of several policies in one file: by ONNX's own runtime and by the engine's code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from agent_toys import decisive_agent, make, random_observations

from flexirl.errors import UserError
from flexirl.policies.deploy.learned import load_policy
from flexirl.policies.deploy.network import read_network, run_each
from flexirl.policies.training.averaging import average
from flexirl.policies.training.export import export


def exported(folder: Path, scale: float) -> onnx.ModelProto:
    """A policy whose last layer is `scale` times that of others."""
    agent = decisive_agent("grouped_ppo", folder)
    agent.policy.action_net.weight.data *= scale  # type: ignore[union-attr, operator]
    export(agent, folder / "policy.onnx", {"action": "dials", "command": f"scale {scale}"})
    return onnx.load(folder / "policy.onnx")


def test_it_gives_the_mean_of_what_each_gives(tmp_path: Path) -> None:
    models = [exported(tmp_path, scale) for scale in (1.0, -0.4, 2.0)]
    mean = average(models)
    observations = random_observations(300)

    def outputs(model: onnx.ModelProto) -> list[np.ndarray]:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(["raw", "action"], {"observation": observations})

    expected = np.mean([outputs(model)[0] for model in models], axis=0)
    raw, action = outputs(mean)
    assert raw == pytest.approx(expected, abs=1e-5)
    assert action == pytest.approx(np.clip(expected, -1, 1), abs=1e-5)
    network = read_network(mean)
    assert len(network.numbers) == 3 and run_each(network, observations) == pytest.approx(expected, abs=2e-5)
    (tmp_path / "mean.onnx").write_bytes(mean.SerializeToString())
    assert load_policy(tmp_path / "mean.onnx").metadata["command"] == "scale 1.0"


def test_what_has_no_mean_is_refused(tmp_path: Path) -> None:
    dials = exported(tmp_path, 1.0)
    export(make("dqn", tmp_path), tmp_path / "grid.onnx", {})
    grid = onnx.load(tmp_path / "grid.onnx")
    with pytest.raises(UserError, match="Choices from a grid have no mean"):
        average([grid, grid])
    with pytest.raises(UserError, match="observe and decide alike"):
        average([dials, grid])


def test_networks_of_other_shapes_or_out_of_order_are_refused(tmp_path: Path) -> None:
    network = {"layers": [7, 9], "activation": "tanh", "log_std": -3.0, "lstm": 64}
    export(make("grouped_ppo", tmp_path, network=network), tmp_path / "small.onnx", {})
    dials = exported(tmp_path, 1.0)
    with pytest.raises(UserError, match="not alike"):
        read_network(average([dials, onnx.load(tmp_path / "small.onnx")]))
    crossed = average([dials, dials])
    ends = next(node for node in crossed.graph.node if node.op_type == "Mean").input
    ends[0], ends[1] = ends[1], ends[0]
    with pytest.raises(UserError, match="no chain to the action"):
        read_network(crossed)
    del ends[:]
    with pytest.raises(UserError, match="not alike"):
        read_network(crossed)
