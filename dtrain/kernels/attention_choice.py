"""Which attention kernel can run on a device, and whether its numbers are right there."""

import importlib.util

import numpy as np
import torch
from torch import Tensor

from dtrain.batch import Kernel, Layout
from dtrain.kernels.attention import attend, attend_to_self


def why_not(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, qkv_dim: int, dropout: float
) -> str:
    """Say why a kernel cannot attend there; empty if it can.

    Args:
        kernel: `padded` can everywhere.
        device: where it would run.
        dtype: of queries, keys and values.
        qkv_dim: width of a head.
        dropout: probability of dropping an attention weight.
    """
    if kernel == "padded":
        return ""
    needs = {
        "a GPU": device.type == "cuda",
        "precision bf16 or fp16": dtype in (torch.bfloat16, torch.float16),
        "heads of 16 to 128 elements, a multiple of 8": 16 <= qkv_dim <= 128 and qkv_dim % 8 == 0,
        "model.attention_dropout 0": kernel == "packed" or not dropout,
        "the Python package triton": kernel == "varlen" or importlib.util.find_spec("triton"),
    }
    return next((f"it needs {what}" for what, is_there in needs.items() if not is_there), "")


def what_is_wrong(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, num_heads: int, qkv_dim: int
) -> str:
    """Attend to a few ragged sentences, and compare with the padded kernel in fp32.

    Args:
        kernel: which must have no reason against it (`why_not`).
        device: where to try.
        dtype: of queries, keys and values.
        num_heads: of the model.
        qkv_dim: of the model.

    Returns:
        What failed, or which result is off by how much; empty if all is well.
    """
    generator = torch.Generator(device).manual_seed(0)
    shapes = (192, 3), (192, 1), (256, 2)

    def random(slots: int, parts: int) -> Tensor:
        size = slots, parts, num_heads, qkv_dim
        return torch.randn(size, generator=generator, device=device).to(dtype)

    projections = [random(*shape) for shape in shapes]
    weights = random(192, 1).squeeze(1)
    try:
        ours = _try_out(kernel, projections, weights)
    except Exception as error:  # whatever a compiler or a driver may raise
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    twins = _try_out("padded", [p.float() for p in projections], weights)
    for name, one, twin in zip(ours, ours.values(), twins.values(), strict=True):
        off = ((one - twin).abs().max() / twin.abs().max()).item()
        if not off <= 4 * torch.finfo(dtype).eps:
            return f"{name} is off by {off:.1%}"
    return ""


def _try_out(kernel: Kernel, projections: list[Tensor], weights: Tensor) -> dict[str, Tensor]:
    """Attend to the own sentence, up to a place and to another side; forward and backward.

    Some sentences fit in a block of any kernel, some do not; one has a single token. Behind each
    side there is slack.
    """
    targets, sources = np.array([30, 1, 70, 17, 40]), np.array([25, 64, 3, 100, 41])
    layouts = (Layout.packed(targets, 192, kernel), Layout.packed(sources, 256, kernel))
    layout, source_layout = (item.map(lambda t: t.to(weights.device)) for item in layouts)
    qkv, q, kv = (projection.clone().requires_grad_() for projection in projections)
    found = {
        "self-attention": (attend_to_self(qkv, layout), [qkv]),
        "causal self-attention": (attend_to_self(qkv, layout, causal=True), [qkv]),
        "attention to the source": (attend(q.squeeze(1), kv, layout, source_layout), [q, kv]),
    }
    results = dict[str, Tensor]()
    for name, (out, inputs) in found.items():
        tokens = out[: targets.sum()]
        gradients = torch.autograd.grad(tokens, inputs, weights[: targets.sum()].to(out.dtype))
        results[name] = tokens.detach().float()
        results |= {f"gradient {i} of {name}": g.float() for i, g in enumerate(gradients)}
    return results
