"""TokenEmbedding: ids to vectors and vectors to logits, by one matrix."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenEmbedding(nn.Module):
    """A vector for each token of a vocabulary (Vaswani et al. 2017, 3.4).

    Vectors start random with a length of about one, so that logits of normalised states have unit
    variance; looked up, they are scaled by sqrt(hidden_dim) to weigh as much as their positions.

    Attributes:
        weight: [vocabulary, hidden].
    """

    def __init__(self, vocabulary_size: int, hidden_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary_size, hidden_dim))
        self.scale = math.sqrt(hidden_dim)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=1 / self.scale)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ids of any shape: [...] -> [..., hidden]."""
        return F.embedding(ids, self.weight) * self.scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Compare states with every token's vector: [..., hidden] -> [..., vocabulary]."""
        return F.linear(hidden, self.weight)
