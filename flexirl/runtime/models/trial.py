"""The trial run of a model just loaded: with paged attention it must give the logits that it gives with its own.

A configuration is not trusted to say what a model's code makes of it, and a few tokens have to show it all. So windows
and whatever else begins after some number of tokens are shortened meanwhile, weights compute in float32, so that
rounding hides nothing, and a token that is no number shows what else than attention carries from token to token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from flexirl.runtime.kernels import plan_attention
from flexirl.runtime.models.attention import NAME, PagedIteration, Rotation, Unsupported
from flexirl.runtime.models.fusing import fuse
from flexirl.runtime.models.vision import FAMILIES, Vision
from flexirl.runtime.scheduler.kv_cache import blocks_for

_TOKENS, _BLOCK, _IMAGE = 40, 16, (17, 23)  # the image is cut by the end of the first iteration
_SPLIT = 21  # where the second iteration begins
_ROWS = [*range(0, _SPLIT, 2), *range(_SPLIT, _TOKENS, 2)]  # whose logits are asked for
_SHORT = 7  # tokens to which lengths are shortened
_LENGTHS = re.compile(r"window|attention_chunk|local_attention|floor|original_max_position")
# Largest distance between two ways to compute the same logits, relative to their length.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}


@dataclass(frozen=True)
class Geometry:
    """What the model's attention layers turned out to be."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int


def try_out(model: PreTrainedModel, fused: bool) -> tuple[Vision | None, Geometry, int]:
    """Puts our attention into the model and tries it; returns what its layers are, and the vocabulary's size.

    fused: the fused kernels too, as far as they give the same. Raises Unsupported for a model that cannot be served.
    """
    vision = Vision(model) if model.config.model_type in FAMILIES else None
    dtype = model.dtype
    own, ours = model.config.get_text_config()._attn_implementation or "eager", NAME

    def attend_by(name: str) -> None:
        # The vision encoder keeps its own attention, which is not over a cache.
        model.set_attn_implementation(name if vision is None else {"text_config": name})

    trials = [_Trial(model), *([] if vision is None else [_Trial(model, vision)])]
    attend_by(ours)
    geometry = _geometry(model, trials[0].tokens)
    for trial, beside in zip(trials, ("", " and an image"), strict=False):
        _check(trial.distance(model, geometry, dtype), dtype, beside)
    with _shortened(model), _in_float32(model):
        attend_by(own)
        exact = _Trial(model)
        attend_by(ours)
        _check(exact.distance(model, geometry, torch.float32), torch.float32, "")

    def agrees() -> bool:
        try:
            return all(trial.distance(model, geometry, dtype) <= TOLERANCE[dtype] for trial in trials)
        except Exception:  # whatever a replaced module is called with, the model runs without it too
            return False

    if fused:
        fuse(model, agrees)
    return vision, geometry, trials[0].expected.shape[-1]


def _check(distance: float, dtype: torch.dtype, beside: str) -> None:
    if not distance <= TOLERANCE[dtype]:
        raise Unsupported(
            f"with paged attention{beside} its logits are {distance:.1%} off, so its attention is not plain"
        )


class _Trial:
    """A sequence of tokens, with an image if `vision` is given, and what the model as it is now says to it."""

    def __init__(self, model: PreTrainedModel, vision: Vision | None = None) -> None:
        self.tokens = torch.arange(7, 7 + _TOKENS, device=model.device)
        self._vision = vision
        inputs: dict[str, Tensor] = {}
        if vision is not None:
            begin, end = _IMAGE
            self.tokens[begin:end] = vision.image_token
            self._image = vision.draw(end - begin, np.random.default_rng(0))
            inputs = {
                "pixel_values": torch.as_tensor(self._image.pixels).to(model.device, model.dtype),
                "image_grid_thw": torch.tensor([self._image.grid], device=model.device),
                "mm_token_type_ids": (self.tokens[None] == vision.image_token).int(),
            }
        try:
            self.expected: Tensor = model(input_ids=self.tokens[None], use_cache=False, **inputs).logits[0]
        except Exception as error:
            raise Unsupported(
                "Transformers itself cannot run what its config.json describes "
                f"({type(error).__name__}: {first_line(error)})"
            ) from None

    def distance(self, model: PreTrainedModel, geometry: Geometry, dtype: torch.dtype) -> float:
        """How far from that the logits with paged attention are, relative to their length; dtype: the cache's."""
        positions = torch.arange(_TOKENS, device=model.device)[None]
        name, inputs = "input_ids", self.tokens
        if self._vision is not None:
            name, inputs = "inputs_embeds", model.get_input_embeddings()(self.tokens)
            (inputs[slice(*_IMAGE)],) = self._vision.encode([self._image])
            placed = self._vision.positions(self.tokens.tolist(), [self._image])
            positions = torch.from_numpy(placed[:, None]).to(model.device)
        logits = _paged_logits(model, {name: inputs[None]}, positions, geometry, dtype)
        expected = self.expected[_ROWS]
        return float((logits - expected).float().norm() / expected.float().norm())


@contextmanager
def _shortened(model: PreTrainedModel) -> Iterator[None]:
    """Has begin after a few tokens whatever in the model of text begins after more."""
    holders = [vars(module) for module in model.modules()]
    for config in {id(config): config for config in _text_configs(model)}.values():
        holders += _holders(vars(config))
    changed = [(holder, name, value) for holder in holders for name, value in _long(holder)]
    try:
        for holder, name, _ in changed:
            holder[name] = _SHORT
        yield
    finally:
        for holder, name, value in changed:
            holder[name] = value


