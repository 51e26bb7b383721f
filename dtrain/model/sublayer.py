"""What every block is made of beside attention: FeedForward, and Residual around each part."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from dtrain.kernels.residual import add_and_norm
from dtrain.model.settings import ModelSettings


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between, for each token alone (Vaswani et al. 2017, 3.3)."""

    def __init__(self, hidden_dim: int, feed_forward_dim: int) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden_dim, feed_forward_dim)
        self.outer = nn.Linear(feed_forward_dim, hidden_dim)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Draw weights uniformly with Glorot's bounds; start biases at zero."""
        for linear in (self.inner, self.outer):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        return self.outer(F.relu(self.inner(x), inplace=True))


class Residual(nn.Module):
    """Wraps a sub-layer: dropout on its output, then the sum with its input, and a layer norm.

    The norm comes after the sum as in the paper, LayerNorm(x + sublayer(x)), or, by setting,
    before the sub-layer: x + sublayer(LayerNorm(x)).
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(settings.hidden_dim)
        self.norm_first = settings.norm == "pre"
        self.dropout = settings.dropout
        self.fused = False  # put on from outside

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        y = sublayer(self.norm(x) if self.norm_first else x)
        norm = None if self.norm_first else self.norm
        return add_and_norm(x, y, norm, self.dropout, self.training, self.fused)
