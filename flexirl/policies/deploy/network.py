"""The network of a policy file: read from ONNX as plain numbers, run by compiled code.

Files are as `export` and `average` write them: a normaliser, then dense layers with one activation between them, or the
mean of several such networks. Whatever else a file holds is refused, nothing in it is executed, and no file that it may
refer to is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numba as nb
import numpy as np
import onnx
from onnx import numpy_helper

from flexirl.compiled import compiled
from flexirl.errors import UserError

ACTIVATIONS = ("Tanh", "Relu")
_CONSTANTS = {"Sub": 1, "Div": 1, "Clip": 2, "Gemm": 2}  # of each operator that has any


class Network(NamedTuple):
    """From observations to numbers: the mean of what one or more networks of the same shape give.

    sizes: int64, of the observation, the hidden layers and the output; numbers: float32, a row for each network: the
    normaliser's means and deviations, then of each layer its weights, a row for each output, and its biases; limit: of
    normalised observations; relu: what is between layers, else it is tanh.
    """

    sizes: np.ndarray
    numbers: np.ndarray
    limit: float
    relu: bool


def read_network(model: onnx.ModelProto) -> Network:
    """The network of a policy file; raises UserError that says what is wrong with it, to follow a colon."""
    graph = model.graph
    constants = {tensor.name: _numbers_of(tensor) for tensor in graph.initializer}
    if [tensor.name for tensor in graph.output] != ["action", "raw"]:
        raise UserError("its outputs are not action and raw")
    if not all(np.isfinite(constant).all() for constant in constants.values() if constant.dtype.kind == "f"):
        raise UserError("a weight of it is no finite number")
    *nodes, last = graph.node
    if not nodes or list(last.input[:1]) != ["raw"]:  # from which the action is cut or chosen
        raise UserError("it does not end in an action")
    ends = ["raw"]
    if nodes[-1].op_type == "Mean" and list(nodes[-1].output) == ends:
        ends = list(nodes.pop().input)
    if not ends or len(nodes) % len(ends):
        raise UserError("its networks are not alike")
    length = len(nodes) // len(ends)
    networks = [_read_one(nodes[i * length : (i + 1) * length], end, constants) for i, end in enumerate(ends)]
    first = networks[0]
    for network in networks[1:]:
        if network.sizes.tolist() != first.sizes.tolist() or network[2:] != first[2:]:
            raise UserError("its networks are not alike")
    return first._replace(numbers=np.concatenate([network.numbers for network in networks]))


def _read_one(nodes: Sequence[onnx.NodeProto], end: str, constants: dict[str, np.ndarray]) -> Network:
    """One network, from the observation to the tensor `end`."""

    def steps() -> Iterator[tuple[str, list[np.ndarray]]]:
        """Operator and constants of every node, each of which takes what the one before gives."""
        given = "observation"
        for node in nodes:
            if not node.input or node.input[0] != given or len(node.output) != 1:
                raise UserError("its operators are no chain from the observation on")
            numbers = [constants[name] for name in node.input[1:] if name in constants]
            if len(numbers) != _CONSTANTS.get(node.op_type, 0):
                raise UserError(f"operator {node.op_type} lacks its numbers")
            given = node.output[0]
            yield node.op_type, numbers
        if given != end:
            raise UserError("its operators are no chain to the action")

    chain = list(steps())
    kinds = [kind for kind, _ in chain]
    activations = set(kinds[4::2])
    layers = [numbers for kind, numbers in chain if kind == "Gemm"]
    between = ["Gemm" if i % 2 == 0 else activation for i, activation in enumerate(kinds[3:])]
    if kinds[:3] != ["Sub", "Div", "Clip"] or len(kinds) % 2 or kinds[3:] != between or len(activations) > 1:
        raise UserError("it is no normaliser with dense layers and one activation")
    if not activations <= set(ACTIVATIONS):
        raise UserError(f"its activation is {activations.pop()}, none of {', '.join(ACTIVATIONS)}")
    if not all([(a.name, a.i) for a in node.attribute] == [("transB", 1)] for node in nodes if node.op_type == "Gemm"):
        raise UserError("its layers have settings that are not known")
    (mean,), (deviation,), limits = (numbers for _, numbers in chain[:3])
    sizes = [mean.size]
    if mean.shape != deviation.shape or mean.ndim != 1 or [limit.size for limit in limits] != [1, 1]:
        raise UserError("its normaliser is not of one size")
    for weights, biases in layers:
        if weights.ndim != 2 or weights.shape[1] != sizes[-1] or biases.shape != weights.shape[:1]:
            raise UserError("its layers do not fit each other")
        sizes.append(len(biases))
    numbers = np.concatenate([mean, deviation, *(array.ravel() for layer in layers for array in layer)])
    return Network(np.array(sizes), numbers[None], limits[1].item(), "Relu" in activations)


def _numbers_of(tensor: onnx.TensorProto) -> np.ndarray:
    if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.data_type != onnx.TensorProto.FLOAT:
        raise UserError(f"{tensor.name} is not 32-bit floats in the file itself")
    try:
        return numpy_helper.to_array(tensor)
    except ValueError:
        raise UserError(f"{tensor.name} has more or fewer numbers than it says") from None


# Coefficients of x, x^3 and so on, and of 1, x^2 and so on, highest first: a rational approximation of tanh to the
# precision of float32, as in Eigen (generic_fast_tanh_float). Unlike a library's, it is done for many numbers at once.
_ABOVE = (-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08,
          1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03)  # fmt: skip
_BELOW = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
_ONE_FROM = np.float32(7.9)


@nb.njit(cache=True, inline="always")
def _tanh(x):
    if x > _ONE_FROM:
        x = _ONE_FROM
    elif x < -_ONE_FROM:
        x = -_ONE_FROM
    square = x * x
    above, below = np.float32(0.0), np.float32(0.0)
    for coefficient in _ABOVE:
        above = above * square + np.float32(coefficient)
    for coefficient in _BELOW:
        below = below * square + np.float32(coefficient)
    return x * above / below


# Sums in any order, but numbers that are not finite have to stay what they are.
@nb.njit(cache=True, fastmath={"reassoc", "contract", "arcp", "nsz"})
def run_network(network: Network, observed: np.ndarray, out: np.ndarray) -> None:
    """Fills `out`, float32 (numbers,), for one observation, float32 (observations,)."""
    sizes, limit = network.sizes, np.float32(network.limit)
    out[:] = 0.0
    for numbers in network.numbers:
        count = sizes[0]
        at = 2 * count
        values = np.empty(count, np.float32)
        for i in range(count):
            values[i] = min(max((observed[i] - numbers[i]) / numbers[count + i], -limit), limit)
        for layer in range(1, len(sizes)):
            outputs = sizes[layer]
            biases = at + count * outputs
            results = np.empty(outputs, np.float32)
            for j in range(outputs):
                total = np.float32(0.0)
                for i in range(count):
                    total += numbers[at + j * count + i] * values[i]
                results[j] = total + numbers[biases + j]
            if layer < len(sizes) - 1:
                for j in range(outputs):
                    results[j] = max(results[j], np.float32(0.0)) if network.relu else _tanh(results[j])
            at, count, values = biases + outputs, outputs, results
        out += values
    out /= np.float32(len(network.numbers))


@compiled
def run_each(network: Network, observed: np.ndarray) -> np.ndarray:
    """`run_network` for each row: float32 (n, observations) to (n, numbers)."""
    out = np.empty((len(observed), network.sizes[-1]), np.float32)
    for i in range(len(observed)):
        run_network(network, observed[i], out[i])
    return out
