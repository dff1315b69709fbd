"""Our attention inside any Transformers model: registered once, it takes each layer's queries, keys and values.

A model passes keyword arguments it does not know down to the attention function; `paged` is the one that carries an
iteration. With it, keys and values go to the paged cache and queries attend over block tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from flexirl.runtime.kernels import AttentionBatch, paged_attention, rotary_write_kv, write_kv
from flexirl.runtime.live.executor import Interrupted

NAME = "flexirl_paged"
Rotation = tuple[Tensor, Tensor]  # cosines and sines of a rotary embedding, each (T, dim), both halves alike
_LEFT = "_left_rotation"  # the attribute of an attention layer between its own code and the attention function


class Unsupported(Exception):
    """The model asks for an attention that is not implemented; the message says which, to follow a colon."""


class Attend(Protocol):
    """What a layer's attention is handed to: query (T, heads, dim), key and value (T, kv_heads, dim)."""

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        sliding_window: int | None,
        softcap: float | None,
        rotation: Rotation | None,
    ) -> Tensor:
        """The attended values, (T, heads, dim); rotation: what query and key are still to be rotated by."""
        ...


class PagedIteration:
    """Attention of one iteration over the paged cache.

    cache: (2 x layers, num_blocks, block_size, kv_heads, dim), keys and values of the layers in turn; slots: int64
    (T,); interrupted: asked between layers, True breaks the iteration off; None: never.
    """

    def __init__(
        self, cache: Tensor, slots: Tensor, batch: AttentionBatch, interrupted: Callable[[], bool] | None = None
    ) -> None:
        self._cache = cache
        self._slots = slots
        self._batch = batch
        self._interrupted = interrupted
        self._layer_done: Any = None

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        sliding_window: int | None,
        softcap: float | None,
        rotation: Rotation | None,
    ) -> Tensor:
        """See `Attend`; raises Interrupted."""
        if self._interrupted is not None:
            self._keep_pace(query)
            if self._interrupted():
                raise Interrupted
        keys, values = self._cache[2 * layer], self._cache[2 * layer + 1]
        if rotation is None:
            write_kv(key, value, keys, values, self._slots)
        else:
            query = rotary_write_kv(query, key, value, *rotation, keys, values, self._slots)
        return paged_attention(query, keys, values, self._batch, scale, sliding_window, softcap)

    def _keep_pace(self, query: Tensor) -> None:
        """Stays at most one layer ahead of the device, or an iteration would be launched whole before it can stop."""
        if query.is_cuda:
            done = torch.cuda.Event()
            done.record()
            if self._layer_done is not None:
                self._layer_done.synchronize()
            self._layer_done = done


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    paged: Attend | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What Transformers calls for each layer, with query (1, heads, T, dim); returns (1, T, heads, dim).

    Of `others` nothing matters here, or the trial run that follows loading shows that it does.
    """
    if paged is None:
        raise Unsupported("its layers do not pass on what the attention function needs")
    if attention_mask is not None:
        raise Unsupported("it masks attention in a way of its own")
    if s_aux is not None:
        raise Unsupported("it has attention sinks")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))
    layer: int = module.layer_idx  # type: ignore[assignment]
    rotation: Rotation | None = module.__dict__.pop(_LEFT, None)
    if rotation is not None and rotation[0].shape[-1] != query.shape[-1]:
        raise Unsupported("it rotates a part of each head")
    return paged(layer, queries, keys, values, scale, sliding_window, softcap, rotation)[None], None


def leave_rotation(module: nn.Module, cos: Tensor, sin: Tensor) -> None:
    """Has an attention layer's next call of our attention rotate queries and keys; cos, sin: (1, T, dim)."""
    module.__dict__[_LEFT] = cos[0], sin[0]


AttentionInterface.register(NAME, _attention)
