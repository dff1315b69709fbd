"""Work list: what the programs of paged attention on a GPU do, balanced over the chip by an explicit cost function.

A work item is one tile of a sequence's query tokens against one range of its context. The plan follows FlashInfer
(Ye et al. 2025: plan once on the host, run once per layer), with every sequence split by itself, so that a long decode
is spread over the chip whatever else is in the batch. Items are handed out in list order to whichever program is free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from flexirl.runtime.kernels.optional_triton import power_of_two
from flexirl.runtime.kernels.ragged import ramps

# Costs are counted in cached positions that a short item reads: 15 ns of a multiprocessor's share of an H200's memory
# bandwidth at 128 dimensions. They are estimates; `flexirl.benches.kernels` shows what they lead to.
SHORT_START = 128.0  # first loads that nothing hides, queries in, result out
LONG_START = 640.0  # the same, and partial results of 128 rows written and read back
LONG_POSITION = 1.5  # 65 kFLOP at about 3 TFLOP/s, what a multiprocessor sustains
# Ranges begin at multiples of this, which every KV tile divides, and are no shorter than two of it.
SPLIT_ALIGN = 128
MIN_SPLIT = 256.0

ITEM_FIELDS = 8  # sequence, first token, tokens, position of the first token, kv begin, kv end, partial row, unused
MERGE_FIELDS = 4  # token, first partial row, rows from one split to the next, splits


@dataclass(frozen=True)
class WorkList:
    """One plan; made on the host.

    items: int32 (N, ITEM_FIELDS), partial row -1 where the result goes straight to its place; merges: int32
    (M, MERGE_FIELDS), one per token whose context is split. Rows without tokens or splits do nothing. partial_rows:
    rows of partial results; short, long: whether there are such items.
    """

    items: Tensor
    merges: Tensor
    partial_rows: int
    short: bool
    long: bool


def tile_rows(group: int) -> tuple[int, int]:
    """Rows of a short and of a long query tile; a token has `group` rows, its query heads of one KV head.

    Tiles of up to 16 rows (decodes, ends of chunks) are bound by memory, others by arithmetic: 16 is the least side of
    a tensor-core product, and with 128 rows a KV tile from the L2 cache feeds the tensor cores for long enough.
    """
    return max(16, power_of_two(group)), max(128, power_of_two(group))


def item_cost(positions: np.ndarray, long: np.ndarray) -> np.ndarray:
    """Cost of items that read `positions` cached positions each; `long`: bool, which of them are long."""
    return np.where(long, LONG_START + LONG_POSITION * positions, SHORT_START + positions)


def plan_work(query_lens: np.ndarray, context_lens: np.ndarray, group: int, slots: float) -> WorkList:
    """Splits the batch into items for `slots` programs at a time (per KV head) and orders them.

    With `ideal` = total cost / slots, a target t costs about start x ideal / t in additional starts and t / 2 in
    programs that idle at the end, which is least at t = sqrt(2 x start x ideal). No item exceeds its kind's target by
    more than its start and alignment, so list scheduling (Graham 1969) ends by ideal + O(sqrt(ideal)).
    """
    short_rows, long_rows = tile_rows(group)
    # Query tiles: every sequence in long tiles, the last one with what is left, which may be short.
    tile_tokens = np.where(query_lens * group <= short_rows, short_rows // group, long_rows // group)
    tiles = -(-query_lens // tile_tokens)
    sequence = np.repeat(np.arange(len(query_lens)), tiles)
    skipped = ramps(tiles) * tile_tokens[sequence]
    tokens = np.minimum(tile_tokens[sequence], query_lens[sequence] - skipped)
    first_token = (np.cumsum(query_lens) - query_lens)[sequence] + skipped
    position = (context_lens - query_lens)[sequence] + skipped
    seen = position + tokens
    long = tokens * group > short_rows

    ideal = item_cost(seen, long).sum() / slots
    target = np.maximum(MIN_SPLIT, np.sqrt(2.0 * ideal * np.where(long, LONG_START, SHORT_START)))
    steps = -(-seen // SPLIT_ALIGN)
    work = seen * np.where(long, LONG_POSITION, 1.0)
    splits = np.minimum(np.ceil(work / target).astype(np.int64), steps)

    tile = np.repeat(np.arange(len(tokens)), splits)
    split = ramps(splits)
    begin = split * steps[tile] // splits[tile] * SPLIT_ALIGN
    end = np.minimum((split + 1) * steps[tile] // splits[tile] * SPLIT_ALIGN, seen[tile])
    rows = np.where(splits > 1, splits * tokens, 0)
    first_row = np.cumsum(rows) - rows
    partial = np.where(splits[tile] > 1, first_row[tile] + split * tokens[tile], -1)
    costs = item_cost(end - begin, long[tile])

    order = _interleave(costs, long[tile])
    columns = (
        sequence[tile],
        first_token[tile],
        tokens[tile],
        position[tile],
        begin,
        end,
        partial,
        np.zeros_like(tile),
    )
    merged = np.repeat(np.arange(len(tokens)), np.where(splits > 1, tokens, 0))
    offset = ramps(np.where(splits > 1, tokens, 0))
    merges = (first_token[merged] + offset, first_row[merged] + offset, tokens[merged], splits[merged])
    return WorkList(
        torch.from_numpy(np.stack(columns, 1)[order].astype(np.int32)),
        torch.from_numpy(np.stack(merges, 1).astype(np.int32)),
        int(rows.sum()),
        short=not long.all(),
        long=bool(long.any()),
    )


def has_long_tiles(query_lens: np.ndarray, group: int) -> bool:
    """Whether a batch has more query tokens of one sequence than a short tile holds."""
    return bool(query_lens.max() * group > tile_rows(group)[0])


def pad_decodes(work: WorkList, sequences: int, longest_context: int, slots: float) -> WorkList:
    """The same plan of `sequences` decodes, as large as any with contexts up to `longest_context` can be.

    A plan has at most one item per sequence and one per target, which grows with the square root of the work.
    """
    ideal = sequences * (SHORT_START + longest_context) / slots
    most = sequences + math.ceil(slots * math.sqrt(ideal / (2.0 * SHORT_START)))
    items = work.items.new_zeros(most, ITEM_FIELDS)
    items[: len(work.items)] = work.items
    merges = work.merges.new_zeros(sequences, MERGE_FIELDS)
    merges[: len(work.merges)] = work.merges
    return replace(work, items=items, merges=merges, partial_rows=most)


def _interleave(costs: np.ndarray, long: np.ndarray) -> np.ndarray:
    """Within a kind the dearest first; the kinds in step, so that arithmetic and memory are busy at the same time."""
    share = np.empty(len(costs))
    for kind in (np.flatnonzero(long), np.flatnonzero(~long)):
        kind = kind[np.argsort(-costs[kind], kind="stable")]
        share[kind] = (np.cumsum(costs[kind]) - 0.5 * costs[kind]) / costs[kind].sum()
    return np.argsort(share, kind="stable")
