"""For all tests: no screen, PyTorch on one thread, since several tests run at once, and Triton's interpreter."""

import os

import matplotlib
import torch

matplotlib.use("Agg")
torch.set_num_threads(1)
# Without a GPU, kernels run in Triton's interpreter. It must be chosen before a test of any folder imports a kernel.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
