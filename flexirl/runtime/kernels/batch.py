"""One iteration's flattened batch as attention sees it: planned once on the host, read by every layer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from flexirl.runtime.kernels.groups import SequenceGroup, group_sequences
from flexirl.runtime.kernels.launch import choose_launch, programs_at_once
from flexirl.runtime.kernels.work_list import WorkList, has_long_tiles, pad_decodes, plan_work


@dataclass(frozen=True, eq=False)
class AttentionBatch:
    """T tokens of S sequences, those of one sequence side by side; prefill chunks and decodes in any order.

    Token i of a sequence with `query_len` tokens in this batch sits at position `context_len - query_len + i`.
    Entries of the block table beyond a sequence's own blocks are holes: they are never read through.
    """

    query_lens: np.ndarray  # int64 (S,): tokens of each sequence in this batch, at least 1
    context_lens: np.ndarray  # int64 (S,): tokens attended to, this batch's included
    block_table: Tensor  # int32 (S, max_blocks): the cache blocks of each sequence, in order
    block_size: int
    work: WorkList | None  # what the Triton version does; None for a batch on the CPU
    _gather_buffers: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = field(default_factory=dict, repr=False)

    @cached_property
    def groups(self) -> list[SequenceGroup]:
        """The sequences in groups that the PyTorch reference attends for together; made at first use."""
        return group_sequences(self.query_lens, self.context_lens, self.block_table, self.block_size)

    def gather_buffers(self, cache: Tensor) -> list[Tensor]:
        """Two buffers of the cache's kind that hold the largest group's blocks.

        All groups and layers use the same: memory that is new to the process costs more than copying into it.
        """
        kind = (cache.shape[1:], cache.dtype)
        if kind not in self._gather_buffers:
            largest = max(len(group.blocks) for group in self.groups)
            self._gather_buffers[kind] = [cache.new_empty(largest, *cache.shape[1:]) for _ in range(2)]
        return self._gather_buffers[kind]

    def copy_(self, other: AttentionBatch) -> None:
        """Puts another batch of decodes into this one's tensors, where a captured CUDA graph reads them.

        Of the same shapes, but that its block table may be narrower.
        """
        self.block_table[:, : other.block_table.shape[1]].copy_(other.block_table)
        self.context_lens[:] = other.context_lens
        if self.work is not None and other.work is not None:
            self.work.items.copy_(other.work.items)
            self.work.merges.copy_(other.work.merges)
        else:  # what the reference made of the batch before
            self.__dict__.pop("groups", None)
            self._gather_buffers.clear()


def plan_attention(
    query_lens: np.ndarray,
    context_lens: np.ndarray,
    block_table: np.ndarray | Tensor,
    device: torch.device | str,
    *,
    num_heads: int,
    num_kv_heads: int,
    block_size: int,
    graph_context: int | None = None,
) -> AttentionBatch:
    """Plans the attention of one iteration; call it once per iteration, then `paged_attention` once per layer.

    query_lens, context_lens: integers (S,), `1 <= query_len <= context_len`. block_table: int32 (S, max_blocks), on
    the host or already on the device; it must not change while the batch is in use. num_heads, num_kv_heads,
    block_size: the model's and the cache's shape.

    graph_context: for CUDA graphs of batches that only decode. Plans of the same S and `graph_context`, an upper bound
    of all their contexts, have work of the same shapes; so capture the model with one such batch, its block table as
    wide as can be, and before each replay put the next plan into it with `copy_`. A batch with fewer sequences is
    filled up with sequences of query and context length 1 whose tokens are not written (slot -1) and not used.
    """
    device = torch.device(device)
    query_lens, context_lens = np.asarray(query_lens, np.int64), np.asarray(context_lens, np.int64)
    table = torch.as_tensor(block_table, dtype=torch.int32)
    if device.type == "cpu":
        return AttentionBatch(query_lens, context_lens, table, block_size, None)
    group = num_heads // num_kv_heads
    slots = programs_at_once(device, choose_launch(has_long_tiles(query_lens, group))) / num_kv_heads
    work = plan_work(query_lens, context_lens, group, slots)
    if graph_context is not None:
        work = pad_decodes(work, len(query_lens), graph_context, slots)
    items, merges, table = _upload([work.items, work.merges, table], device)
    return AttentionBatch(query_lens, context_lens, table, block_size, replace(work, items=items, merges=merges))


def _upload(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """int32 tensors on a CUDA device; those from the host travel in one copy that nobody waits for."""
    # Starts at multiples of 16 bytes: Triton compiles a kernel anew for pointers aligned otherwise.
    sizes = [-(-tensor.numel() // 4) * 4 if tensor.device.type == "cpu" else 0 for tensor in tensors]
    packed = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=True)
    for part, tensor in zip(packed.split(sizes), tensors, strict=True):
        if tensor.device.type == "cpu":
            part[: tensor.numel()] = tensor.flatten()
    parts = packed.to(device, non_blocking=True).split(sizes)
    return [
        part[: tensor.numel()].view(tensor.shape) if tensor.device.type == "cpu" else tensor
        for part, tensor in zip(parts, tensors, strict=True)
    ]
