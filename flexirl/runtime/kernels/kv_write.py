"""KV write: puts the keys and values of a batch's tokens into their slots of the paged cache."""

from __future__ import annotations

from torch import Tensor

from flexirl.runtime.kernels.optional_triton import jit, power_of_two, runs_triton, tl


def write_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """Writes `key` and `value` (T, num_kv_heads, head_dim) into the caches, in place.

    key_cache, value_cache: (num_blocks, block_size, num_kv_heads, head_dim), contiguous, of the same dtype. slots:
    int64 (T,), block * block_size + offset; tokens with a negative slot are not written, and no slot may appear twice.
    """
    write = write_kv_triton if runs_triton(key) else write_kv_reference
    write(key, value, key_cache, value_cache, slots)


def write_kv_reference(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """`write_kv` in PyTorch."""
    written = slots >= 0
    if not written.all():
        key, value, slots = key[written], value[written], slots[written]
    key_cache.flatten(0, 1)[slots] = key
    value_cache.flatten(0, 1)[slots] = value


def write_kv_triton(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """`write_kv` in Triton; one program per token."""
    key, value = key.flatten(1), value.flatten(1)  # views, unless the heads of a token lie apart
    tokens, width = key.shape
    _write_kv_kernel[(tokens,)](
        key, value, key_cache, value_cache, slots, key.stride(0), value.stride(0),
        WIDTH=width, TILE=power_of_two(width), num_warps=4,
    )  # fmt: skip


@jit
def _write_kv_kernel(
    key_ptr, value_ptr, key_cache_ptr, value_cache_ptr, slots_ptr, key_stride, value_stride,
    WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    column = tl.arange(0, TILE)
    inside = column < WIDTH
    key = tl.load(key_ptr + token * key_stride + column, mask=inside)
    value = tl.load(value_ptr + token * value_stride + column, mask=inside)
    tl.store(key_cache_ptr + slot * WIDTH + column, key, mask=inside)
    tl.store(value_cache_ptr + slot * WIDTH + column, value, mask=inside)
