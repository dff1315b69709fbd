"""What a device computes in an iteration besides matrix products: one function per kernel, picked by device.

Each file holds one kernel: the Triton version for CUDA, the PyTorch version beside it, which is what a CPU runs and
what the Triton version is tested against, and a public function that takes one or the other. Triton is optional.
"""

from flexirl.runtime.kernels.batch import AttentionBatch, plan_attention
from flexirl.runtime.kernels.kv_write import write_kv
from flexirl.runtime.kernels.paged_attention import paged_attention
from flexirl.runtime.kernels.rms_norm import rms_norm
from flexirl.runtime.kernels.rotary import rotary_write_kv
from flexirl.runtime.kernels.silu_mul import silu_mul
from flexirl.runtime.kernels.swap import gather_blocks, scatter_blocks

__all__ = [
    "AttentionBatch",
    "gather_blocks",
    "paged_attention",
    "plan_attention",
    "rms_norm",
    "rotary_write_kv",
    "scatter_blocks",
    "silu_mul",
    "write_kv",
]
