"""Several linear layers of the same input as one matrix product.

Forward is one product, and so is each half of backward, which then adds nothing up; in exchange the
matrices and, in backward, the gradients are joined. That pays where products are too small to fill
a GPU.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def project_jointly(x: Tensor, projections: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Apply linear layers of as many rows each.

    Args:
        x: [..., hidden].
        projections: weight [rows, hidden] and bias [rows] of each.

    Returns:
        What each gives, [..., rows]; all of them lie in one tensor.
    """
    weights, biases = zip(*projections, strict=True)
    return list(F.linear(x, torch.cat(weights), torch.cat(biases)).chunk(len(projections), -1))
