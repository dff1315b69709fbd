"""Averages policies: one ONNX file that decides by the mean of what several exported networks give.

Runs of one training with other seeds err in different directions, so their mean is better than each of them (Breiman,
Bagging predictors, Machine Learning 1996), and no lucky seed needs to be picked.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import compose, helper

from flexirl.errors import UserError


def average(policies: Sequence[onnx.ModelProto]) -> onnx.ModelProto:
    """The mean of policies that `export` wrote, which set dials; metadata are those of the first.

    Raises UserError for policies that choose from a grid, or that do not observe and decide alike.
    """
    first = policies[0].graph
    if first.node[-1].op_type != "Clip":
        raise UserError("Choices from a grid have no mean; average policies that set dials.")
    nodes, weights = [], []
    for i, policy in enumerate(policies):
        if (list(policy.graph.input), list(policy.graph.output)) != (list(first.input), list(first.output)):
            raise UserError("Only policies that observe and decide alike have a mean; average runs of one training.")
        graph = compose.add_prefix_graph(policy.graph, f"{i}.", rename_inputs=False)
        *network, cut = graph.node
        nodes += network
        weights += graph.initializer
    nodes.append(helper.make_node("Mean", [f"{i}.raw" for i in range(len(policies))], ["raw"]))
    nodes.append(helper.make_node("Clip", ["raw", *cut.input[1:]], ["action"]))
    mean = onnx.ModelProto()
    mean.CopyFrom(policies[0])
    mean.graph.CopyFrom(helper.make_graph(nodes, "policy", first.input, first.output, weights))
    onnx.checker.check_model(mean, full_check=True)
    return mean
