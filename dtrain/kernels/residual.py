"""What surrounds each sub-layer: dropout, the sum with its input, layer norm; plain or fused.

A fused pass reads both summands once and writes the result, where the plain way goes over memory
for each of the three, and stores a mask besides.
"""

from torch import Tensor, nn

from dtrain.kernels.dropout import dropout


def add_and_norm(
    x: Tensor, y: Tensor, norm: nn.LayerNorm | None, p: float, training: bool, fused: bool = False
) -> Tensor:
    """Give norm(x + dropout(y)), or the sum itself without a norm.

    Args:
        x: what went into the sub-layer, [..., hidden].
        y: what came out of it, likewise.
        norm: with weight and bias.
        p: probability of zero, in [0, 1).
        training: drop nothing if not, and go the plain way.
        fused: go over memory once, by Triton, on a GPU; as if in fp32 in between. Under autocast a
            norm then gives y's type, half as wide as what the plain way gives.

    Returns:
        [..., hidden].
    """
    if fused and training:
        # Imported where it is used: it needs Triton, which not every machine has.
        from dtrain.kernels.fused_residual import dropout_add, dropout_add_norm

        return dropout_add(x, y, p) if norm is None else dropout_add_norm(x, y, norm, p)
    z = x + dropout(y, p, training)
    return z if norm is None else norm(z)
