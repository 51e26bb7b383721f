"""Attention of short packed sentences on the CPU: batched products over rectangles.

Torch's kernel goes by blocks of queries that a short sentence does not fill, and takes two to three
times as long. Here the heads of a rectangle are one batch of products. One gather brings the
vectors of all heads from their slots to where the products read them, and one brings them back.
Weights are kept for backward, which sentences of up to LONGEST tokens afford.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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


class _Rows(NamedTuple):
    """Where vectors of single heads lie, if slots and rectangles are rows of such vectors.

    Slots are rows of [slots, parts, heads]; rectangles, one behind the other, of [parts, rows,
    heads, columns] each. Parts are queries, keys or values.

    Attributes:
        in_slots: of each row of the rectangles, int64; that of some token for an empty cell.
        in_rectangles: of each row of the slots, int64; 0 for slack.
    """

    in_slots: Tensor
    in_rectangles: Tensor


def _rows(layout: Layout, num_parts: int, num_heads: int) -> _Rows:
    """Find the rows, once for all layers."""
    key = "short_attention", num_parts, num_heads
    if key not in layout.memo:
        layout.memo[key] = _find_rows(layout, num_parts, num_heads)
    found: _Rows = layout.memo[key]
    return found


def _find_rows(layout: Layout, num_parts: int, num_heads: int) -> _Rows:
    assert layout.slot_of_cell is not None, "the layout is packed"
    assert layout.mask is not None, "the layout has rectangles"
    shape = len(layout.positions), num_parts, num_heads
    rows = torch.arange(shape[0] * num_parts * num_heads).view(shape)
    in_slots, is_token = list[Tensor](), list[Tensor]()
    slots, masks = (rectangles(side, layout) for side in (layout.slot_of_cell, layout.mask))
    for slot, mask in zip(slots, masks, strict=True):
        in_slots.append(rows[slot].permute(2, 0, 3, 1))
        is_token.append(mask[None, :, None].expand_as(in_slots[-1]))
    places, kept = (torch.cat([part.flatten() for part in parts]) for parts in (in_slots, is_token))
    in_rectangles = torch.zeros(rows.numel(), dtype=torch.int64)
    in_rectangles[places[kept]] = torch.arange(len(places))[kept]
    return _Rows(places, in_rectangles)


def _to_rectangles(x: Tensor, layout: Layout) -> Tensor:
    """[slots, parts, heads, qkv], or without parts -> rows of the rectangles, [rows, qkv]."""
    num_parts = 1 if x.dim() == 3 else x.shape[1]
    rows = _rows(layout, num_parts, x.shape[-2])
    return x.flatten(0, -2).index_select(0, rows.in_slots)


def _to_slots(heads: Tensor, layout: Layout, shape: torch.Size) -> Tensor:
    """Undo _to_rectangles; slack has the vector of some token."""
    num_parts = 1 if len(shape) == 3 else shape[1]
    rows = _rows(layout, num_parts, shape[-2])
    return heads.index_select(0, rows.in_rectangles).view(shape)


def _batches(sides: Sequence[Tensor], layouts: Sequence[Layout], num_heads: int) -> list[Any]:
    """Give for each rectangle the parts of all sides: [rows * heads, columns, qkv] each."""
    of_sides = []
    for heads, layout in zip(sides, layouts, strict=True):
        sizes = [rows * columns for rows, columns in layout.rectangles]
        num_rows = len(heads) // sum(sizes)
        parts = heads.split_with_sizes([num_rows * size for size in sizes])
        shapes = [(-1, rows * num_heads, columns) for rows, columns in layout.rectangles]
        of_sides.append([x.unflatten(0, shape) for x, shape in zip(parts, shapes, strict=True)])
    return [
        [part for x in of_rectangle for part in x] for of_rectangle in zip(*of_sides, strict=True)
    ]


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
        num_heads, qkv_dim = x.shape[-2:]
        inputs = [x] if memory is None else [x, memory]
        ctx.layouts = [layout, memory_layout][: len(inputs)]
        sides = [_to_rectangles(*pair) for pair in zip(inputs, ctx.layouts, strict=True)]
        out = x.new_empty(len(sides[0]) // (3 if memory is None else 1), qkv_dim)
        kept = list[Tensor]()
        for (q, k, v), (place,), mask in zip(
            _batches(sides, ctx.layouts, num_heads),
            _batches([out], [layout], num_heads),
            masks,
            strict=True,
        ):
            scores = torch.bmm(q, k.transpose(1, 2)).mul_(qkv_dim**-0.5)
            scores.unflatten(0, (-1, num_heads)).masked_fill_(~mask, -torch.inf)
            weights = torch.softmax(scores, -1, out=scores)
            torch.bmm(weights, v, out=place)
            kept.append(weights)
        ctx.save_for_backward(*sides, *kept)
        ctx.shapes = [side.shape for side in inputs]
        return _to_slots(out, layout, torch.Size((len(x), num_heads, qkv_dim)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (num_heads, qkv_dim), layout = grad.shape[-2:], ctx.layouts[0]
        sides, kept = (ctx.saved_tensors[: len(ctx.shapes)], ctx.saved_tensors[len(ctx.shapes) :])
        grads = [torch.empty_like(side) for side in sides]
        for (q, k, v), (q_place, k_place, v_place), (out_grad,), mask, weights in zip(
            _batches(sides, ctx.layouts, num_heads),
            _batches(grads, ctx.layouts, num_heads),
            _batches([_to_rectangles(grad, layout)], [layout], num_heads),
            rectangles(layout.mask, layout),
            kept,
            strict=True,
        ):
            out_grad.unflatten(0, (-1, num_heads)).mul_(mask[:, None, :, None])
            torch.bmm(weights.transpose(1, 2), out_grad, out=v_place)
            weights_grad = torch.bmm(out_grad, v.transpose(1, 2))
            scores_grad = torch._softmax_backward_data(weights_grad, weights, -1, weights.dtype)
            scores_grad.mul_(qkv_dim**-0.5)
            torch.bmm(scores_grad, k, out=q_place)
            torch.bmm(scores_grad.transpose(1, 2), q, out=k_place)
        found = list[Tensor]()
        for heads, of, shape in zip(grads, ctx.layouts, ctx.shapes, strict=True):
            found.append(_to_slots(heads, of, shape))
            found[-1][int(of.lengths.sum()) :] = 0  # slack
        return *found, *[None] * (5 - len(found))


short_attention: Callable[..., Tensor] = _ShortAttention.apply
"""Let sentences attend to themselves, or to those of another side.

Args:
    x: queries, keys and values, [slots, 3, heads, qkv]; or queries alone, [slots, heads, qkv], if
        there is `memory`.
    memory: keys and values, [slots, 2, heads, qkv], or None.
    layout: where the sentences of `x` lie.
    memory_layout: where those of `memory` lie, or `layout` again.
    masks: True where attention is allowed, broadcastable to [rows, heads, queries, keys] of each
        rectangle.

Returns:
    [slots, heads, qkv]; unspecified, but finite, in slack.
"""
