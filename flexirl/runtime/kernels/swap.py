"""Swap: moves whole blocks of all layers between the paged cache and one contiguous buffer.

A buffer is what travels to host memory and back: one large copy, instead of two small ones per block and layer.
"""

from __future__ import annotations

from torch import Tensor

from flexirl.runtime.kernels.optional_triton import jit, runs_triton, tl


def gather_blocks(cache: Tensor, block_ids: Tensor, buffer: Tensor) -> None:
    """Copies blocks of the cache into `buffer`, in place; all on one device.

    cache: (planes, num_blocks, block_size, num_kv_heads, head_dim), contiguous, the keys and values of all layers, 2
    planes per layer; block_ids: int64 (n,); buffer: (n, planes, block_size, num_kv_heads, head_dim), contiguous.
    """
    gather = gather_blocks_triton if runs_triton(cache) else gather_blocks_reference
    gather(cache, block_ids, buffer)


def scatter_blocks(buffer: Tensor, cache: Tensor, block_ids: Tensor) -> None:
    """The way back: copies `buffer` into blocks of the cache, in place; shapes as in `gather_blocks`, ids distinct."""
    scatter = scatter_blocks_triton if runs_triton(cache) else scatter_blocks_reference
    scatter(buffer, cache, block_ids)


def gather_blocks_reference(cache: Tensor, block_ids: Tensor, buffer: Tensor) -> None:
    """`gather_blocks` in PyTorch."""
    buffer.copy_(cache[:, block_ids].transpose(0, 1))


def scatter_blocks_reference(buffer: Tensor, cache: Tensor, block_ids: Tensor) -> None:
    """`scatter_blocks` in PyTorch."""
    cache[:, block_ids] = buffer.transpose(0, 1)


def gather_blocks_triton(cache: Tensor, block_ids: Tensor, buffer: Tensor) -> None:
    """`gather_blocks` in Triton; one program per block and plane."""
    _launch(cache, block_ids, buffer, gather=True)


def scatter_blocks_triton(buffer: Tensor, cache: Tensor, block_ids: Tensor) -> None:
    """`scatter_blocks` in Triton; one program per block and plane."""
    _launch(cache, block_ids, buffer, gather=False)


def _launch(cache: Tensor, block_ids: Tensor, buffer: Tensor, gather: bool) -> None:
    planes, num_blocks = cache.shape[:2]
    _copy_kernel[(len(block_ids) * planes,)](
        cache, block_ids, buffer, planes, num_blocks,
        ELEMENTS=cache[0, 0].numel(), TILE=4096, GATHER=gather, num_warps=4,
    )  # fmt: skip


@jit
def _copy_kernel(
    cache_ptr, block_ids_ptr, buffer_ptr, planes, num_blocks,
    ELEMENTS: tl.constexpr, TILE: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    block = tl.load(block_ids_ptr + index // planes)
    cache_ptr += (index % planes * num_blocks + block) * ELEMENTS
    buffer_ptr += index * ELEMENTS
    for begin in range(0, ELEMENTS, TILE):
        offset = begin + tl.arange(0, TILE)
        inside = offset < ELEMENTS
        if GATHER:
            tl.store(buffer_ptr + offset, tl.load(cache_ptr + offset, mask=inside), mask=inside)
        else:
            tl.store(cache_ptr + offset, tl.load(buffer_ptr + offset, mask=inside), mask=inside)
