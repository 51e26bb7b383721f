"""Label-smoothed cross-entropy, summed over tokens, without ever holding all logits."""

from typing import Any

import torch
from torch import Tensor, nn

from dtrain.batch import PAD_ID, Batch
from dtrain.model.transformer import Transformer

# Logits held at once: on the CPU about what a cache takes, on a GPU what keeps it busy.
_CPU_SLICE, _GPU_SLICE = 2**23, 2**26


class Objective(nn.Module):
    """From a batch to its loss: the module that training runs, so that no logits are returned."""

    def __init__(self, model: Transformer, label_smoothing: float, fused: bool = False) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        self.fused = fused

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over the target tokens of a batch.

        Returns:
            Two scalars in nats: the smoothed loss, and the negative log-likelihood, which has no
            gradient.
        """
        hidden = self.model.hidden(batch)
        weight = self.model.decoder.output_weight
        smoothing = self.label_smoothing
        return smoothed_cross_entropy(hidden, weight, batch.target_out, smoothing, self.fused)


def smoothed_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, label_smoothing: float, fused: bool = False
) -> tuple[Tensor, Tensor]:
    """Compare predictions with a target that keeps a little probability for every token.

    With logits z = weight @ hidden and smoothing e the loss of a token y is
    logsumexp(z) - (1 - e) z[y] - e mean(z): the right token's share is 1 - e, and e is spread over
    the whole vocabulary (Szegedy et al. 2015, https://arxiv.org/abs/1512.00567, 7). Since mean(z)
    is the product of the state and the matrix's mean row, its sum takes no pass over logits.

    Args:
        hidden: the decoder's states, [..., hidden].
        weight: the output layer's matrix, [vocabulary, hidden].
        target: ids, int64 [...]; PAD_ID where nothing counts.
        label_smoothing: e, in [0, 1).
        fused: turn logits into gradients by Triton, on a GPU, with fewer passes over them.

    Returns:
        Two sums over the tokens, in nats: the loss, and the negative log-likelihood (the loss
        without smoothing), which has no gradient.
    """
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    states, ids = hidden.flatten(0, -2), target.flatten()
    return _CrossEntropy.apply(  # type: ignore[no-untyped-call]  # torch's own
        states, weight, ids, label_smoothing, with_gradient, fused
    )


class _CrossEntropy(torch.autograd.Function):
    """Sums logsumexp(z) - (1 - e) z[y] over slices of tokens, and -e mean(z) over all at once.

    The gradients of a slice are taken while its logits are there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        smoothing: float,
        with_gradient: bool,
        fused: bool,
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        dtype = hidden.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        states, matrix, counts = hidden.to(dtype), weight.to(dtype), target != PAD_ID
        loss = hidden.new_zeros((), dtype=torch.promote_types(dtype, torch.float32))
        nll = torch.zeros_like(loss)
        gradients = (torch.empty_like(hidden), torch.zeros_like(weight)) if with_gradient else ()
        num_rows = max(1, (_CPU_SLICE if device == "cpu" else _GPU_SLICE) // len(weight))
        logits = states.new_empty(min(num_rows, len(states)), len(weight))
        compare = _compare_fused if fused else _compare
        with torch.autocast(device, enabled=False):
            for start in range(0, len(target), num_rows):
                part = slice(start, start + num_rows)
                h, count = states[part], counts[part]
                z = torch.mm(h, matrix.T, out=logits[: len(h)])
                losses, nlls, difference = compare(z, target[part], smoothing, with_gradient)
                # Not in place: torch 2.11 compiles that to a loss without a gradient.
                loss, nll = loss + (losses * count).sum(), nll + (nlls * count).sum()
                if gradients:
                    share = (count[:, None] / _boost(dtype)).to(dtype)
                    gradients[0][part] = difference @ matrix * share
                    gradients[1].add_(difference.T @ (h * share))
            mean_row = weight.mean(0, dtype=loss.dtype)
            counted = (hidden * counts[:, None]).sum(0, dtype=loss.dtype)
            loss = loss - smoothing * (counted * mean_row).sum()
            if gradients:
                gradients[0].sub_(counts[:, None] * (smoothing * mean_row))
                gradients[1].sub_(smoothing / len(weight) * counted)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(
        ctx: Any, loss_grad: Tensor, _nll_grad: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * loss_grad, weight_grad * loss_grad, None, None, None, None


def _compare(
    logits: Tensor, target: Tensor, smoothing: float, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Give each row's loss and nll, and the gradient of the logits, which are consumed.

    The gradient, probabilities minus 1 - e for the right token, is that of a boosted loss.
    """
    z, y = logits.to(torch.promote_types(logits.dtype, torch.float32)), target[:, None]
    right, highest = z.gather(1, y), z.amax(1, keepdim=True)
    # In place, and without another pass for logsumexp: the largest probability tells it.
    p = torch.softmax(z, 1, out=z)
    log_sum = highest - p.amax(1, keepdim=True).log()
    if with_gradient:
        p.scatter_add_(1, y, p.new_full(y.shape, smoothing - 1))
        if _boost(logits.dtype) != 1:
            p.mul_(_boost(logits.dtype))
    loss, nll = log_sum - (1 - smoothing) * right, log_sum - right
    return loss.squeeze(1), nll.squeeze(1), p.to(logits.dtype)


def _compare_fused(
    logits: Tensor, target: Tensor, smoothing: float, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Give what _compare gives."""
    # Imported where it is used: it needs Triton, which not every machine has.
    from dtrain.kernels.cross_entropy import cross_entropy

    loss, nll = cross_entropy(logits, target, smoothing, _boost(logits.dtype), with_gradient)
    return loss, nll, logits


def _boost(dtype: torch.dtype) -> float:
    # fp16 cannot hold the smallest probabilities; a power of two in between changes no other bit.
    return 64.0 if dtype == torch.float16 else 1.0
