"""How the PyTorch reference takes a batch: decodes of similar length together, padded; each prefill chunk by itself.

A Python loop over sequences costs more than their attention, and one padded gather of everything falls out of the
processor's cache. So decodes are sorted by length and taken together while what is gathered stays small.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

# Positions gathered for one group of decodes: 4 MB of keys and values at 128 floats each, about a core's cache.
GROUP_POSITIONS = 4096


@dataclass(frozen=True)
class SequenceGroup:
    """n sequences with q tokens each, their contexts padded to L positions, a multiple of the block size.

    Padding repeats a block of the sequence's own, so that nothing foreign is gathered; `stale` marks it, and what
    lies behind the context in a last block, since a not-a-number there would survive any mask.
    """

    tokens: Tensor  # int64 (n * q,): rows of the flattened batch
    blocks: Tensor  # int64 (n * L / block_size,): cache blocks
    stale: Tensor  # int64: which of the n * L gathered positions are not of the context
    positions: Tensor  # int64 (n, q): position of each token
    padded_len: int  # L
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    @property
    def causal_from_zero(self) -> bool:
        """A whole prompt up to here in one chunk that fills its blocks: plain lower-triangular attention."""
        return self.positions.shape == (1, self.padded_len)

    def mask(self, sliding_window: int | None) -> Tensor:
        """What each token sees: bool (n, 1, q, L); kept, since layers with the same window share it."""
        if sliding_window not in self._masks:
            seen_from = torch.arange(self.padded_len, device=self.positions.device)
            distance = self.positions[:, None, :, None] - seen_from
            mask = distance >= 0
            if sliding_window is not None:
                mask &= distance < sliding_window
            self._masks[sliding_window] = mask
        return self._masks[sliding_window]


def group_sequences(
    query_lens: np.ndarray, context_lens: np.ndarray, block_table: Tensor, block_size: int
) -> list[SequenceGroup]:
    """Every sequence of the batch in exactly one group; arguments as in `AttentionBatch`."""
    query_start = np.cumsum(query_lens) - query_lens
    host_table = block_table.cpu().numpy()
    blocks = -(-context_lens // block_size)
    members = [np.array([chunk]) for chunk in np.flatnonzero(query_lens > 1)]
    decodes = np.flatnonzero(query_lens == 1)
    decodes = decodes[np.argsort(blocks[decodes], kind="stable")]
    first = 0
    for last in range(1, len(decodes) + 1):
        full = last < len(decodes) and (last + 1 - first) * blocks[decodes[last]] * block_size > GROUP_POSITIONS
        if full or last == len(decodes):
            members.append(decodes[first:last])
            first = last
    groups = []
    for sequences in members:
        width = int(blocks[sequences].max())
        table = host_table[sequences, :width]
        table = np.where(np.arange(width) < blocks[sequences, None], table, table[:, :1])
        beyond = np.arange(width * block_size) >= context_lens[sequences, None]
        offsets = np.arange(query_lens[sequences[0]])
        groups.append(
            SequenceGroup(
                tokens=_int64((query_start[sequences, None] + offsets).ravel(), block_table.device),
                blocks=_int64(table.ravel(), block_table.device),
                stale=_int64(np.flatnonzero(beyond), block_table.device),
                positions=_int64((context_lens - query_lens)[sequences, None] + offsets, block_table.device),
                padded_len=width * block_size,
            )
        )
    return groups


def _int64(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.as_tensor(values.astype(np.int64), device=device)
