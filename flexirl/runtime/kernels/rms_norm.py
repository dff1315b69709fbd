"""RMSNorm (Zhang and Sennrich 2019) as Llama, Qwen and Mistral apply it in Transformers."""

from __future__ import annotations

import torch
from torch import Tensor

from flexirl.runtime.kernels.optional_triton import jit, power_of_two, runs_triton, tl


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """hidden: (..., n), normalised over the last axis in fp32, then rounded to its dtype; weight: (n,), of that dtype.

    Returns (..., n). Stands in for the `forward` of `LlamaRMSNorm`, `MistralRMSNorm` and the Qwen ones.
    """
    return rms_norm_triton(hidden, weight, eps) if runs_triton(hidden) else rms_norm_reference(hidden, weight, eps)


def rms_norm_reference(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in PyTorch."""
    wide = hidden.float()
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normalised.to(hidden.dtype)


def rms_norm_triton(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in Triton; one pass over memory, several short rows to a program."""
    hidden = hidden.contiguous()
    output = torch.empty_like(hidden)
    width = hidden.shape[-1]
    rows, tile = hidden.numel() // width, power_of_two(width)
    rows_at_once = max(1, 2048 // tile)
    _rms_norm_kernel[(-(-rows // rows_at_once),)](
        hidden, weight, output, rows, eps, WIDTH=width, TILE=tile, ROWS=rows_at_once, num_warps=4 if tile <= 4096 else 8
    )
    return output


@jit
def _rms_norm_kernel(
    hidden_ptr, weight_ptr, output_ptr, rows, eps, WIDTH: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    offset = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    hidden = tl.load(hidden_ptr + offset, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0)
    wide = hidden.to(tl.float32)
    normalised = wide * tl.rsqrt(tl.sum(wide * wide, 1) / WIDTH + eps)[:, None]
    output = normalised.to(hidden.dtype).to(tl.float32) * weight.to(tl.float32)[None, :]
    tl.store(output_ptr + offset, output, mask=inside)
