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

    def __init__(self, model: Transformer, label_smoothing: float) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over the target tokens of a batch.

        Returns:
            Two scalars in nats: the smoothed loss, and the negative log-likelihood, which has no
            gradient.
        """
        hidden = self.model.hidden(batch)
        weight = self.model.decoder.output_weight
        return smoothed_cross_entropy(hidden, weight, batch.target_out, self.label_smoothing)


def smoothed_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, label_smoothing: float
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

    Returns:
        Two sums over the tokens, in nats: the loss, and the negative log-likelihood (the loss
        without smoothing), which has no gradient.
    """
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss, nll = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden.flatten(0, -2), weight, target.flatten(), label_smoothing, with_gradient
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
        with torch.autocast(device, enabled=False):
            for start in range(0, len(target), num_rows):
                part = slice(start, start + num_rows)
                h, y, count = states[part], target[part, None], counts[part, None]
                log_p = (h @ matrix.T).to(loss.dtype).log_softmax(1)
                part_nll = -(log_p.gather(1, y) * count).sum()
                nll += part_nll
                loss += (1 - smoothing) * part_nll
                if smoothing:
                    loss -= smoothing * (log_p.mean(1, keepdim=True) * count).sum()
                if gradients:
                    h_grad, matrix_grad = _slice_gradients(log_p, h, matrix, y, count, smoothing)
                    gradients[0][part] = h_grad
                    gradients[1].add_(matrix_grad)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(
        ctx: Any, loss_grad: Tensor, _nll_grad: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * loss_grad, weight_grad * loss_grad, None, None, None


def _slice_gradients(
    log_p: Tensor, h: Tensor, matrix: Tensor, y: Tensor, count: Tensor, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Gradients of a slice's loss for its states [rows, hidden] and for the matrix.

    They are probabilities minus the smoothed target, times the other factor. `log_p` is consumed.
    """
    # fp16 cannot hold the smallest probabilities; a power of two in between changes no other bit.
    boost = 64.0 if h.dtype == torch.float16 else 1.0
    difference = log_p.exp_().sub_(smoothing / log_p.shape[1])
    difference.scatter_add_(1, y, difference.new_full(y.shape, smoothing - 1))
    if boost != 1:
        difference.mul_(boost)
    difference = difference.to(h.dtype)
    share = (count / boost).to(h.dtype)
    return difference @ matrix * share, difference.T @ (h * share)
