"""SiLU-multiply: the gated activation of Llama's, Qwen's and Mistral's feed-forward layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flexirl.runtime.kernels.optional_triton import jit, runs_triton, tl


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise; both of the same shape and dtype, which is the result's.

    Stands in for `act_fn(gate_proj(x)) * up_proj(x)` in the `forward` of `LlamaMLP`, `MistralMLP` and the Qwen ones.
    """
    return silu_mul_triton(gate, up) if runs_triton(gate) else silu_mul_reference(gate, up)


def silu_mul_reference(gate: Tensor, up: Tensor) -> Tensor:
    """`silu_mul` in PyTorch."""
    return F.silu(gate) * up


def silu_mul_triton(gate: Tensor, up: Tensor) -> Tensor:
    """`silu_mul` in Triton; one pass over memory."""
    gate, up = gate.contiguous(), up.contiguous()
    output = torch.empty_like(gate)
    tile = 2048
    _silu_mul_kernel[(-(-gate.numel() // tile),)](gate, up, output, gate.numel(), TILE=tile, num_warps=4)
    return output


@jit
def _silu_mul_kernel(gate_ptr, up_ptr, output_ptr, elements, TILE: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = offset < elements
    gate = tl.load(gate_ptr + offset, mask=inside, other=0.0)
    up = tl.load(up_ptr + offset, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    activated = (wide * tl.sigmoid(wide)).to(gate.dtype)  # rounded in between, as by PyTorch
    tl.store(output_ptr + offset, activated.to(tl.float32) * up.to(tl.float32), mask=inside)
