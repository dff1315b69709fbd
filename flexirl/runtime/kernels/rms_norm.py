"""RMSNorm (Zhang and Sennrich 2019) as Llama, Qwen and Mistral apply it in Transformers."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """hidden: (..., n), normalised over the last axis in fp32; weight: (n,). Returns (..., n) in hidden's dtype."""
    return rms_norm_reference(hidden, weight, eps)


def rms_norm_reference(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in PyTorch."""
    wide = hidden.float()
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normalised.to(hidden.dtype)
