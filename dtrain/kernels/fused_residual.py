"""Dropout, sum and layer norm in one Triton kernel forward and one backward.

No mask is stored: seed, row and column decide it, and backward computes it again. Numbers are fp32
in between. Nothing is added up by atomics: the same input gives the same bits. The operators are
opaque to torch.compile, and run on the CPU in Triton's interpreter (`TRITON_INTERPRET=1`).

The plain twin is `add_and_norm(..., fused=False)` of `residual.py`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

# Fixed: choosing them by trial would cost time at each start, and bits would depend on the outcome.
_TILE = 2048  # elements that a program holds at once
_FEWEST_ROWS, _MOST_ROWS = 8, 64  # whose gradients of weight and bias a program adds up
_PROGRAMS = 1024  # that backward is shared out to, if each has rows enough: they fill any GPU
_WIDEST = 16384  # elements of a row, which a program holds whole
_LEVELS = 2**16  # values of the 16 random bits that decide over an element


def dropout_add(x: Tensor, y: Tensor, p: float) -> Tensor:
    """Give x + dropout(y) for [..., hidden], in the wider of the two types."""
    return _dropout_add(x, y, _draw_seed(x.device), p)


def dropout_add_norm(x: Tensor, y: Tensor, norm: nn.LayerNorm, p: float) -> Tensor:
    """Give norm(x + dropout(y)) for [..., hidden], in y's type."""
    seed = _draw_seed(x.device)
    return _dropout_add_norm(x, y, norm.weight, norm.bias, seed, p, norm.eps)[0]


def _draw_seed(device: torch.device) -> Tensor:
    """Draw on the device, so that a CUDA graph draws another at each replay; int64 [1]."""
    # Not an operator of ours: torch.compile takes two calls of it for one, whatever its tags say.
    return torch.randint(2**62, (1,), device=device)


# ------------------------------------------------------------------ without a norm


@torch.library.custom_op("dtrain::dropout_add", mutates_args=())
def _dropout_add(x: Tensor, y: Tensor, seed: Tensor, p: float) -> Tensor:
    out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, y.dtype))
    sizes, constants = _sizes(x, p, has_norm=False)
    _forward_kernel[(triton.cdiv(sizes[0], constants["row_block"]),)](
        *(x.contiguous(), y.contiguous(), seed, None, None, out, None, None),
        *(*sizes, 0.0),
        **constants,
    )
    return out


@_dropout_add.register_fake
def _(x: Tensor, y: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, y.dtype))


