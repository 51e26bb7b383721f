"""Label-smoothed cross-entropy, summed over tokens, without ever holding all logits."""

from typing import Any

import torch
from torch import Tensor, nn

from dtrain.batch import PAD_ID, Batch
from dtrain.model.transformer import Transformer

# Logits held at once: on the CPU about what a cache takes, on a GPU what keeps it busy.
_CPU_SLICE, _GPU_SLICE = 2**22, 2**26


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
    the whole vocabulary (Szegedy et al. 2015, https://arxiv.org/abs/1512.00567, 7).

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
    loss, nll = _CrossEntropy.apply(  # type: ignore[no-untyped-call]  # torch's own
        hidden.flatten(0, -2), weight, target.flatten(), label_smoothing, with_gradient, fused
    )
    return loss, nll


class _CrossEntropy(torch.autograd.Function):
    """Goes over slices of tokens; each slice's gradients are taken while its logits are there."""

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
        take = _fused_slice if fused else _plain_slice
        with torch.autocast(device, enabled=False):
            for start in range(0, len(target), num_rows):
                part = slice(start, start + num_rows)
                slices = states[part], target[part, None], counts[part, None]
                part_loss, part_nll, *products = take(matrix, *slices, smoothing, with_gradient)
                loss += part_loss
                nll += part_nll
                if gradients:
                    gradients[0][part] = products[0]
                    gradients[1].add_(products[1])
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(
        ctx: Any, loss_grad: Tensor, _nll_grad: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * loss_grad, weight_grad * loss_grad, None, None, None, None


def _plain_slice(
    matrix: Tensor, h: Tensor, y: Tensor, count: Tensor, smoothing: float, with_gradient: bool
) -> tuple[Tensor, ...]:
    """Give a slice's loss and nll, and its gradients for states [rows, hidden] and matrix."""
    logits = h @ matrix.T
    log_p = logits.to(torch.promote_types(h.dtype, torch.float32)).log_softmax(1)
    nll = -(log_p.gather(1, y) * count).sum()
    loss = (1 - smoothing) * nll
    if smoothing:
        loss -= smoothing * (log_p.mean(1, keepdim=True) * count).sum()
    if not with_gradient:
        return loss, nll
    return loss, nll, *_slice_gradients(log_p, h, matrix, y, count, smoothing)


def _fused_slice(
    matrix: Tensor, h: Tensor, y: Tensor, count: Tensor, smoothing: float, with_gradient: bool
) -> tuple[Tensor, ...]:
    """Give what _plain_slice gives."""
    # Imported where it is used: it needs Triton, which not every machine has.
    from dtrain.kernels.cross_entropy import cross_entropy

    logits, boost = h @ matrix.T, _boost(h.dtype)
    loss, nll = cross_entropy(logits, y.squeeze(1), smoothing, boost, with_gradient)
    if not with_gradient:
        return loss.sum(), nll.sum()
    return loss.sum(), nll.sum(), *_products(logits, h, matrix, count)


def _boost(dtype: torch.dtype) -> float:
    # fp16 cannot hold the smallest probabilities; a power of two in between changes no other bit.
    return 64.0 if dtype == torch.float16 else 1.0


def _slice_gradients(
    log_p: Tensor, h: Tensor, matrix: Tensor, y: Tensor, count: Tensor, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Gradients of a slice's loss for its states [rows, hidden] and for the matrix.

    They are probabilities minus the smoothed target, times the other factor. `log_p` is consumed.
    """
    boost = _boost(h.dtype)
    difference = log_p.exp_().sub_(smoothing / log_p.shape[1])
    difference.scatter_add_(1, y, difference.new_full(y.shape, smoothing - 1))
    if boost != 1:
        difference.mul_(boost)
    return _products(difference.to(h.dtype), h, matrix, count)


def _products(
    difference: Tensor, h: Tensor, matrix: Tensor, count: Tensor
) -> tuple[Tensor, Tensor]:
    share = (count / _boost(h.dtype)).to(h.dtype)
    return difference @ matrix * share, difference.T @ (h * share)
