"""RMSNorm against PyTorch's own in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from paged import DEVICE, DTYPES, assert_near

from flexirl.runtime.kernels.rms_norm import rms_norm, rms_norm_reference, rms_norm_triton


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [rms_norm, rms_norm_reference, rms_norm_triton])
@pytest.mark.parametrize("shape", [(1, 1), (5, 123, 80), (3, 4096), (2, 5000), (130, 64)])
def test_rms_norm(norm, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = (3.0 * torch.randn(shape, generator=generator)).to(DEVICE, dtype)
    weight = torch.rand(shape[-1], generator=generator).to(DEVICE, dtype)
    output = norm(hidden, weight, 1e-5)
    assert output.dtype == dtype
    assert_near(output, F.rms_norm(hidden.double(), shape[-1:], weight.double(), 1e-5), dtype)