@torch.library.custom_op("dtrain::dropout_add_backward", mutates_args=())
def _dropout_add_backward(grad: Tensor, seed: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """Give y's gradient; that of x is `grad` itself."""
    y_grad = grad.new_empty(grad.shape, dtype=dtype)
    sizes, constants = _sizes(grad, p, has_norm=False)
    rows = _rows_a_program(sizes[0], constants["row_block"])
    _backward_kernel[(triton.cdiv(sizes[0], rows),)](
        *(grad.contiguous(), None, None, seed, None, None, None, None, y_grad, None, None),
        *(*sizes, rows),
        **constants,
    )
    return y_grad


@_dropout_add_backward.register_fake
def _(grad: Tensor, _seed: Tensor, _p: float, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(grad.shape, dtype=dtype)


def _save_seed(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], **_: Any) -> None:
    x, y, seed, ctx.p = inputs
    ctx.dtypes = x.dtype, y.dtype
    ctx.save_for_backward(seed)


def _differentiate_sum(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (seed,) = ctx.saved_tensors
    x_dtype, y_dtype = ctx.dtypes
    return grad.to(x_dtype), _dropout_add_backward(grad, seed, ctx.p, y_dtype), None, None


_dropout_add.register_autograd(_differentiate_sum, setup_context=_save_seed)


# ------------------------------------------------------------------ with a norm


@torch.library.custom_op("dtrain::dropout_add_norm", mutates_args=())
def _dropout_add_norm(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, seed: Tensor, p: float, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the result, and mean and inverse deviation of each row, fp32 [rows]."""
    sizes, constants = _sizes(x, p, has_norm=True)
    out = y.new_empty(y.shape)
    mean, inverse = (x.new_empty(sizes[0], dtype=torch.float32) for _ in range(2))
    _forward_kernel[(triton.cdiv(sizes[0], constants["row_block"]),)](
        *(x.contiguous(), y.contiguous(), seed, weight, bias, out, mean, inverse),
        *(*sizes, epsilon),
        **constants,
    )
    return out, mean, inverse


@_dropout_add_norm.register_fake
def _(x: Tensor, y: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean, inverse = (x.new_empty(x[..., 0].numel(), dtype=torch.float32) for _ in range(2))
    return y.new_empty(y.shape), mean, inverse


@torch.library.custom_op("dtrain::dropout_add_norm_backward", mutates_args=())
def _dropout_add_norm_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse: Tensor,
    seed: Tensor,
    p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give the gradients of x, y, weight and bias."""
    sizes, constants = _sizes(x, p, has_norm=True)
    x_grad, y_grad = x.new_empty(x.shape), y.new_empty(y.shape)
    rows = _rows_a_program(sizes[0], constants["row_block"])
    programs = triton.cdiv(sizes[0], rows)
    sums = weight.new_empty(2, programs, sizes[1], dtype=torch.float32)
    _backward_kernel[(programs,)](
        *(grad.contiguous(), x.contiguous(), y.contiguous(), seed, weight, mean, inverse),
        *(x_grad, y_grad, sums[0], sums[1]),
        *(*sizes, rows),
        **constants,
    )
    weight_grad, bias_grad = (part.sum(0).to(weight.dtype) for part in sums)
    return x_grad, y_grad, weight_grad, bias_grad


@_dropout_add_norm_backward.register_fake
def _(
    _grad: Tensor, x: Tensor, y: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight_grad, bias_grad = (weight.new_empty(weight.shape) for _ in range(2))
    return x.new_empty(x.shape), y.new_empty(y.shape), weight_grad, bias_grad


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, y, weight, _, seed, ctx.p, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, y, weight, *output[1:], seed)


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *_dropout_add_norm_backward(grad, *ctx.saved_tensors, ctx.p), None, None, None


_dropout_add_norm.register_autograd(_differentiate, setup_context=_save)


# ------------------------------------------------------------------ the kernels
#
# A program owns whole rows. What it computes of an element depends on its row, its column and the
# seed, never on the shape of the tile.


def _sizes(
    x: Tensor, p: float, has_norm: bool
) -> tuple[tuple[int, int, int, float], dict[str, Any]]:
    """What kernels are told, and what they are compiled for.

    Returns:
        Rows, width, of `_LEVELS` how many keep an element, and the scale of what is kept; and the
        constants.
    """
    width = x.shape[-1]
    if width > _WIDEST:
        raise ValueError(f"the fused residual takes rows of up to {_WIDEST}, not of {width}")
    # The scale follows the probability as it is realised, so that the mean stays the same.
    num_kept = max(1, round(_LEVELS * (1 - p)))
    column_block = max(16, triton.next_power_of_2(width))
    row_block = max(1, _TILE // column_block)
    constants = {"row_block": min(row_block, _MOST_ROWS), "column_block": column_block}
    constants |= {"has_norm": has_norm, "drops": num_kept < _LEVELS}
    constants |= {"num_warps": max(4, column_block // 512)}
    return (x.numel() // width, width, num_kept, _LEVELS / num_kept), constants


def _rows_a_program(num_rows: int, row_block: int) -> int:
    """Share rows out for backward: by their number alone, since bits depend on it."""
    wanted = triton.next_power_of_2(triton.cdiv(num_rows, _PROGRAMS))
    return min(_MOST_ROWS, max(_FEWEST_ROWS, row_block, wanted))


@triton.jit
def _mask(
    seed: tl.tensor, rows: tl.tensor, num_kept: tl.tensor, column_block: tl.constexpr
) -> tl.tensor:
    """Say which elements of [rows, columns] are kept."""
    # One block of Philox gives 128 bits: eight neighbours have 16 each.
    groups = rows[:, None] * (column_block // 8) + tl.arange(0, column_block // 8)[None, :]
    a, b, c, d = tl.randint4x(tl.load(seed), groups.to(tl.uint32))
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))  # a, b, c, d, a, b, ...
    bits = tl.interleave(words & 65535, (words >> 16) & 65535).to(tl.int32)
    return bits < num_kept


@triton.jit
def _forward_kernel(
    x: tl.tensor,
    y: tl.tensor,
    seed: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    mean: tl.tensor,
    inverse: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    num_kept: tl.tensor,
    scale: tl.tensor,
    epsilon: tl.tensor,
    row_block: tl.constexpr,
    column_block: tl.constexpr,
    has_norm: tl.constexpr,
    drops: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * row_block + tl.arange(0, row_block)
    columns = tl.arange(0, column_block)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    places = rows[:, None] * width + columns[None, :]
    z = tl.load(y + places, mask=inside, other=0.0).to(tl.float32)
    if drops:
        z = tl.where(_mask(seed, rows, num_kept, column_block), z * scale, 0.0)
    z += tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    if has_norm:
        middle = tl.sum(z, 1) / width
        z = tl.where(inside, z - middle[:, None], 0.0)
        steepness = 1.0 / tl.sqrt(tl.sum(z * z, 1) / width + epsilon)
        tl.store(mean + rows, middle, mask=rows < num_rows)
        tl.store(inverse + rows, steepness, mask=rows < num_rows)
        factor = tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32)
        shift = tl.load(bias + columns, mask=columns < width, other=0.0).to(tl.float32)
        z = z * steepness[:, None] * factor[None, :] + shift[None, :]
    tl.store(out + places, z.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    seed: tl.tensor,
    weight: tl.tensor,
    mean: tl.tensor,
    inverse: tl.tensor,
    x_grad: tl.tensor,
    y_grad: tl.tensor,
    weight_sums: tl.tensor,
    bias_sums: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    num_kept: tl.tensor,
    scale: tl.tensor,
    rows_a_program: tl.constexpr,
    row_block: tl.constexpr,
    column_block: tl.constexpr,
    has_norm: tl.constexpr,
    drops: tl.constexpr,
) -> None:
    columns = tl.arange(0, column_block)
    first_row = tl.program_id(0).to(tl.int64) * rows_a_program
    weight_sum = tl.zeros([column_block], tl.float32)
    bias_sum = tl.zeros([column_block], tl.float32)
    for start in range(0, rows_a_program, row_block):
        rows = first_row + start + tl.arange(0, row_block)
        inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
        places = rows[:, None] * width + columns[None, :]
        g = tl.load(grad + places, mask=inside, other=0.0).to(tl.float32)
        if drops:
            kept = _mask(seed, rows, num_kept, column_block)
        if has_norm:
            z = tl.load(y + places, mask=inside, other=0.0).to(tl.float32)
            if drops:
                z = tl.where(kept, z * scale, 0.0)
            z += tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
            middle = tl.load(mean + rows, mask=rows < num_rows, other=0.0)
            steepness = tl.load(inverse + rows, mask=rows < num_rows, other=0.0)
            z = tl.where(inside, (z - middle[:, None]) * steepness[:, None], 0.0)
            weight_sum += tl.sum(g * z, 0)
            bias_sum += tl.sum(g, 0)
            g *= tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
            along = tl.sum(g * z, 1) / width
            g = (g - tl.sum(g, 1)[:, None] / width - z * along[:, None]) * steepness[:, None]
            tl.store(x_grad + places, g.to(x_grad.dtype.element_ty), mask=inside)
        if drops:
            g = tl.where(kept, g * scale, 0.0)
        tl.store(y_grad + places, g.to(y_grad.dtype.element_ty), mask=inside)
    if has_norm:
        sums = tl.program_id(0) * width + columns
        tl.store(weight_sums + sums, weight_sum, mask=columns < width)
        tl.store(bias_sums + sums, bias_sum, mask=columns < width)
