"""Blocks gathered and scattered against loops, and there and back again."""

from __future__ import annotations

import pytest
import torch
from paged import DEVICE, DTYPES

from flexirl.runtime.kernels import swap


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["", "_reference", "_triton"])
@pytest.mark.parametrize("block", [(16, 2, 64), (5, 3, 80), (16, 8, 128)])
def test_blocks_go_out_and_come_back(block: tuple[int, int, int], kind: str, dtype: torch.dtype) -> None:
    gather, scatter = getattr(swap, f"gather_blocks{kind}"), getattr(swap, f"scatter_blocks{kind}")
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(4, 9, *block, generator=generator).to(DEVICE, dtype)
    there, back = [7, 0, 5], [1, 8, 2]
    buffer = torch.empty(3, 4, *block, device=DEVICE, dtype=dtype)
    gather(cache, torch.tensor(there, device=DEVICE), buffer)
    expected = cache.clone()
    for i in range(3):
        for plane in range(4):
            assert buffer[i, plane].equal(cache[plane, there[i]])
            expected[plane, back[i]] = cache[plane, there[i]]
    scatter(buffer, cache, torch.tensor(back, device=DEVICE))
    assert cache.equal(expected)
