"""MultiHeadAttention: encoder self-, decoder self- and encoder-decoder attention in one module."""

import torch.nn.functional as F
from torch import Tensor, nn

from dtrain.batch import Layout
from dtrain.kernels.attention import attend, attend_to_self, scaled_dot_product


class MultiHeadAttention(nn.Module):
    """Attention of `num_heads` heads in parallel, each `qkv_dim` wide (Vaswani et al. 2017, 3.2.2).

    Queries, keys and values of all heads come from one fused projection, rows in this order: a
    single matrix product where a sentence attends to itself. Where it attends to another, the
    first third projects the one and the rest the other.
    """

    def __init__(self, hidden_dim: int, num_heads: int, qkv_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv_dim = qkv_dim
        self.dropout = dropout
        self.qkv_proj = nn.Linear(hidden_dim, 3 * num_heads * qkv_dim)
        self.o_proj = nn.Linear(num_heads * qkv_dim, hidden_dim)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Draw weights uniformly with Glorot's bounds; start biases at zero."""
        for projection in (self.qkv_proj, self.o_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        memory_kv: Tensor | None = None,
        memory_layout: Layout | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Let each token of `x` gather from its sentence in the memory, or from its own.

        Args:
            x: asks the queries, [slots, hidden] or [N, L, hidden].
            layout: where the sentences of `x` lie.
            memory_kv: the memory's keys and values, from project_memory; those of `x` if None.
            memory_layout: where the sentences of the memory lie.
            causal: no token of `x` sees a later one; only without memory.

        Returns:
            Like `x`.
        """
        dropout = self.dropout if self.training else 0.0
        if memory_kv is None or memory_layout is None:
            heads = attend_to_self(self._split(self.qkv_proj(x)), layout, causal, dropout)
        else:
            heads = attend(self._project_query(x), memory_kv, layout, memory_layout, dropout)
        return self.o_proj(heads.flatten(-2))

    @property
    def memory_projection(self) -> tuple[Tensor, Tensor]:
        """Weight and bias that give keys and values, [2 * heads * qkv, hidden] and its rows."""
        width = self.num_heads * self.qkv_dim
        return self.qkv_proj.weight[width:], self.qkv_proj.bias[width:]

    def project_memory(self, memory: Tensor) -> Tensor:
        """Give keys and values at once: [..., hidden] -> [..., 2, heads, qkv]."""
        return self._split(F.linear(memory, *self.memory_projection))

    def step(self, x: Tensor, past: Tensor, past_mask: Tensor | None) -> Tensor:
        """Attend from one new token of each rival to itself and those that it comes from.

        Args:
            x: the tokens, [N, rivals, hidden].
            past: keys and values of the tokens so far, [N, length, 2, heads, qkv]; those of the new
                ones are written to its last places.
            past_mask: which tokens each rival sees, [N, 1, rivals, length]; all if None.

        Returns:
            [N, rivals, hidden].
        """
        qkv = self._split(self.qkv_proj(x))
        past[:, -x.shape[1] :] = qkv[:, :, 1:]
        k, v = past.unbind(2)
        return self.o_proj(scaled_dot_product(qkv[:, :, 0], k, v, past_mask).flatten(2))

    def step_memory(self, x: Tensor, memory_kv: Tensor, memory_mask: Tensor) -> Tensor:
        """Attend from new tokens to the source sentence, several rivals to the same one.

        Args:
            x: a token of each rival translation, [N, rivals, hidden].
            memory_kv: from project_memory, [N, S, 2, heads, qkv].
            memory_mask: True where the source has a token, [N, 1, 1, S].

        Returns:
            [N, rivals, hidden].
        """
        k, v = memory_kv.unbind(2)
        heads = scaled_dot_product(self._project_query(x), k, v, memory_mask)
        return self.o_proj(heads.flatten(2))

    def _project_query(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., heads, qkv]."""
        width = self.num_heads * self.qkv_dim
        q = F.linear(x, self.qkv_proj.weight[:width], self.qkv_proj.bias[:width])
        return q.view(*q.shape[:-1], self.num_heads, self.qkv_dim)

    def _split(self, projected: Tensor) -> Tensor:
        """[..., parts * heads * qkv] -> [..., parts, heads, qkv]."""
        return projected.view(*projected.shape[:-1], -1, self.num_heads, self.qkv_dim)
