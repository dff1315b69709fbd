"""For all tests: no screen, and PyTorch on one thread, since several tests run at once."""

import matplotlib
import torch

matplotlib.use("Agg")
torch.set_num_threads(1)
