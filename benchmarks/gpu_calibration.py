"""The parts of a training step on a GPU, each alone and in all its variants, beside predictions.

What is predicted is arithmetic for one H200 (990 TFLOP/s by data sheet, 790 in large products,
4.3 TB/s), in ns a pair of a source and a target token: A as eager PyTorch does it, B as a compiler
with library kernels, C with the kernels of `dtrain/kernels/`. Nothing of it was measured before.
"""

from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu_task import BYTES_A_SECOND, MATMUL_FLOPS, Task, attempted, timed
from benchmarks.yardstick import Row, matmul_rate
from dtrain.batch import PAD_ID, Kernel, Layout, of_similar_length
from dtrain.config import OptimizerSettings
from dtrain.data.store import PreparedData
from dtrain.kernel_choice import why_not
from dtrain.kernels import attention_choice
from dtrain.kernels.attention import attend, attend_to_self
from dtrain.kernels.residual import add_and_norm
from dtrain.loss import smoothed_cross_entropy
from dtrain.model.settings import ModelSettings
from dtrain.model.transformer import Transformer
from dtrain.optimizer import build_optimizer, clip_gradients, step_unless, take_rate_from_device
from dtrain.parts import autocast, build_plan
from dtrain.utilisation import peak_flops

KERNELS: tuple[Kernel, ...] = ("padded", "varlen", "packed")

ATTENTION_NS = {
    "base": {"padded": 337, "varlen": 320, "packed": 73},
    "big": {"padded": 674, "varlen": 639, "packed": 145},
}
"""Of all 18 attentions together."""

LOSS_NS = {
    "base": {"plain": 231 + 364, "compiled": 188 + 126, "fused": 159 + 61},
    "big": {"plain": 385 + 364, "compiled": 320 + 126, "fused": 277 + 61},
}
"""Of the output layer's products and of the cross-entropy, at 32,768 pieces."""

RESIDUAL_NS = {
    "base": {"plain": 171, "compiled": 81, "fused": 57},
    "big": {"plain": 342, "compiled": 162, "fused": 114},
}
"""Of all 30 sub-layers together."""

PRODUCTS_AT_ONCE = 10  # small ones take less time than it takes to ask for them


def share(rate: float, whole: float | None) -> str:
    """Say which part of a whole a rate is."""
    return f"unknown ({rate / 1e12:.3g} TFLOP/s)" if whole is None else f"{rate / whole:.1%}"


# ------------------------------------------------------------------ matrix products


def matrix_products(task: Task) -> Iterator[Row]:
    """Measure how fast the device multiplies: a large square, then what the models multiply."""
    size, device = 64 if task.is_tiny else 8192, task.torch_device
    rate = matmul_rate((size,) * 3, torch.bfloat16, device, 3 * task.seconds_a_call)
    peak = None
    if device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(device), torch.bfloat16)
    yield {
        "layer": f"a square of {size}",
        "forward TFLOP/s": rate / 1e12,
        "of the data sheet": share(rate, peak),
    }
    for model in ("base", "big"):
        for layer, (k, n) in layers(task.model(model), task.vocabulary_size).items():
            for tokens in dict.fromkeys(min(m, task.tokens) for m in (4096, 16_384, 32_768)):
                what: Row = {"model": model, "layer": layer, "tokens": tokens, "k": k, "n": n}
                yield attempted(what, partial(product, task, tokens, k, n))


def layers(model: ModelSettings, vocabulary_size: int) -> dict[str, tuple[int, int]]:
    """List the linear layers: width of what goes in, and of what comes out."""
    width, inner = model.hidden_dim, model.feed_forward_dim
    return {
        "queries, keys, values": (width, 3 * width),
        "keys, values of the source": (width, 2 * width),
        "attention's output": (width, width),
        "feed-forward, inner": (width, inner),
        "feed-forward, outer": (inner, width),
        "logits": (width, vocabulary_size),
    }


