"""A paged cache to attend over, and the attention it must give, computed sequence by sequence in fp64.

The Triton versions run on a GPU where there is one, in three dtypes, and else in Triton's interpreter, in fp32 only:
its bf16 is wrong. Where Triton is not installed, tests that import this are skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flexirl.runtime.kernels.batch import AttentionBatch, plan_attention
from flexirl.runtime.kernels.work_list import plan_work

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
DTYPES = [
    torch.float32,
    pytest.param(torch.bfloat16, marks=needs_gpu),
    pytest.param(torch.float16, marks=needs_gpu),
]
# Largest error allowed on values of order 1: some units in the last place of each dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """That `actual`, computed in `dtype`, is `expected`, computed in fp64."""
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual.double().cpu(), expected.double().cpu(), atol=tolerance, rtol=tolerance)


class Paged:
    """A batch of sequences whose keys and values lie in shuffled blocks of a cache; whatever is not theirs is NaN.

    The block table's holes hold -1 and numbers of blocks that do not exist.
    """

    def __init__(
        self,
        sequences: Sequence[tuple[int, int]],
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 64,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: str = DEVICE,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.query_lens, self.context_lens = np.array(sequences).T
        self.heads, self.kv_heads, self.block_size, self.scale = heads, kv_heads, block_size, head_dim**-0.5
        blocks = -(-self.context_lens // block_size)
        free = rng.permutation(blocks.sum() + 3)
        shape = (len(free), block_size, kv_heads, head_dim)
        self.table = np.full((len(sequences), blocks.max() + 2), -1, np.int32)
        self.table[:, -1] = 1_000_000_000
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        caches = torch.full((2, *shape), torch.nan)
        for row, context, count in zip(self.table, self.context_lens, blocks, strict=True):
            row[:count], free = free[:count], free[count:]
            position = np.arange(context)
            slots = torch.from_numpy(row[position // block_size].astype(np.int64) * block_size + position % block_size)
            drawn = torch.from_numpy(rng.standard_normal((2, context, kv_heads, head_dim), np.float32)).to(dtype)
            caches.flatten(1, 2)[:, slots] = drawn.float()
            self.keys.append(drawn[0])
            self.values.append(drawn[1])
        query = torch.from_numpy(rng.standard_normal((self.query_lens.sum(), heads, head_dim), np.float32))
        self.query = query.to(device, dtype)
        self.key_cache, self.value_cache = caches.to(device, dtype)
        self.device = device

    def plan(self, slots: float | None = None) -> AttentionBatch:
        """The batch as its device gets it, or with the work planned for `slots` programs."""
        batch = plan_attention(
            self.query_lens,
            self.context_lens,
            self.table,
            self.device,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            block_size=self.block_size,
        )
        if slots is None:
            return batch
        work = plan_work(self.query_lens, self.context_lens, self.heads // self.kv_heads, slots)
        work = replace(work, items=work.items.to(self.device), merges=work.merges.to(self.device))
        return replace(batch, work=work)

    def expected(self, sliding_window: int | None = None, softcap: float | None = None) -> Tensor:
        """Attention of every token, fp64 (T, heads, head_dim)."""
        attended = []
        queries = self.query.double().cpu().split(self.query_lens.tolist())
        for query, key, value in zip(queries, self.keys, self.values, strict=True):
            position = torch.arange(len(key) - len(query), len(key))[:, None]
            seen = torch.arange(len(key))[None, :] <= position
            if sliding_window is not None:
                seen &= torch.arange(len(key))[None, :] > position - sliding_window
            repeats = self.heads // self.kv_heads
            q = query.transpose(0, 1)
            k, v = (each.double().repeat_interleave(repeats, 1).transpose(0, 1) for each in (key, value))
            if softcap is None:
                attended.append(F.scaled_dot_product_attention(q, k, v, seen, scale=self.scale).transpose(0, 1))
            else:
                scores = (softcap * torch.tanh(q @ k.mT * self.scale / softcap)).masked_fill(~seen, -torch.inf)
                attended.append((scores.softmax(-1) @ v).transpose(0, 1))
        return torch.cat(attended)
