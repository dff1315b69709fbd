"""Fused kernels inside any Transformers model: RMSNorm, the gated SiLU layer, rotary embedding with the KV write.

Modules are known by what they compute, not by their names: one that does on random numbers what a kernel does gets the
kernel as its `forward`, any other stays as it is. To take a replacement back is to delete that `forward` again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flexirl.runtime.kernels import rms_norm, silu_mul
from flexirl.runtime.kernels.rotary import rotate
from flexirl.runtime.models.attention import NAME, leave_rotation

_ROTARY = "apply_rotary_pos_emb"  # the function that rotates, in modeling files of Transformers
# Largest difference on values of order 1; both sides round at the same places or one rounds less often.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

_Replacement = tuple[nn.Module, Callable[..., Any]]


def fuse(model: nn.Module, agrees: Callable[[], bool]) -> None:
    """Puts the kernels into a model whose attention is ours.

    agrees: whether the model still gives the logits that it gave before; asked after each kind of replacement, which is
    taken back if it does not.
    """
    for find in (_norms, _gated_layers, _rotations):
        replacements = list(find(model))
        for module, forward in replacements:
            module.forward = forward
        if replacements and not agrees():
            for module, _ in replacements:
                del module.forward


def _norms(model: nn.Module) -> Iterator[_Replacement]:
    """RMSNorm with `weight` and `variance_epsilon`, as Llama, Qwen, Mistral and many others have it."""
    for module in model.modules():
        weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
        if isinstance(weight, nn.Parameter) and isinstance(eps, float):
            # Other weights than its own, which may all be one and so hide how they are applied.
            fresh, hidden = _random(weight.shape, weight), _random((1, 2, *weight.shape), weight)
            if _same(functional_call(module, {"weight": fresh}, hidden), rms_norm(hidden, fresh, eps)):
                yield module, partial(rms_norm, weight=weight, eps=eps)


def _gated_layers(model: nn.Module) -> Iterator[_Replacement]:
    """Feed-forward layers that compute down(silu(gate(x)) * up(x))."""
    for module in model.modules():
        layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
        if len(linear) == 3:
            forward = partial(_gated, linear)
            hidden = _random((1, 2, linear[0].in_features), linear[0].weight)
            if _same(module(hidden), forward(hidden)):
                yield module, forward


def _gated(layers: list[nn.Linear], hidden: Tensor) -> Tensor:
    gate, up, down = layers
    output: Tensor = down(silu_mul(gate(hidden), up(hidden)))
    return output


def _rotations(model: nn.Module) -> Iterator[_Replacement]:
    """Attention layers that rotate halves of whole heads: their own code, with the rotation left to our attention."""
    for module in model.modules():
        forward = type(module).forward
        if not isinstance(forward, FunctionType) or _ROTARY not in forward.__code__.co_names:
            continue
        rotation = forward.__globals__[_ROTARY]
        if hasattr(module, "layer_idx") and _rotates_halves(rotation, next(module.parameters())):
            leaves_it = FunctionType(
                forward.__code__,
                {**forward.__globals__, _ROTARY: partial(_leave_or_rotate, module, rotation)},
                forward.__name__, forward.__defaults__, forward.__closure__,
            )  # fmt: skip
            leaves_it.__kwdefaults__ = forward.__kwdefaults__
            yield module, MethodType(leaves_it, module)


def _leave_or_rotate(
    module: Any, rotation: Callable[..., Any], query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Stands in for `apply_rotary_pos_emb`; with another attention than ours the layer rotates by itself."""
    if module.config._attn_implementation != NAME:
        rotated: tuple[Tensor, Tensor] = rotation(query, key, cos, sin, **options)
        return rotated
    leave_rotation(module, cos, sin)
    return query, key


def _rotates_halves(rotation: Callable[..., Any], like: Tensor) -> bool:
    """Whether an `apply_rotary_pos_emb` does what `rotate` does."""
    query, key = _random((1, 3, 2, 8), like), _random((1, 1, 2, 8), like)
    half = _random((1, 2, 4), like)
    cos, sin = torch.cat((half, half), -1), torch.cat((half + 1.0, half + 1.0), -1)
    try:
        rotated = rotation(query, key, cos, sin)
    except Exception:  # it takes other arguments
        return False
    expected = (rotate(states[0].transpose(0, 1), cos[0], sin[0]).transpose(0, 1)[None] for states in (query, key))
    return isinstance(rotated, tuple) and len(rotated) == 2 and all(map(_same, rotated, expected))


def _random(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Numbers in (0, 1), always the same, of the dtype and on the device of `like`."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(like)


def _same(one: Any, other: Tensor) -> bool:
    tolerance = _TOLERANCE[other.dtype]
    return isinstance(one, Tensor) and one.shape == other.shape and torch.allclose(one, other, tolerance, tolerance)
