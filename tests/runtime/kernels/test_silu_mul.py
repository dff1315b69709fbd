"""SiLU-multiply against its definition in fp64."""

from __future__ import annotations

import pytest
import torch
from paged import DEVICE, DTYPES, assert_near

from flexirl.runtime.kernels.silu_mul import silu_mul, silu_mul_reference, silu_mul_triton


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("multiply", [silu_mul, silu_mul_reference, silu_mul_triton])
@pytest.mark.parametrize("shape", [(1,), (5, 123, 123), (2, 2048)])
def test_silu_mul(multiply, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator).to(DEVICE, dtype)
    gate, up = fused.chunk(2, -1)  # not contiguous, as from a fused projection
    output = multiply(gate, up)
    assert output.dtype == dtype and output.shape == gate.shape
    wide = gate.double()
    assert_near(output, wide / (1.0 + torch.exp(-wide)) * up.double(), dtype)
