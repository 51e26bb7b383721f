"""From packed slots to the cells of rectangles, one row a sentence, and back."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dtrain.batch import Layout


def gather_cells(x: Tensor, layout: Layout) -> Tensor:
    """Bring tokens to the cells of all rectangles: [slots, ...] -> [cells, ...].

    Empty cells repeat some token; gather_slots gives them no gradient, so they leave no trace.
    """
    return _gather(x, layout.slot_of_cell, layout.cell_of_slot, layout.token_mask)


def gather_slots(cells: Tensor, layout: Layout) -> Tensor:
    """Undo gather_cells: [cells, ...] -> [slots, ...]. Slack repeats some token."""
    return _gather(cells, layout.cell_of_slot, layout.slot_of_cell, layout.mask)


def rectangles(cells: Tensor, layout: Layout) -> list[Tensor]:
    """Give each rectangle's part: [cells, ...] -> [rows, columns, ...] of each."""
    parts = cells.split_with_sizes([rows * columns for rows, columns in layout.rectangles])
    shapes = layout.rectangles
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


def to_cells(x: Tensor, layout: Layout) -> list[Tensor]:
    """Give each sentence a row: [slots, ...] -> [rows, columns, ...]s; the padded one stays."""
    return [x] if layout.slot_of_cell is None else rectangles(gather_cells(x, layout), layout)


def to_slots(parts: list[Tensor], layout: Layout) -> Tensor:
    """Undo to_cells: -> [slots, ...]; the padded one stays."""
    if layout.cell_of_slot is None:
        return parts[0]
    return gather_slots(torch.cat([part.flatten(0, 1) for part in parts]), layout)


class _Gather(torch.autograd.Function):
    """Takes rows: x[index]. Each row that counts is taken once, so its gradient is a gather too.

    A scatter-add would be slow on the CPU and, on a GPU, add up in a different order each time.
    `inverse` says where in the output each row of `x` went, `counts` which rows went anywhere:
    to slack and padding, and from them, no gradient flows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(inverse, counts)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        inverse, counts = ctx.saved_tensors
        rows = grad.index_select(0, inverse)
        return rows.mul_(counts.view(-1, *[1] * (rows.dim() - 1))), None, None, None


_gather: Callable[..., Tensor] = _Gather.apply
