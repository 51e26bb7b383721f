"""Learner: a model and everything that changes it; one step of Adam, over all ranks."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dtrain import checkpoint, weights
from dtrain.batch import Batch
from dtrain.config import Config
from dtrain.data.loader import LoadedStep
from dtrain.data.plan import PlannedStep
from dtrain.data.vocabulary import Vocabulary
from dtrain.distributed import World
from dtrain.loss import Objective
from dtrain.optimizer import build_optimizer, clip_gradients, set_learning_rate
from dtrain.parts import PRECISIONS, autocast, build_model, fingerprint, seed_position
from dtrain.reduction import REDUCTIONS
from dtrain.schedule import learning_rate


@dataclass(frozen=True)
class Learned:
    """What a rank knows of a step that was run.

    Attributes:
        plan: the step as all ranks ran it.
        sums: loss and nll of each of this rank's micro-batches, at its index in the step, zeros
            elsewhere; float64 [micro-batches, 2].
        norm: of the gradient, before it was clipped; the same bits on all ranks.
        updated: whether the weights were changed.
    """

    plan: PlannedStep
    sums: Tensor
    norm: float
    updated: bool


class Learner:
    """The model on one rank with its objective, reduction, optimizer and loss scale."""

    def __init__(self, config: Config, vocabulary: Vocabulary, world: World) -> None:
        self.config, self.world = config, world
        self.precision = PRECISIONS[config.precision]
        self.model = build_model(config, vocabulary).to(world.device)
        objective = Objective(self.model, config.loss.label_smoothing)
        if config.kernels.compile is True:
            objective.compile()
        self.reduction = REDUCTIONS[config.distributed.reduction](world, objective)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        is_fp16 = self.precision is torch.float16
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=is_fp16)

    def load(self, path: Path) -> None:
        """Become as a checkpoint was."""
        weights.load_module(self.model, path / checkpoint.MODEL)
        weights.load_optimizer(self.optimizer, self.model, path / checkpoint.OPTIMIZER)
        self.scaler.load_state_dict(checkpoint.read_state(path)["scaler"])

    def check_same_everywhere(self, step: int) -> None:
        """Make sure that weights, moments and loss scale are the same on all ranks, bit for bit.

        Raises:
            RuntimeError: on all ranks, naming those that differ.
        """
        if self.world.size > 1:
            bits = fingerprint(self.model, self.optimizer, self.scaler.get_scale())
            self.world.check_same(f"weights or moments after step {step}", bits)

    @property
    def scale_is_smallest(self) -> bool:
        """Whether fp16's loss scale cannot be what makes gradients infinite."""
        return not self.scaler.is_enabled() or self.scaler.get_scale() <= 1.0

    def try_out(self, batch: Batch) -> None:
        """Run backward without a word to other ranks, and throw the gradients away."""
        with self.world.accumulating(self.reduction.objective):
            self.backward(batch, 0.0)
        self.optimizer.zero_grad(set_to_none=True)

    def discarded_backward(self, batch: Batch) -> None:
        """Run one reduced backward of weight 0 before the first step of every start.

        DistributedDataParallel lays its buckets out anew after its first, which changes sums from
        three ranks on: every start must be past that point alike.
        """
        with self.reduction.micro_batch(is_last=True):
            self.backward(batch, 0.0)
        self.reduction.finish()
        untouched = [name for name, p in self.model.named_parameters() if p.grad is None]
        if untouched:
            raise RuntimeError(f"parameters without a gradient: {untouched}")
        self.optimizer.zero_grad(set_to_none=True)

    def learn(self, number: int, step: LoadedStep, at: Callable[[str, int], None]) -> Learned:
        """Run this rank's micro-batches of a step, reduce once, update.

        Args:
            number: of the step, from 1.
            step: its micro-batches.
            at: told, with the number, which point of the step is reached.
        """
        # The last row is that of empty batches.
        sums = torch.zeros(len(step.plan.micro_batches) + 1, 2, dtype=torch.float64)
        sums = sums.to(self.world.device)
        weight = self.reduction.scale / step.plan.num_target_tokens
        at("before_backward", number)
        for count, (index, batch) in enumerate(step.micro_batches, start=1):
            at("in_backward", number)  # a move each: all of them may take longer than a time-out
            seed_position(self.config.run.seed, number, index)
            with self.reduction.micro_batch(is_last=count == len(step.micro_batches)):
                sums[index] += self.backward(batch, weight)
        at("after_backward", number)
        self.reduction.finish()
        at("before_optimizer", number)
        norm, updated = self.update(number)
        at("after_optimizer", number)
        return Learned(step.plan, sums[:-1], norm, updated)

    def backward(self, batch: Batch, weight: float) -> Tensor:
        """Add a micro-batch's gradients up; gives its sums of loss and nll, float64 [2]."""
        with autocast(self.world.device, self.precision):
            loss, nll = self.reduction.objective(batch.to(self.world.device))
        self.scaler.scale(loss * weight).backward()
        return torch.stack([loss.detach(), nll.detach()]).double()

    def update(self, number: int) -> tuple[float, bool]:
        """Change the weights; gives the gradient's norm before it was clipped, and whether it did.

        If the norm is not finite the update is skipped and nothing else. It is taken after the
        reduction, so that all ranks decide alike.
        """
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.model, self.config.optimizer.max_grad_norm).item()
        set_learning_rate(self.optimizer, self.learning_rate(number))
        is_finite = math.isfinite(norm)
        if is_finite:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, is_finite

    def learning_rate(self, number: int) -> float:
        """Give the rate of a step as the settings want it."""
        settings = self.config
        peak, width = settings.optimizer.learning_rate, settings.model.hidden_dim
        return learning_rate(number, settings.schedule, peak, width, settings.run.max_steps)
