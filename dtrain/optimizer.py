"""Adam and its kin, and what else happens to gradients between backward and the next step."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.config import OptimizerSettings
from dtrain.distributed import World


def build_optimizer(
    model: nn.Module, settings: OptimizerSettings, world: World | None = None
) -> torch.optim.Optimizer:
    """Make the fused optimizer over all parameters of a model.

    AdamW decays weight matrices only, not biases and norms; Adam's decay is L2 on everything.

    Args:
        model: where it will be trained, on its device.
        settings: of the optimizer.
        world: over whose ranks the moments are split; None: each has all of them.
    """
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.name]
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if settings.name == "adamw":
        groups = [
            {"params": [p for p in model.parameters() if p.dim() > 1]},
            {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
        ]
    make = kind if world is None else partial(world.shard, kind)
    return make(
        groups,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the rate of the next update, rounded to fp32: the device may hold no more of it."""
    value = torch.tensor(value, dtype=torch.float32).item()
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def take_rate_from_device(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Keep the rate in the device's memory, where a recorded update finds it."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=device)
        group["capturable"] = True
    # Else torch warns of the steps that come before the recording.
    _of_this_rank(optimizer)._warned_capturable_if_run_uncaptured = True


def step_unless(skip: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Update the weights, unless this flag on the device is set; the host need not know it.

    Fused optimizers look at `found_inf`, by which torch's GradScaler tells them the same.
    """
    _of_this_rank(optimizer).found_inf = skip.float()
    optimizer.step()


def _of_this_rank(optimizer: torch.optim.Optimizer) -> Any:
    """Give the optimizer of this rank's share, if moments are split, else itself."""
    return getattr(optimizer, "optim", optimizer)


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Measure the norm of all gradients together and scale them down to `max_norm`, if above 0."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm
