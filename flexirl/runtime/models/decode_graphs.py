"""Batches that only decode, padded to a few sizes in buffers that stay where they are: on CUDA, one graph a size.

Launching the kernels of a decode one by one takes the host longer than the device needs for them. Replaying a captured
graph takes one launch, but reads the addresses and sizes that it was captured with.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexirl.runtime.kernels import AttentionBatch
from flexirl.runtime.live.executor import Batch

# Logits (size, vocabulary) of int64 tokens, positions and slots (size,), in a batch planned for attention.
Forward = Callable[[Tensor, Tensor, Tensor, AttentionBatch], Tensor]
# Plans attention from query lengths, context lengths, block table and the longest context that can come.
Plan = Callable[[np.ndarray, np.ndarray, np.ndarray, int], AttentionBatch]
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


def padded_sizes(most: int) -> list[int]:
    """Sizes up to `most`, which is one of them: 1, 2, 4, 8, then every 16, as in nano-vllm."""
    return [*(size for size in (1, 2, 4, 8) if size < most), *range(16, most, 16), most]


class DecodeGraphs:
    """The model's forward for up to `most` decodes at a time.

    table_width: blocks of the longest sequence; capture: makes of a function without arguments, whose tensors stay
    where they are, one that does the same and returns the same tensor; see `capture_graph`.
    """

    def __init__(
        self, forward: Forward, plan: Plan, most: int, table_width: int, block_size: int, device: torch.device,
        capture: Capture,
    ) -> None:  # fmt: skip
        self._plan = plan
        self._longest = table_width * block_size
        self._sizes = padded_sizes(most)
        # Largest first, so that the smaller ones fit into the memory that it leaves.
        self._padded = {
            size: _Padded(forward, plan, size, table_width, self._longest, device, capture)
            for size in reversed(self._sizes)
        }
        self._filled: tuple[_Padded, int] | None = None

    def takes(self, batch: Batch) -> bool:
        """Whether a batch only decodes; a chunk of one token is a decode by another name."""
        return len(batch.tokens) == len(batch.query_lens)

    def fill(self, batch: Batch) -> None:
        """Puts a batch, of N decodes, into the buffers of the next size."""
        decodes = len(batch.tokens)
        padded = self._padded[self._sizes[bisect_left(self._sizes, decodes)]]
        padded.fill(batch, self._plan, self._longest)
        self._filled = padded, decodes

    def run(self) -> Tensor:
        """Logits (N, vocabulary) of the batch; valid until the next run."""
        assert self._filled is not None
        padded, decodes = self._filled
        return padded.run()[:decodes]


class _Padded:
    """The buffers of one size and what runs on them.

    Rows beyond the batch's are sequences of one token in the first block, whose key and value are written nowhere.
    """

    def __init__(
        self, forward: Forward, plan: Plan, size: int, table_width: int, longest: int, device: torch.device,
        capture: Capture,
    ) -> None:  # fmt: skip
        self._lens = np.ones((2, size), np.int64)  # of queries and of contexts
        # Tokens, positions, slots.
        self._staged = torch.zeros((3, size), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._staged[2] = -1
        self._inputs = self._staged.to(device, copy=True)
        tokens, positions, slots = self._inputs
        attention = plan(self._lens[0], self._lens[1].copy(), np.zeros((size, table_width), np.int32), longest)
        self._attention = attention
        self.run = capture(lambda: forward(tokens, positions, slots, attention))

    def fill(self, batch: Batch, plan: Plan, longest: int) -> None:
        """Puts the batch into the first rows, padding into the others."""
        decodes, widest = batch.block_table.shape
        staged = self._staged.numpy()
        for row, values, padding in zip(staged, (batch.tokens, batch.positions, batch.slots), (0, 0, -1), strict=True):
            row[:decodes], row[decodes:] = values, padding
        self._inputs.copy_(self._staged, non_blocking=True)
        query_lens, context_lens = self._lens
        context_lens[:decodes], context_lens[decodes:] = batch.context_lens, 1
        table = np.zeros((len(context_lens), widest), np.int32)
        table[:decodes] = batch.block_table
        self._attention.copy_(plan(query_lens, context_lens, table, longest))


def capture_graph(pool: Any) -> Capture:
    """Captures CUDA graphs whose memory comes from one pool (`torch.cuda.graph_pool_handle`)."""

    def capture(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles kernels and lets libraries take the memory they keep
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits = run()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay

    return capture
