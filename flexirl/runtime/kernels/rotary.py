"""Rotary embedding (Su et al. 2021) and KV write in one pass over the queries, keys and values of a batch.

For a model whose own `apply_rotary_pos_emb` is taken out: the attention function then gets queries and keys unrotated,
and this rotates them on their way, keys straight into the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexirl.runtime.kernels.kv_write import write_kv_reference


def rotary_write_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """Rotates `query` and `key`, writes key and value into the caches in place, returns the rotated query.

    query: (T, num_heads, head_dim); cos, sin: (T, head_dim), both halves alike, as Transformers' rotary embeddings
    yield them; key, value, caches and slots as in `write_kv`. Halves are rotated against each other (`rotate_half`).
    """
    return rotary_write_kv_reference(query, key, value, cos, sin, key_cache, value_cache, slots)


def rotary_write_kv_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """`rotary_write_kv` in PyTorch."""
    write_kv_reference(_rotate(key, cos, sin), value, key_cache, value_cache, slots)
    return _rotate(query, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]
