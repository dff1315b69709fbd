"""One iteration's flattened batch as attention sees it: planned once on the host, read by every layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from flexirl.runtime.kernels.groups import SequenceGroup, group_sequences


@dataclass(frozen=True)
class AttentionBatch:
    """T tokens of S sequences, those of one sequence side by side; prefill chunks and decodes in any order.

    Token i of a sequence with `query_len` tokens in this batch sits at position `context_len - query_len + i`.
    Entries of the block table beyond a sequence's own blocks are holes: they are never read through.
    """

    query_lens: np.ndarray  # int64 (S,): tokens of each sequence in this batch, at least 1
    host_context_lens: np.ndarray  # int64 (S,): tokens attended to, this batch's included
    query_start: Tensor  # int32 (S + 1,): where each sequence's tokens begin in the flattened batch
    context_lens: Tensor  # int32 (S,): `host_context_lens` on the device
    block_table: Tensor  # int32 (S, max_blocks): the cache blocks of each sequence, in order
    block_size: int

    @cached_property
    def groups(self) -> list[SequenceGroup]:
        """The sequences in groups that the PyTorch reference attends for together; made at first use."""
        return group_sequences(self.query_lens, self.host_context_lens, self.block_table, self.block_size)


def plan_attention(
    query_lens: np.ndarray,
    context_lens: np.ndarray,
    block_table: np.ndarray | Tensor,
    device: torch.device | str,
    *,
    num_heads: int,
    num_kv_heads: int,
    block_size: int,
) -> AttentionBatch:
    """Plans the attention of one iteration; call it once per iteration, then `paged_attention` once per layer.

    query_lens, context_lens: integers (S,), `1 <= query_len <= context_len`. block_table: int32 (S, max_blocks), on
    the host or already on the device; it must not change while the batch is in use. num_heads, num_kv_heads,
    block_size: the model's and the cache's shape.
    """
    query_lens, context_lens = np.asarray(query_lens, np.int64), np.asarray(context_lens, np.int64)
    query_start = np.zeros(len(query_lens) + 1, np.int32)
    np.cumsum(query_lens, out=query_start[1:])
    return AttentionBatch(
        query_lens,
        context_lens,
        torch.as_tensor(query_start, device=device),
        torch.as_tensor(context_lens.astype(np.int32), device=device),
        torch.as_tensor(block_table, dtype=torch.int32, device=device),
        block_size,
    )
