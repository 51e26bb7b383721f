"""How the gradients of a step's micro-batches become one, the same on every rank.

`ddp` adds up a rank's micro-batches in their order and averages over the ranks as
DistributedDataParallel does: fast, but another number of ranks adds in another order. `tree` adds
in one fixed binary tree over all micro-batches of the step: the same bits on 1, 2, 4, ... ranks,
for some more copies of the gradients and their exchange after backward instead of during it. `flat`
adds up as `ddp` does, and exchanges all gradients at once after backward, which knows nothing of
other ranks: so it can be recorded as a CUDA graph.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from dtrain.config import DistributedSettings
from dtrain.distributed import World

GRADIENT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Reduction(Protocol):
    """One way to reduce.

    Attributes:
        objective: the module to call, wrapped as this way needs it.
        scale: what each micro-batch's loss is multiplied with, beside 1 / tokens of the step.
    """

    objective: nn.Module
    scale: float

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Surround forward and backward of each micro-batch of a step."""

    def finish(self) -> None:
        """Leave the step's gradient in every parameter's `.grad`."""


class DdpReduction:
    """DistributedDataParallel's mean over the ranks, of gradients that were added up locally."""

    def __init__(self, world: World, objective: nn.Module, settings: DistributedSettings) -> None:
        self.world, self.scale = world, float(world.size)
        dtype = GRADIENT_DTYPES[settings.gradient_dtype]
        self.objective = world.wrap(objective, settings.bucket_mb, dtype)

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Hold the reduction back until the last."""
        return nullcontext() if is_last else self.world.accumulating(self.objective)

    def finish(self) -> None:
        """Do nothing: the last backward has reduced."""


class FlatReduction:
    """A sum over the ranks, in one piece, of gradients that were added up locally."""

    def __init__(self, world: World, objective: nn.Module, settings: DistributedSettings) -> None:
        self.world, self.scale = world, 1.0
        self.objective = objective
        self._parameters = list(objective.parameters())
        self._dtype = GRADIENT_DTYPES[settings.gradient_dtype]

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Leave gradients where they are added up."""
        del is_last
        return nullcontext()

    def finish(self) -> None:
        """Add up over the ranks, and put the sums where the gradients were."""
        if self.world.size == 1:
            return
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients]).to(self._dtype)
        self.world.sum(flat)
        sums = flat.split_with_sizes([gradient.numel() for gradient in gradients])
        views = [part.view_as(g) for part, g in zip(sums, gradients, strict=True)]
        torch._foreach_copy_(gradients, views)


class TreeReduction:
    """A sum in the order of a binary tree, whose leaves are the step's micro-batches.

    The number of micro-batches and of ranks must be powers of two: then each rank's contiguous
    share is a whole subtree. While micro-batches come, partial sums of 1, 2, 4, ... of them wait
    for their neighbours, as the digits of a binary counter do.
    """

    def __init__(self, world: World, objective: nn.Module) -> None:
        self.world, self.scale = world, 1.0
        self.objective = objective
        self._parameters = list(objective.parameters())
        self._partial: list[tuple[int, list[Tensor]]] = []  # (micro-batches in it, their sum)

    @contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        """Take the gradient of this micro-batch away from the parameters, into the tree."""
        del is_last  # every micro-batch is a leaf
        yield
        count = 1
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        while self._partial and self._partial[-1][0] == count:
            _, earlier = self._partial.pop()
            torch._foreach_add_(earlier, gradients)
            count, gradients = 2 * count, earlier
        self._partial.append((count, gradients))

    def finish(self) -> None:
        """Add up over the ranks, and give every parameter its gradient."""
        [(_, gradients)] = self._partial
        self._partial = []
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        self.world.tree_sum(flat)
        sizes = [p.numel() for p in self._parameters]
        for parameter, gradient in zip(self._parameters, flat.split_with_sizes(sizes), strict=True):
            parameter.grad = gradient.view_as(parameter)


def build_reduction(world: World, objective: nn.Module, settings: DistributedSettings) -> Reduction:
    """Make the way to reduce that the settings want."""
    if settings.reduction == "tree":
        return TreeReduction(world, objective)
    kind = FlatReduction if settings.reduction == "flat" else DdpReduction
    return kind(world, objective, settings)
