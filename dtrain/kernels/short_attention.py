"""Attention of short packed sentences on the CPU: batched products over rectangles.

Torch's kernel goes by blocks of queries that a short sentence does not fill, and takes two to three
times as long. Here the heads of a rectangle are one batch of products. Their weights are kept for
backward, which sentences of up to LONGEST tokens afford; results are written to where they belong,
so that nothing is stacked or joined.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dtrain.batch import Layout
from dtrain.kernels.cells import rectangles

LONGEST = 64
"""Tokens of a sentence from which on torch's kernel is about as fast."""


def can_attend(x: Tensor, layouts: Sequence[Layout], dropout: float) -> bool:
    """Say whether this kernel can attend, and does it well.

    Args:
        x: queries, with or without keys and values.
        layouts: of queries and keys.
        dropout: probability of dropping an attention weight.
    """
    return (
        x.dtype in (torch.float32, torch.float64)
        and x.is_cpu
        and not dropout
        and all(layout.slot_of_cell is not None for layout in layouts)
        and all(columns <= LONGEST for layout in layouts for _, columns in layout.rectangles)
        and not torch.compiler.is_compiling()  # a compiler fuses what is written plainly
    )


class _ShortAttention(torch.autograd.Function):
    """Computes softmax(q k^T / sqrt(qkv)) v in each rectangle."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        memory: Tensor | None,
        layout: Layout,
        memory_layout: Layout,
        masks: list[Tensor],
    ) -> Tensor:
        q, k, v = _split(x, memory)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        kept = list[Tensor]()
        for one_q, one_k, one_v, mask, place in zip(
            rectangles(q, layout),
            *(rectangles(side, memory_layout) for side in (k, v)),
            masks,
            rectangles(out, layout),
            strict=True,
        ):
            parts = [_batch_of_heads(part) for part in (one_q, one_k, one_v)]
            scores = torch.bmm(parts[0], parts[1].transpose(1, 2)).mul_(q.shape[-1] ** -0.5)
            scores.unflatten(0, (len(one_q), -1)).masked_fill_(~mask, -torch.inf)
            weights = torch.softmax(scores, -1, out=scores)
            _put(torch.bmm(weights, parts[2]), place)
            kept += [*parts, weights]
        ctx.save_for_backward(*kept)
        ctx.shapes = x.shape, None if memory is None else memory.shape
        ctx.layouts = layout, memory_layout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layout, memory_layout = ctx.layouts
        x_grad, memory_grad = (
            None if shape is None else grad.new_empty(shape) for shape in ctx.shapes
        )
        q_grad, k_grad, v_grad = _split(x_grad, memory_grad)
        kept = iter(ctx.saved_tensors)
        for one_grad, q_place, k_place, v_place in zip(
            *(rectangles(side, layout) for side in (grad, q_grad)),
            *(rectangles(side, memory_layout) for side in (k_grad, v_grad)),
            strict=True,
        ):
            q, k, v, weights = (next(kept) for _ in range(4))
            out_grad = _batch_of_heads(one_grad)
            _put(torch.bmm(weights.transpose(1, 2), out_grad), v_place)
            weights_grad = torch.bmm(out_grad, v.transpose(1, 2))
            scores_grad = torch._softmax_backward_data(weights_grad, weights, -1, weights.dtype)
            scores_grad.mul_(q.shape[-1] ** -0.5)
            _put(torch.bmm(scores_grad, k), q_place)
            _put(torch.bmm(scores_grad.transpose(1, 2), q), k_place)
        return x_grad, memory_grad, None, None, None


short_attention: Callable[..., Tensor] = _ShortAttention.apply
"""Attend in each rectangle, to its own sentences or to those of another side.

Args:
    x: queries, keys and values in cells, [cells, 3, heads, qkv]; or queries alone, [cells, heads,
        qkv], if there is `memory`.
    memory: keys and values in cells, [cells, 2, heads, qkv], or None.
    layout: where the sentences of `x` lie.
    memory_layout: where those of `memory` lie, or `layout` again.
    masks: True where attention is allowed, broadcastable to [rows, heads, queries, keys] of each
        rectangle.

Returns:
    [cells, heads, qkv].
"""


def _split(x: Any, memory: Any) -> Sequence[Tensor]:
    return x.unbind(1) if memory is None else (x, *memory.unbind(1))


def _batch_of_heads(x: Tensor) -> Tensor:
    """[rows, columns, heads, qkv] -> [rows * heads, columns, qkv]."""
    return x.transpose(1, 2).flatten(0, 1)


def _put(heads: Tensor, place: Tensor) -> None:
    """Undo _batch_of_heads, into `place`."""
    place.copy_(heads.unflatten(0, (len(place), -1)).transpose(1, 2))
