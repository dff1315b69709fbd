"""Swap: moves whole blocks of all layers between the paged cache and one contiguous buffer.

A buffer is what travels to host memory and back: a single large copy, instead of two small ones per block and layer.
"""

from __future__ import annotations

from torch import Tensor


def gather_blocks(cache: Tensor, block_ids: Tensor, buffer: Tensor) -> None:
    """Copies blocks of the cache into `buffer`, in place.

    cache: (planes, num_blocks, block_size, num_kv_heads, head_dim), the keys and values of all layers, 2 planes per
    layer; block_ids: int64 (n,); buffer: (n, planes, block_size, num_kv_heads, head_dim), contiguous.
    """
    gather_blocks_reference(cache, block_ids, buffer)


def scatter_blocks(buffer: Tensor, cache: Tensor, block_ids: Tensor) -> None:
    """The way back: copies `buffer` into blocks of the cache, in place; shapes as in `gather_blocks`."""
    scatter_blocks_reference(buffer, cache, block_ids)


def gather_blocks_reference(cache: Tensor, block_ids: Tensor, buffer: Tensor) -> None:
    """`gather_blocks` in PyTorch."""
    buffer.copy_(cache[:, block_ids].transpose(0, 1))


def scatter_blocks_reference(buffer: Tensor, cache: Tensor, block_ids: Tensor) -> None:
    """`scatter_blocks` in PyTorch."""
    cache[:, block_ids] = buffer.transpose(0, 1)
