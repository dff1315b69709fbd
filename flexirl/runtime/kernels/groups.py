"""How the PyTorch reference takes a batch: decodes of similar length together, padded; each prefill chunk by itself.

A Python loop over sequences costs more than their attention, and one padded gather of everything falls out of the
processor's cache. So decodes are sorted by length and taken together while what is gathered stays small.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from flexirl.runtime.kernels.ragged import ramps, starts

# Positions gathered for one group of decodes: 4 MB of keys and values at 128 floats each.
GROUP_POSITIONS = 4096


@dataclass(frozen=True, eq=False)
class SequenceGroup:
    """n sequences with q tokens each, their contexts padded to L positions, a multiple of the block size.

    Padding repeats the sequence's own first block, so that nothing foreign is gathered. `stale` is what lies behind the
    context in a last block: a not-a-number left there would survive any mask.
    """

    sequences: int  # n
    padded_len: int  # L
    tokens: Tensor  # int64 (n * q,): rows of the flattened batch
    positions: Tensor  # int64 (n * q,): of each token in its sequence
    blocks: Tensor  # int64 (n * L / block_size,): cache blocks
    stale: Tensor  # int64: which of the n * L gathered positions
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    @property
    def is_plain_causal(self) -> bool:
        """A whole prompt up to here in one chunk that fills its blocks: plain lower-triangular attention."""
        return self.sequences == 1 and len(self.tokens) == self.padded_len

    def mask(self, sliding_window: int | None) -> Tensor:
        """What each token sees: bool (n, 1, q, L); kept, since layers with the same window share it."""
        if sliding_window not in self._masks:
            seen_from = self.positions.view(self.sequences, 1, -1, 1)
            distance = seen_from - torch.arange(self.padded_len, device=seen_from.device)
            mask = distance >= 0
            if sliding_window is not None:
                mask &= distance < sliding_window
            self._masks[sliding_window] = mask
        return self._masks[sliding_window]


def group_sequences(
    query_lens: np.ndarray, context_lens: np.ndarray, block_table: Tensor, block_size: int
) -> list[SequenceGroup]:
    """Every sequence of the batch in exactly one group; arguments as in `AttentionBatch`."""
    blocks = -(-context_lens // block_size)
    chunks, decodes = np.flatnonzero(query_lens > 1), np.flatnonzero(query_lens == 1)
    decodes = decodes[np.argsort(blocks[decodes], kind="stable")]
    order = np.concatenate([chunks, decodes])
    sizes = [1] * len(chunks) + _group_sizes((blocks[decodes] * block_size).tolist())
    # From here on one row per sequence in this order: everything is made for all groups at once and then divided.
    first_token = (np.cumsum(query_lens) - query_lens)[order]
    query_lens, context_lens, blocks = query_lens[order], context_lens[order], blocks[order]
    first = starts(np.array(sizes))[:-1]  # rows at which groups begin
    widths = np.maximum.reduceat(blocks, first)
    width = np.repeat(widths, sizes)
    tails = width * block_size - context_lens

    offset = ramps(query_lens)
    tokens = np.repeat(first_token, query_lens) + offset
    positions = np.repeat(context_lens - query_lens, query_lens) + offset
    cell = ramps(width)
    table = block_table.cpu().numpy()[np.repeat(order, width), cell]
    table = np.where(cell < np.repeat(blocks, width), table, 0).astype(np.int64)
    stale = np.repeat(ramps(np.array(sizes)) * width * block_size + context_lens, tails) + ramps(tails)

    parts = [
        torch.from_numpy(flat).to(block_table.device).split(np.add.reduceat(lengths, first).tolist())
        for flat, lengths in ((tokens, query_lens), (positions, query_lens), (table, width), (stale, tails))
    ]
    return list(map(SequenceGroup, sizes, (widths * block_size).tolist(), *parts))


def _group_sizes(lengths: list[int]) -> list[int]:
    """Cuts ascending lengths into runs of at most GROUP_POSITIONS, each padded to its longest; one is always taken."""
    sizes: list[int] = []
    for length in lengths:
        if sizes and (sizes[-1] + 1) * length <= GROUP_POSITIONS:
            sizes[-1] += 1
        else:
            sizes.append(1)
    return sizes
