"""PositionalEncoding: sine and cosine waves that tell a token's place in its sentence."""

import torch
from torch import Tensor, nn

from dtrain.batch import Layout


def sinusoids(length: int, hidden_dim: int) -> Tensor:
    """Compute the encodings of positions 0 to length - 1 (Vaswani et al. 2017, 3.5).

    Even columns are sin(position / 10000^(column / hidden_dim)), each followed by the cosine of the
    same angle.

    Returns:
        float64 [length, hidden].
    """
    positions = torch.arange(length, dtype=torch.float64)
    exponents = torch.arange(0, hidden_dim, 2, dtype=torch.float64) / hidden_dim
    angles = positions[:, None] / 10000**exponents
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class PositionalEncoding(nn.Module):
    """Adds its position's sinusoids to each token, wherever the layout puts the token.

    The table is computed, not learned, and not saved. It grows when a longer sentence comes to be
    learned from. One that is only read gets a table of its own, since compiled and recorded steps
    know the first by its address.
    """

    table: Tensor
    longer: Tensor

    def __init__(self, hidden_dim: int, length: int = 256) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        table = sinusoids(length, hidden_dim).to(torch.get_default_dtype())
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("longer", table[:0], persistent=False)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Add to tokens [slots, hidden] or [N, S, hidden] their sentences' positions."""
        return x + self.up_to(layout.max_length)[layout.positions]

    def up_to(self, length: int) -> Tensor:
        """Give the encodings of at least the positions 0 to length - 1: [positions, hidden]."""
        if length <= len(self.table):
            return self.table
        if self.training:
            self.table = self._grown(length)
            return self.table
        if length > len(self.longer):
            self.longer = self._grown(length)
        return self.longer

    def _grown(self, length: int) -> Tensor:
        most = max(len(self.table), len(self.longer))
        with torch.inference_mode(False):  # it may be moved to another device later
            return sinusoids(max(length, 2 * most), self.hidden_dim).to(self.table)
