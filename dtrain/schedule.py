"""Learning rates as pure functions of the step: nothing to save, nothing to restore."""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ScheduleSettings(BaseModel):
    """How the learning rate rises and falls."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["noam", "inverse_sqrt", "linear", "cosine", "constant"] = "noam"
    warmup_steps: int = Field(4000, ge=0, description="steps of linear rise at the start")


def learning_rate(
    step: int, settings: ScheduleSettings, peak: float, hidden_dim: int, max_steps: int
) -> float:
    """Give the learning rate of a step.

    Args:
        step: from 1.
        settings: name and warm-up.
        peak: the highest rate; for `noam` the factor before equation 3, 1 in the paper.
        hidden_dim: width of the model; only `noam` depends on it.
        max_steps: where `linear` and `cosine` reach zero.
    """
    warmup = settings.warmup_steps
    if settings.name == "noam":  # Vaswani et al. 2017, equation 3
        rise = step * warmup**-1.5 if warmup else math.inf
        return peak * hidden_dim**-0.5 * min(step**-0.5, rise)
    if step < warmup:
        return peak * step / warmup
    if settings.name == "inverse_sqrt":
        return peak * math.sqrt(max(warmup, 1) / step)
    progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    if settings.name == "linear":
        return peak * (1 - progress)
    if settings.name == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    return peak
