"""Triton where it is installed; the files of kernels can be imported, and their PyTorch versions run, without it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flexirl.errors import UserError

try:
    import triton.language as tl
    from triton import jit
except ModuleNotFoundError:
    tl = None

    def jit(kernel: Any = None, **options: Any) -> Any:
        """Leaves a kernel that nobody will launch as it is."""
        return kernel or jit


def runs_triton(tensor: Tensor) -> bool:
    """Whether work on `tensor` is for Triton (CUDA) or for PyTorch (CPU); UserError where CUDA lacks Triton."""
    if tensor.is_cuda and tl is None:
        raise UserError("device=cuda needs Triton; install the extra with `pip install 'flexirl[kernels]'`.")
    return tensor.is_cuda


def power_of_two(count: int) -> int:
    """The least power of two that is at least `count`: the sides of Triton's tiles are powers of two."""
    return 1 << (count - 1).bit_length()
