"""Scaled dot-product attention over sentences, packed or padded (Vaswani et al. 2017, 3.2.1).

Packed tokens [slots] are gathered into cells [N, L], one row a sentence, and brought back after.
Both ways are gathers, forward and backward: a scatter-add would be slow on the CPU and, on a GPU,
add up in a different order each time.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dtrain.batch import Layout, padding_mask


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_layout: Layout,
    key_layout: Layout,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Let each query gather values from the keys of its own sentence.

    Args:
        q: queries, [slots, heads, qkv] if packed, [N, L, heads, qkv] if padded.
        k: keys, likewise.
        v: values, likewise.
        query_layout: where the sentences of `q` lie.
        key_layout: where the sentences of `k` and `v` lie: as many as `query_layout` has.
        causal: queries see no later key; for a sentence that attends to itself.
        dropout: probability of dropping an attention weight.

    Returns:
        Like `q`; unspecified, but finite, in slack slots and empty cells, whose gradients are zero.
    """
    cells = scaled_dot_product(
        to_cells(q, query_layout),
        to_cells(k, key_layout),
        to_cells(v, key_layout),
        None if causal else key_mask(key_layout),
        causal,
        dropout,
    )
    return to_slots(cells, query_layout)


def attend_to_self(
    qkv: Tensor, layout: Layout, causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """Give `attend(q, k, v, layout, layout, ...)` where one tensor holds all three: one gather.

    Args:
        qkv: [slots, 3, heads, qkv] if packed, [N, L, 3, heads, qkv] if padded.
        layout: where the sentences lie.
        causal: no token sees a later one.
        dropout: probability of dropping an attention weight.

    Returns:
        [slots, heads, qkv] or [N, L, heads, qkv].
    """
    q, k, v = to_cells(qkv, layout).unbind(2)
    mask = None if causal else key_mask(layout)
    return to_slots(scaled_dot_product(q, k, v, mask, causal, dropout), layout)


def scaled_dot_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Compute softmax(q k^T / sqrt(qkv)) v for padded sentences.

    Args:
        q: [N, query, heads, qkv].
        k: [N, key, heads, qkv].
        v: [N, key, heads, qkv].
        mask: True where attention is allowed, broadcastable to [N, heads, query, key]; all if None.
        causal: the i-th query sees the first i keys only; instead of `mask`.
        dropout: probability of dropping an attention weight.

    Returns:
        [N, query, heads, qkv].
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal).transpose(1, 2)


def key_mask(layout: Layout) -> Tensor:
    """Let every query see all tokens of its sentence and no padding: bool [N, 1, 1, L].

    A causal attention needs no such mask: padding comes last, where only padding can see it.
    """
    # A sentence without a token must see something too: a softmax over nothing is not finite.
    return padding_mask(layout.lengths.clamp(min=1), layout.mask.shape[1])[:, None, None]


def to_cells(x: Tensor, layout: Layout) -> Tensor:
    """Give each sentence a row of its own: [slots, ...] -> [N, L, ...]; padded `x` stays.

    Empty cells repeat some token; to_slots gives them no gradient, so they leave no trace.
    """
    if layout.slot_of_cell is None:
        return x
    return _gather(x, layout.slot_of_cell, layout.cell_of_slot, layout.token_mask)


def to_slots(x: Tensor, layout: Layout) -> Tensor:
    """Undo to_cells: [N, L, ...] -> [slots, ...]; padded `x` stays. Slack repeats some token."""
    if layout.cell_of_slot is None:
        return x
    return _gather(x.flatten(0, 1), layout.cell_of_slot, layout.slot_of_cell, layout.mask)


class _Gather(torch.autograd.Function):
    """Takes rows: x[index]. Each row that counts is taken once, so its gradient is a gather too.

    `inverse` says where in the output each row of `x` went, `counts` which rows went anywhere:
    to slack and padding, and from them, no gradient flows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse, counts)
        return x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        index, inverse, counts = ctx.saved_tensors
        rows = grad.flatten(0, index.dim() - 1).index_select(0, inverse.flatten())
        return rows.mul_(counts.view(-1, *[1] * (rows.dim() - 1))), None, None, None


_gather: Callable[..., Tensor] = _Gather.apply
