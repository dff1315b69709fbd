"""KV write against a loop over tokens."""

from __future__ import annotations

import pytest
import torch
from paged import DEVICE, DTYPES

from flexirl.runtime.kernels.kv_write import write_kv, write_kv_reference, write_kv_triton


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("write", [write_kv, write_kv_reference, write_kv_triton])
@pytest.mark.parametrize("tokens, kv_heads, head_dim", [(1, 1, 64), (13, 3, 80), (29, 2, 128)])
def test_tokens_land_in_their_slots(write, tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    # Keys and values as slices of one projection: the tokens of a slice do not lie side by side.
    fused = torch.randn(tokens, 2, kv_heads, head_dim, generator=generator).to(DEVICE, dtype)
    key, value = fused[:, 0], fused[:, 1]
    caches = torch.full((2, 5, 8, kv_heads, head_dim), 7.0).to(DEVICE, dtype)
    slots = torch.randperm(40, generator=generator)[:tokens]
    slots[::4] = -1
    expected = caches.clone()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[0, slot // 8, slot % 8], expected[1, slot // 8, slot % 8] = key[token], value[token]
    write(key, value, caches[0], caches[1], slots.to(DEVICE))
    assert caches.equal(expected)
