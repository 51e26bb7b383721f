"""Cross-entropy over rows of logits that become their gradients, in Triton.

The product writes the logits; this kernel reads them twice, the second time mostly from cache, and
writes the gradient over them; the two products of backward read it: 6 passes over a row of 16-bit
numbers, 5 of them through memory. Written plainly with fp32 in between it takes 22, and 8 with what
a compiler fuses. A row of 32,768 pieces is 64 KB, more than all else of a token together.

The plain twin is that of `loss.py`. Nothing is added up by atomics: the same input gives the same
bits. The operator is opaque to torch.compile, and runs on the CPU in Triton's interpreter
(`TRITON_INTERPRET=1`).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dtrain.batch import PAD_ID

# Fixed: choosing it by trial would cost time at each start, and bits would depend on the outcome.
_BLOCK = 4096  # logits of a row that its program holds at once


@torch.library.custom_op("dtrain::cross_entropy", mutates_args=["logits"])
def cross_entropy(
    logits: Tensor, target: Tensor, smoothing: float, scale: float, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Give each row's logsumexp(z) - (1 - e) z[target], and put its gradient in the logits' place.

    Args:
        logits: [rows, vocabulary] of any floating type, each row's side by side; replaced by the
            gradient of the loss, times `scale`, in the same type.
        target: ids, int64 [rows]; where it is PAD_ID loss and gradient are zero.
        smoothing: e, the share of the target that is spread over the vocabulary, in [0, 1); what it
            adds to the loss needs no logits, so it is left to the caller.
        scale: of the gradient: fp16 cannot hold the smallest probabilities.
        with_gradient: leave the logits as they are if not.

    Returns:
        The loss and the negative log-likelihood of each row in nats, fp32 [rows].
    """
    if logits.stride(1) != 1:
        raise ValueError("the logits of a row must lie side by side")
    num_rows, width = logits.shape
    loss, nll = (logits.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    _kernel[(num_rows,)](
        *(logits, target.contiguous(), loss, nll, logits.stride(0), width, smoothing, scale),
        pad=PAD_ID,
        with_gradient=with_gradient,
        block=_BLOCK,
        num_warps=8,
    )
    return loss, nll


@cross_entropy.register_fake
def _(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    loss, nll = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
    return loss, nll


@triton.jit
def _kernel(
    logits: tl.tensor,
    target: tl.tensor,
    loss: tl.tensor,
    nll: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    smoothing: tl.tensor,
    scale: tl.tensor,
    pad: tl.constexpr,
    with_gradient: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)  # rows times vocabulary may go beyond 2^31
    start_row = logits + row * stride
    wanted = tl.load(target + row)
    columns = tl.arange(0, block)
    # The largest logit so far, and the sum of exp(logit - largest).
    largest = float("-inf")
    exponentials = 0.0
    right = tl.zeros([block], tl.float32)
    for start in range(0, width, block):
        inside = start + columns < width
        z = tl.load(start_row + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        before = largest
        largest = tl.maximum(before, tl.max(z, 0))
        exponentials = exponentials * tl.exp(before - largest) + tl.sum(tl.exp(z - largest), 0)
        # Picked here and not read from its place: another thread might have written there already.
        right += tl.where(start + columns == wanted, z, 0.0)
    log_sum = largest + tl.log(exponentials)
    right_one = tl.sum(right, 0)
    row_nll = log_sum - right_one
    row_loss = log_sum - (1.0 - smoothing) * right_one
    tl.store(nll + row, tl.where(wanted == pad, 0.0, row_nll))
    tl.store(loss + row, tl.where(wanted == pad, 0.0, row_loss))
    if with_gradient:
        for start in range(0, width, block):
            inside = start + columns < width
            z = tl.load(start_row + start + columns, mask=inside, other=0.0).to(tl.float32)
            gradient = tl.exp(z - log_sum)
            gradient -= tl.where(start + columns == wanted, 1.0 - smoothing, 0.0)
            gradient = tl.where(wanted == pad, 0.0, gradient * scale)
            tl.store(start_row + start + columns, gradient.to(logits.dtype.element_ty), mask=inside)
