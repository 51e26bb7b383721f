"""Which kernels train: what `auto` means on a device, once it is tried there."""

import importlib.util
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from dtrain.batch import PAD_ID, Kernel
from dtrain.config import Config, KernelsSettings
from dtrain.errors import UserError
from dtrain.kernels import attention_choice
from dtrain.kernels.residual import add_and_norm
from dtrain.loss import smoothed_cross_entropy
from dtrain.parts import PRECISIONS, autocast

Results = dict[str, Tensor]


def choose_kernels(
    config: Config, device: torch.device, recorded: KernelsSettings
) -> tuple[KernelsSettings, list[str]]:
    """Say which kernels train on a device: the settings, with what `auto` means there.

    Args:
        config: with the precision resolved.
        device: of this rank; the others have such devices too.
        recorded: what the run had, kept as far as it works here; all `auto` if it is not begun.

    Returns:
        The settings, and what the user should know of them.

    Raises:
        UserError: if the settings want one that does not work there.
    """
    attention, notices = choose_attention(config, device, recorded.attention)
    chosen, plain = choose_fused(config, device, recorded)
    return chosen.model_copy(update={"attention": attention}), [*notices, *plain]


def choose_attention(
    config: Config, device: torch.device, recorded: Kernel | Literal["auto"] = "auto"
) -> tuple[Kernel, list[str]]:
    """Say which kernel attends in training: `kernels.attention`, or what `auto` means there.

    Args:
        config: with the precision resolved.
        device: of this rank; the others have such devices too.
        recorded: what the run had so far, which `auto` keeps if it works there.

    Returns:
        The kernel, and what speaks against each that would have come before it.

    Raises:
        UserError: if the settings name one that does not work there.
    """
    model, wanted = config.model, config.kernels.attention
    dtype = PRECISIONS[config.precision]
    candidates: list[Kernel] = ["padded"]
    if device.type == "cuda":
        candidates = ["packed", "varlen", "padded"]
    if recorded != "auto":
        candidates = [recorded, "padded"]
    if wanted != "auto":
        candidates = [wanted]
    notices = list[str]()
    for kernel in candidates:
        place, width = (kernel, device, dtype), model.qkv_dim
        why = attention_choice.why_not(*place, width, model.attention_dropout)
        if not why and kernel != "padded":
            why = attention_choice.what_is_wrong(*place, model.num_heads, width)
        if not why:
            return kernel, notices
        notices.append(f"the attention kernel {kernel} is not used: {why}")
    raise UserError(
        f"kernels.attention {wanted} does not work on this {device.type}: {why}; set it to auto or "
        f"padded"
    )


def choose_fused(
    config: Config, device: torch.device, recorded: KernelsSettings
) -> tuple[KernelsSettings, list[str]]:
    """Say what `kernels.loss` and `kernels.residual` are on a device.

    Args:
        config: with the precision resolved.
        device: of this rank; the others have such devices too.
        recorded: what the run had, kept if it works here; `auto` if it is not begun.

    Returns:
        The settings, both of them plain or fused, and why one is plain that would be fused.

    Raises:
        UserError: if the settings want one that does not work there.
    """
    chosen, notices = config.kernels, list[str]()
    for name, what_is_wrong in CHECKS.items():
        wanted = getattr(config.kernels, name)
        kind = getattr(recorded, name) if wanted == "auto" else wanted
        if kind == "auto":
            kind = "fused" if device.type == "cuda" else "plain"
        why = "" if kind == "plain" else why_not(device) or what_is_wrong(config, device)
        if why and wanted == "fused":
            raise UserError(
                f"kernels.{name} fused does not work on this {device.type}: {why}; set it to auto "
                f"or plain"
            )
        if why:
            notices.append(f"the fused {name} is not used: {why}")
        chosen = chosen.model_copy(update={name: "plain" if why else kind})
    return chosen, notices


def why_not(device: torch.device) -> str:
    """Say why fused kernels cannot run there; empty if they can."""
    needs = {
        "a GPU": device.type == "cuda",
        "the Python package triton": importlib.util.find_spec("triton"),
    }
    return next((f"it needs {what}" for what, is_there in needs.items() if not is_there), "")


def check_loss(config: Config, device: torch.device) -> str:
    """Compare loss and gradients with those of the plain way; gives what is wrong, or nothing."""
    dtype, generator = PRECISIONS[config.precision], torch.Generator(device).manual_seed(0)

    def run(fused: bool) -> Results:
        with autocast(device, dtype):
            loss, nll = smoothed_cross_entropy(hidden, weight, target, 0.1, fused)
        gradients = torch.autograd.grad(loss, (hidden, weight))
        return {"loss": loss, "nll": nll, "states": gradients[0], "matrix": gradients[1]}

    hidden = torch.randn(70, 64, generator=generator, device=device).requires_grad_()
    weight = torch.randn(5003, 64, generator=generator, device=device).requires_grad_()
    target = torch.randint(5003, (70,), generator=generator, device=device)
    target[::8] = PAD_ID
    return _tried(lambda: _first_difference(run(fused=True), run(fused=False), dtype))


def check_residual(config: Config, device: torch.device) -> str:
    """Look at masks, and compare with the plain way, given the mask; gives what is wrong."""
    dtype, generator = PRECISIONS[config.precision], torch.Generator(device).manual_seed(0)
    shape, p = (130, config.model.hidden_dim), 0.25

    def fused(seed: int, x: Tensor, y: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        torch.manual_seed(seed)
        return add_and_norm(x, y, norm, p, training=True, fused=True)

    def results(out: Tensor) -> Results:
        inputs = {"x": x, "y": y, "weight": norm.weight, "bias": norm.bias}
        gradients = torch.autograd.grad(
            out, [*inputs.values()], grad.to(out.dtype), materialize_grads=True
        )
        return {"result": out, **dict(zip(inputs, gradients, strict=True))}

    def run() -> str:
        ones, zeros = torch.ones_like(grad), torch.zeros_like(grad)
        mask, again, other = (fused(seed, zeros, ones) for seed in (1, 1, 2))
        dropped = (mask == 0).float().mean().item()
        if abs(dropped - p) > 5 * math.sqrt(p * (1 - p) / mask.numel()):
            return f"{dropped:.1%} are dropped and not {p:.0%}"
        if not torch.equal(mask, again) or torch.equal(mask, other):
            return "the seed does not decide what is dropped"
        return _first_difference(
            results(fused(1, x, y, norm)), results(norm(x + y * mask)), dtype
        ) or _first_difference(results(fused(1, x, y)), results(x + y * mask), dtype)

    x, y, grad = (torch.randn(shape, generator=generator, device=device) for _ in range(3))
    x, y = x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()
    norm = nn.LayerNorm(shape[1], device=device)
    for parameter in norm.parameters():
        parameter.data.normal_(generator=generator)
    return _tried(run)


CHECKS = {"loss": check_loss, "residual": check_residual}


def _tried(run: Callable[[], str]) -> str:
    try:
        return run()
    except Exception as error:  # whatever a compiler or a driver may raise
        first_line, *_ = str(error).strip().partition("\n")
        return f"{type(error).__name__}: {first_line}"


def _first_difference(ours: Results, twins: Results, dtype: torch.dtype) -> str:
    """Name a result, or the gradient of an input, that is further off than rounding explains."""
    for name, twin in twins.items():
        off, size = (ours[name].float() - twin.float()).abs().max(), twin.float().abs().max()
        if not off <= max(4 * torch.finfo(dtype).eps, 1e-4) * size:  # a nan is not
            return f"{name} is off by {off / size:.1%}"
    return ""