def product(task: Task, m: int, k: int, n: int) -> Row:
    """Measure a linear layer's three products for m tokens, laid out as training has them."""
    states, weight, grad = (
        torch.randn(size, device=task.torch_device).to(torch.bfloat16)
        for size in ((m, k), (n, k), (m, n))
    )
    products: dict[str, Callable[[], Tensor]] = {
        "forward": lambda: states @ weight.T,
        "states' gradient": lambda: grad @ weight,
        "weight's gradient": lambda: grad.T @ states,
    }
    flops, moved = 2 * m * k * n, 2 * (m * k + k * n + m * n)
    row: Row = {}
    for name, multiply in products.items():
        taken = timed(partial(_repeated, multiply), task)
        row[f"{name} TFLOP/s"] = flops * PRODUCTS_AT_ONCE / taken.best / 1e12
    most = flops / max(flops / MATMUL_FLOPS, moved / BYTES_A_SECOND)
    return row | {"predicted at most": most / 1e12}


def _repeated(multiply: Callable[[], Tensor]) -> Tensor:
    for _ in range(PRODUCTS_AT_ONCE - 1):
        multiply()
    return multiply()


# ------------------------------------------------------------------ attention


def attention(task: Task) -> Iterator[Row]:
    """Measure each kernel over a micro-batch of the plan, forward and backward together."""
    config = task.config(task.model("base"), task.tokens)
    plan = build_plan(config, PreparedData.open(task.folder / "prepared"))
    micro_batches = plan.window(0, 0)
    ids = micro_batches[len(micro_batches) // 2]
    lengths = plan.lengths.source_lengths(ids), plan.lengths.target_lengths(ids)
    slots = plan.source_slots, plan.target_slots
    groups = of_similar_length(*lengths, plan.num_rectangles)
    for name in ("base", "big"):
        model = task.model(name)
        for kernel in KERNELS:
            form = kernel, config.data.max_length, groups
            sides = [
                Layout.packed(side, size, *form).map(lambda tensor: tensor.to(task.torch_device))
                for side, size in zip(lengths, slots, strict=True)
            ]
            for case in ("to itself", "to itself, causal", "to the source"):
                what: Row = {"model": name, "kernel": kernel, "attends": case}
                settings = task.torch_device, torch.bfloat16, model.qkv_dim, 0.0
                why = attention_choice.why_not(kernel, *settings)
                if why:
                    yield what | {"skipped": why}
                    continue
                row = attempted(what, partial(attend_row, task, model, sides, case))
                yield row | {"predicted ns a token": ATTENTION_NS[name][kernel] / 18}


def attend_row(task: Task, model: ModelSettings, sides: list[Layout], case: str) -> Row:
    """Measure one kind of attention between two sides."""
    source, target = sides
    shape = model.num_heads, model.qkv_dim
    layout = source if case == "to itself" else target

    def random(slots: int, *parts: int) -> Tensor:
        size = slots, *parts, *shape
        return torch.randn(size, device=task.torch_device).to(torch.bfloat16).requires_grad_()

    slots = len(layout.positions)
    grad = random(slots).detach()
    qkv, q, kv = random(slots, 3), random(slots), random(len(source.positions), 2)

    def work() -> Tensor:
        if case == "to the source":
            return torch.autograd.grad(attend(q, kv, target, source), (q, kv), grad)[0]
        out = attend_to_self(qkv, layout, causal="causal" in case)
        return torch.autograd.grad(out, qkv, grad)[0]

    taken = timed(work, task)
    tokens = int(layout.lengths.sum())
    return {
        "sentences": int((layout.lengths > 0).sum()),
        "tokens": tokens,
        **taken.columns(),
        "ns a token": 1e9 * taken.best / tokens,
    }


# ------------------------------------------------------------------ loss


def cross_entropy(task: Task) -> Iterator[Row]:
    """Measure output layer and loss, forward and backward, sliced and whole."""
    kinds = [(kind, size) for kind in ("plain", "fused") for size in (2**26, 2**27, 2**28)]
    for name in ("base", "big"):
        for kind, size in [*kinds, ("compiled", 0)]:
            what: Row = {"model": name, "loss": kind, "logits at once": size or "all"}
            why = why_not(task.torch_device) if kind == "fused" else ""
            if why:
                yield what | {"skipped": why}
                continue
            row = attempted(what, partial(loss_row, task, name, kind, size))
            yield row | {"predicted ns a token": LOSS_NS[name][kind]}


def loss_row(task: Task, name: str, kind: str, size: int) -> Row:
    """Measure one way to the loss."""
    device, tokens = task.torch_device, task.tokens
    width, pieces = task.model(name).hidden_dim, task.vocabulary_size
    hidden = torch.randn(tokens, width, device=device).to(torch.bfloat16).requires_grad_()
    weight = (torch.randn(pieces, width, device=device) * width**-0.5).requires_grad_()
    target = torch.randint(4, pieces, (tokens,), device=device)
    whole = task.compile(whole_loss)

    def work() -> Tensor:
        with autocast(device, torch.bfloat16):
            if kind == "compiled":
                loss = whole(hidden, weight, target)
            else:
                loss, _ = smoothed_cross_entropy(hidden, weight, target, 0.1, kind == "fused")
        return torch.autograd.grad(loss, (hidden, weight))[0]

    sizes = mock.patch("dtrain.loss._GPU_SLICE", size), mock.patch("dtrain.loss._CPU_SLICE", size)
    with sizes[0], sizes[1]:
        memory: Row = {}
        if device.type == "cuda":
            work()  # what is compiled or tuned at first is so now
            memory["GiB besides"] = gib_besides(work, device)
        taken = timed(work, task)
    return taken.columns() | memory | {"ns a token": 1e9 * taken.best / tokens}


def whole_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Compute the loss by torch's own function over all logits at once."""
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(
        logits, target, ignore_index=PAD_ID, label_smoothing=0.1, reduction="sum"
    )


def gib_besides(work: Callable[[], Tensor], device: torch.device) -> float:
    """Give the most memory that some work holds, beside what was held before."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**30


# ------------------------------------------------------------------ residual


def residual(task: Task) -> Iterator[Row]:
    """Measure dropout, sum and norm around a sub-layer, forward and backward."""
    for name in ("base", "big"):
        for kind in ("plain", "compiled", "fused"):
            what: Row = {"model": name, "residual": kind}
            why = why_not(task.torch_device) if kind == "fused" else ""
            if why:
                yield what | {"skipped": why}
                continue
            row = attempted(what, partial(residual_row, task, name, kind))
            yield row | {"predicted ns a token": RESIDUAL_NS[name][kind] / 30}


def residual_row(task: Task, name: str, kind: str) -> Row:
    """Measure one way around, with the types that it meets in training."""
    device, model = task.torch_device, task.model(name)
    norm = nn.LayerNorm(model.hidden_dim, device=device)
    # Under autocast a plain norm, where `x` comes from, gives fp32; a fused one gives bf16.
    x_dtype = torch.bfloat16 if kind == "fused" else torch.float32
    x, y = (
        torch.randn(task.tokens, model.hidden_dim, device=device).to(dtype).requires_grad_()
        for dtype in (x_dtype, torch.bfloat16)
    )
    grad = torch.randn_like(x, requires_grad=False)

    def site(x: Tensor, y: Tensor) -> Tensor:
        return add_and_norm(x, y, norm, model.dropout, training=True, fused=kind == "fused")

    run = task.compile(site) if kind == "compiled" else site

    def work() -> Tensor:
        with autocast(device, torch.bfloat16):
            out = run(x, y)
        inputs = x, y, norm.weight, norm.bias
        return torch.autograd.grad(out, inputs, grad.to(out.dtype))[0]

    taken = timed(work, task)
    return taken.columns() | {"ns a token": 1e9 * taken.best / task.tokens}


# ------------------------------------------------------------------ optimizer


def optimizer(task: Task) -> Iterator[Row]:
    """Measure the norm of the gradients, their clipping, and fused Adam."""
    for name in ("base", "big"):
        yield attempted({"model": name}, partial(optimizer_row, task, name))


def optimizer_row(task: Task, name: str) -> Row:
    """Measure one model's update."""
    model = Transformer(task.model(name), task.vocabulary_size).to(task.torch_device)
    adam = build_optimizer(model, OptimizerSettings())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    if task.device == "cuda":
        take_rate_from_device(adam, task.torch_device)

    def work() -> Tensor:
        norm = clip_gradients(model, 1.0)
        step_unless(~norm.isfinite(), adam)
        return norm

    taken = timed(work, task)
    count = sum(parameter.numel() for parameter in model.parameters())
    predicted = 40 * count / BYTES_A_SECOND  # 4 for the norm, 8 for clipping, 28 for Adam
    return {"parameters": count, **taken.columns(), "predicted us": 1e6 * predicted}
