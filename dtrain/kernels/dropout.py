"""Dropout: torch's own on a GPU; on the CPU one with cheaper random numbers, same distribution.

On the CPU torch draws one Bernoulli variable after the other, which takes a quarter of a training
step. Sixteen random bits an element are enough, and four elements share one 64-bit draw, from a
generator that is twice as fast as torch's own.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_LEVELS = 2**16  # values of the 16 random bits that decide over an element


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero each element with probability `p` and scale the others up so that the mean stays.

    Args:
        x: of any shape.
        p: probability of zero, in [0, 1), kept to 2^-16 (in bf16 to the precision of the scale).
        training: give `x` itself if not.

    Returns:
        A tensor like `x`. The generator that `torch.manual_seed` seeds decides alone: the number of
        threads does not matter.
    """
    if not training or p == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():  # a compiler fuses torch's own
        return F.dropout(x, p)
    return x * _mask(x, p)


def _mask(x: Tensor, p: float) -> Tensor:
    """Draw a mask like `x`, of zeros and of 1 / (probability of being kept)."""
    # The scale must be a number of x's type; the threshold then follows it, not the other way
    # round: so the mean stays the same in bf16 too.
    scale = torch.tensor(1 / (1 - p)).to(x.dtype).item()
    num_kept = max(1, round(_LEVELS / scale))
    draws = np.random.SFC64(int(torch.randint(2**62, ()))).random_raw((x.numel() + 3) // 4)
    bits = torch.from_numpy(draws.view(np.int16)[: x.numel()]).view(x.shape)
    kept = torch.ge(bits, _LEVELS // 2 - num_kept, out=torch.empty_like(x))
    return kept.mul_(_LEVELS / num_kept if x.dtype.itemsize >= 4 else scale)
