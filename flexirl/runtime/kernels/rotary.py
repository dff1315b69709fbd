"""Rotary embedding (Su et al. 2021) and KV write in one pass over the queries, keys and values of a batch.

For a model whose own `apply_rotary_pos_emb` is taken out: the attention function then gets queries and keys unrotated,
and this rotates them on their way, keys straight into the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexirl.runtime.kernels.kv_write import write_kv_reference
from flexirl.runtime.kernels.optional_triton import jit, power_of_two, runs_triton, tl


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
    rotate_and_write = rotary_write_kv_triton if runs_triton(query) else rotary_write_kv_reference
    return rotate_and_write(query, key, value, cos, sin, key_cache, value_cache, slots)


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
    write_kv_reference(rotate(key, cos, sin), value, key_cache, value_cache, slots)
    return rotate(query, cos, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (T, heads, head_dim), each head's halves rotated against each other; cos, sin: (T, head_dim)."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def rotary_write_kv_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """`rotary_write_kv` in Triton; one program per token."""
    query, key, value = query.flatten(1), key.flatten(1), value.flatten(1)  # views, unless a token's heads lie apart
    num_kv_heads, head_dim = key_cache.shape[2:]
    tokens, num_heads = len(query), query.shape[1] // head_dim
    rotated = query.new_empty(tokens, num_heads, head_dim)
    _rotary_write_kv_kernel[(tokens,)](
        query, key, value, cos.contiguous(), sin.contiguous(), rotated, key_cache, value_cache, slots,
        query.stride(0), key.stride(0), value.stride(0),
        HEADS=num_heads, HEADS_TILE=power_of_two(num_heads),
        KV_HEADS=num_kv_heads, KV_HEADS_TILE=power_of_two(num_kv_heads),
        HALF=head_dim // 2, HALF_TILE=power_of_two(head_dim // 2), num_warps=4,
    )  # fmt: skip
    return rotated


@jit
def _rotary_write_kv_kernel(
    query_ptr, key_ptr, value_ptr, cos_ptr, sin_ptr, rotated_ptr, key_cache_ptr, value_cache_ptr, slots_ptr,
    query_stride, key_stride, value_stride,
    HEADS: tl.constexpr, HEADS_TILE: tl.constexpr, KV_HEADS: tl.constexpr, KV_HEADS_TILE: tl.constexpr,
    HALF: tl.constexpr, HALF_TILE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    column = tl.arange(0, HALF_TILE)
    cos = tl.load(cos_ptr + token * 2 * HALF + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + token * 2 * HALF + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    _rotate_heads(
        query_ptr + token * query_stride, rotated_ptr + token * HEADS * 2 * HALF, cos, sin, HEADS, HEADS_TILE, HALF,
        HALF_TILE,
    )  # fmt: skip
    if slot >= 0:
        at = slot * KV_HEADS * 2 * HALF
        _rotate_heads(
            key_ptr + token * key_stride, key_cache_ptr + at, cos, sin, KV_HEADS, KV_HEADS_TILE, HALF, HALF_TILE
        )
        element = tl.arange(0, KV_HEADS_TILE * 2 * HALF_TILE)
        inside = element < KV_HEADS * 2 * HALF
        value = tl.load(value_ptr + token * value_stride + element, mask=inside)
        tl.store(value_cache_ptr + at + element, value, mask=inside)


@jit
def _rotate_heads(
    source_ptr, target_ptr, cos, sin,
    HEADS: tl.constexpr, HEADS_TILE: tl.constexpr, HALF: tl.constexpr, HALF_TILE: tl.constexpr,
):  # fmt: skip
    """Rotates the first half of each head against the second, in fp32."""
    head, column = tl.arange(0, HEADS_TILE), tl.arange(0, HALF_TILE)
    inside = (head < HEADS)[:, None] & (column < HALF)[None, :]
    offset = head[:, None] * 2 * HALF + column[None, :]
    first = tl.load(source_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source_ptr + offset + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(target_ptr + offset, first * cos - second * sin, mask=inside)
    tl.store(target_ptr + offset + HALF, second * cos + first * sin, mask=inside)
