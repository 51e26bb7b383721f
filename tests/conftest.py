"""What holds for all tests: one thread, so that ranks do not fight for cores and bits repeat."""

import torch

torch.set_num_threads(1)
