"""KV write: puts the keys and values of a batch's tokens into their slots of the paged cache."""

from __future__ import annotations

from torch import Tensor


def write_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """Writes `key` and `value` (T, num_kv_heads, head_dim) into the caches, in place.

    key_cache, value_cache: (num_blocks, block_size, num_kv_heads, head_dim), contiguous. slots: int64 (T,),
    block * block_size + offset; tokens with a negative slot are not written, and no slot may appear twice.
    """
    write_kv_reference(key, value, key_cache, value_cache, slots)


def write_kv_reference(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """`write_kv` in PyTorch."""
    written = slots >= 0
    if not written.all():
        key, value, slots = key[written], value[written], slots[written]
    key_cache.flatten(0, 1)[slots] = key
    value_cache.flatten(0, 1)[slots] = value
