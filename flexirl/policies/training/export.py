"""Exports an agent as one small ONNX file that describes itself: normalisation and deterministic head inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from sb3_contrib import MaskablePPO, RecurrentPPO
from stable_baselines3 import DQN
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import nn

from flexirl import __version__
from flexirl.errors import UserError
from flexirl.policies.deploy.learned import FORMAT
from flexirl.policies.interface import action, observation
from flexirl.policies.training.agents import NORMALISED_LIMIT, Normaliser

OPSET = 17


class _Graph:
    """Collects ONNX nodes; tensors are named by number."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def constant(self, value: np.ndarray) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def normaliser(self, x: str, module: Normaliser) -> str:
        x = self.add("Sub", x, self.constant(module.mean.numpy()))
        x = self.add("Div", x, self.constant(module.std.numpy()))
        return self.clip(x, NORMALISED_LIMIT)

    def clip(self, x: str, limit: float) -> str:
        low, high = (self.constant(np.asarray(sign * limit, np.float32)) for sign in (-1, 1))
        return self.add("Clip", x, low, high)

    def layers(self, x: str, modules: nn.Module) -> str:
        for module in modules.modules():
            if isinstance(module, nn.Linear):
                weight, bias = module.weight.detach().numpy(), module.bias.detach().numpy()
                x = self.add("Gemm", x, self.constant(weight), self.constant(bias), transB=1)
            elif isinstance(module, (nn.Tanh, nn.ReLU)):
                x = self.add("Tanh" if isinstance(module, nn.Tanh) else "Relu", x)
            elif not isinstance(module, (nn.Sequential, nn.Flatten, nn.Identity)):
                raise UserError(f"A {type(module).__name__} layer cannot be exported; use tanh or relu networks.")
        return x


def export(agent: BaseAlgorithm, path: Path, metadata: dict[str, Any]) -> None:
    """Writes the agent's deterministic policy to `path`.

    Input `observation`: float32 (n, observations). Outputs `action`: float32 (n, numbers) in [-1, 1], or int64 (n,),
    the choice of the grid; and `raw`: what the action was cut or chosen from, which shows numbers that are not finite.
    metadata: JSON values, kept beside the schemas in the file's properties; `masked` is added: whether choices that can
    do nothing were masked in training, and are to be masked when acting.
    Raises UserError for a recurrent agent, whose memory the deployed policy protocol does not carry.
    """
    if isinstance(agent, RecurrentPPO):
        raise UserError(
            "A recurrent agent keeps its memory outside the network, so it cannot be exported; use policy.zip."
        )
    graph = _Graph()
    policy: Any = agent.policy  # its parts depend on the algorithm
    space: Any = agent.action_space
    if isinstance(agent, DQN):
        x = graph.normaliser("observation", policy.q_net.features_extractor)
        x = graph.layers(x, policy.q_net.q_net)
    else:
        x = graph.normaliser("observation", policy.pi_features_extractor)
        x = graph.layers(x, policy.mlp_extractor.policy_net)
        x = graph.layers(x, policy.action_net)
    graph.nodes[-1].output[0] = x = "raw"
    size = len(policy.observation_space.low)
    if space.shape:
        graph.clip(x, 1.0)
        numbers = int(space.shape[0])
        result = helper.make_tensor_value_info("action", TensorProto.FLOAT, ["n", numbers])
    else:
        graph.add("ArgMax", x, axis=1, keepdims=0)
        numbers = int(space.n)
        result = helper.make_tensor_value_info("action", TensorProto.INT64, ["n"])
    raw = helper.make_tensor_value_info("raw", TensorProto.FLOAT, ["n", numbers])
    graph.nodes[-1].output[0] = "action"
    model = helper.make_model(
        helper.make_graph(
            graph.nodes, "policy", [helper.make_tensor_value_info("observation", TensorProto.FLOAT, ["n", size])],
            [result, raw], graph.weights,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=8,
    )  # fmt: skip
    schemas = {
        "format": FORMAT, "observation_schema": observation.SCHEMA, "action_schema": action.SCHEMA,
        "package_version": __version__,
    }  # fmt: skip
    values = {"masked": isinstance(agent, MaskablePPO), **metadata}
    helper.set_model_props(model, {**schemas, **{key: json.dumps(value) for key, value in values.items()}})
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
