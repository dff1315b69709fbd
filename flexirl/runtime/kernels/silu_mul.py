"""SiLU-multiply: the gated activation of Llama's, Qwen's and Mistral's feed-forward layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise; both (..., n). Returns the same shape and dtype."""
    return silu_mul_reference(gate, up)


def silu_mul_reference(gate: Tensor, up: Tensor) -> Tensor:
    """`silu_mul` in PyTorch."""
    return F.silu(gate) * up