def _text_configs(model: PreTrainedModel) -> Iterator[PretrainedConfig]:
    """The configuration of the model of text, and what its modules have for one."""
    text = model.config.get_text_config()
    yield text
    for module in model.modules():
        if isinstance(config := getattr(module, "config", None), type(text)):
            yield config


def _holders(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The fields of a configuration, and those of the dictionaries in it."""
    yield values
    for value in values.values():
        if isinstance(value, dict):
            yield from _holders(value)


def _long(holder: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in holder.items():
        if isinstance(value, int | float) and value > _SHORT and isinstance(name, str) and _LENGTHS.search(name):
            yield name, value


@contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Has the model compute in float32; weights are converted layer by layer, since all at once may not fit."""
    handles = []
    for part in _parts(model):
        weights = [weight for weight in part.parameters() if weight.dtype in TOLERANCE]
        originals = [weight.data for weight in weights]

        def convert(*_: Any, weights: list[nn.Parameter] = weights) -> None:
            for weight in weights:
                weight.data = weight.data.float()

        def restore(*_: Any, weights: list[nn.Parameter] = weights, originals: list[Tensor] = originals) -> None:
            for weight, original in zip(weights, originals, strict=True):
                weight.data = original

        handles += [part.register_forward_pre_hook(convert), part.register_forward_hook(restore, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """Modules that hold all weights among them: layers of a list as a whole, and what has weights of its own."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif next(child.parameters(recurse=False), None) is not None:
            yield child
        else:
            yield from _parts(child)


def _geometry(model: PreTrainedModel, tokens: Tensor) -> Geometry:
    """Runs the model with an attention that only looks on; raises Unsupported for layers that cannot be served."""
    seen: dict[int, tuple[int, int, int]] = {}

    def look(
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        sliding_window: int | None,
        softcap: float | None,
        rotation: Rotation | None,
    ) -> Tensor:
        if key.shape != value.shape:
            raise Unsupported("keys and values differ in size, as in multi-head latent attention")
        seen[layer] = (query.shape[1], key.shape[1], key.shape[2])
        return query

    def spoil(module: nn.Module, inputs: Any, embeddings: Tensor) -> Tensor:
        return embeddings.index_fill(-2, torch.tensor([spoilt], device=embeddings.device), torch.nan)

    spoilt = len(tokens) // 2
    handle = model.get_input_embeddings().register_forward_hook(spoil)
    try:
        positions = torch.arange(len(tokens), device=tokens.device)[None]
        logits = model(input_ids=tokens[None], position_ids=positions, use_cache=False, paged=look).logits[0]
    finally:
        handle.remove()
    layers = model.config.get_text_config().num_hidden_layers
    if not seen:
        raise Unsupported("its attention does not go through Transformers' attention interface")
    if len(seen) > layers:
        raise Unsupported(f"{len(seen)} layers attend where its configuration has {layers}, as in encoder-decoders")
    if sorted(seen) != list(range(layers)):
        raise Unsupported(f"{layers - len(seen)} of its {layers} layers do not attend (linear attention, state spaces)")
    if len(set(seen.values())) > 1:
        raise Unsupported("its layers differ in heads or head size")
    if not logits[torch.arange(len(tokens)) != spoilt].isfinite().all():
        raise Unsupported("something beside attention carries from token to token (state spaces, convolutions)")
    return Geometry(layers, *seen[0])


def _paged_logits(
    model: PreTrainedModel, inputs: dict[str, Tensor], positions: Tensor, geometry: Geometry, dtype: torch.dtype
) -> Tensor:
    """Logits computed in two iterations over a paged cache, those of _ROWS: (rows, vocabulary).

    inputs: by name, (1, T, ...); positions: (..., T); dtype: the cache's.
    """
    blocks = blocks_for(_TOKENS, _BLOCK)
    cache = torch.zeros(
        (2 * geometry.layers, blocks, _BLOCK, geometry.kv_heads, geometry.head_dim), dtype=dtype, device=model.device
    )
    logits = []
    for start, end in ((0, _SPLIT), (_SPLIT, _TOKENS)):
        slots = torch.arange(start, end, device=model.device)
        batch = plan_attention(
            np.array([end - start]), np.array([end]), np.arange(blocks, dtype=np.int32)[None], model.device,
            num_heads=geometry.heads, num_kv_heads=geometry.kv_heads, block_size=_BLOCK,
        )  # fmt: skip
        paged = PagedIteration(cache, slots, batch)
        some = {name: tensor[:, start:end] for name, tensor in inputs.items()}
        kept = slots[::2] - start
        ran = model(
            **some, position_ids=positions[..., start:end], use_cache=False, logits_to_keep=kept, paged=paged
        )  # fmt: skip
        if len(ran.logits[0]) != len(kept):
            raise Unsupported("it computes logits of other rows than it is asked for (logits_to_keep)")
        logits.append(ran.logits[0])
    return torch.cat(logits)


def first_line(error: Exception) -> str:
    """The beginning of what an exception says, as a sentence."""
    line = str(error).strip().split("\n")[0][:200]
    return line if line.endswith((".", "!", "?")) else f"{line}."
