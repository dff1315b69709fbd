"""Rotary embedding as a rotation of complex numbers, and the KV write that goes with it."""

from __future__ import annotations

import pytest
import torch
from paged import DEVICE, DTYPES, assert_near
from torch import Tensor

from flexirl.runtime.kernels.rotary import rotary_write_kv, rotary_write_kv_reference, rotary_write_kv_triton


def rotated(x: Tensor, angle: Tensor) -> Tensor:
    """The halves of each head as real and imaginary parts, turned by `angle` (T, head_dim / 2)."""
    first, second = x.double().cpu().chunk(2, -1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([turned.real, turned.imag], -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [rotary_write_kv, rotary_write_kv_reference, rotary_write_kv_triton])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(8, 2, 64), (7, 1, 80), (3, 3, 96), (4, 1, 128)])
def test_rotates_and_writes(kernel, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    tokens = 11
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(tokens, heads + 2 * kv_heads, head_dim, generator=generator).to(DEVICE, dtype)
    query, key, value = fused.split([heads, kv_heads, kv_heads], 1)
    position = torch.randint(0, 5000, (tokens,), generator=generator).double()
    angle = position[:, None] * 10_000.0 ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    cos, sin = (torch.cat([part, part], -1).to(DEVICE, dtype) for part in (angle.cos(), angle.sin()))
    caches = torch.zeros(2, 3, 8, kv_heads, head_dim, device=DEVICE, dtype=dtype)
    slots = torch.randperm(24, generator=generator)[:tokens]
    slots[3] = -1
    before = query.clone()

    output = kernel(query, key, value, cos, sin, caches[0], caches[1], slots.to(DEVICE))

    assert query.equal(before)
    assert_near(output, rotated(query, angle), dtype)
    written = slots >= 0
    flat = caches.flatten(1, 2).cpu()
    assert_near(flat[0, slots[written]], rotated(key, angle)[written], dtype)
    assert flat[1, slots[written]].equal(value.cpu()[written])
    unwritten = torch.ones(24, dtype=torch.bool)
    unwritten[slots[written]] = False
    assert not flat[:, unwritten].any()
