"""Learner: a model and everything that changes it; one step of Adam, over all ranks."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dtrain import checkpoint, weights
from dtrain.batch import Batch
from dtrain.config import Config
from dtrain.data.loader import LoadedStep
from dtrain.data.plan import PlannedStep
from dtrain.data.vocabulary import Vocabulary
from dtrain.distributed import World
from dtrain.loss import Objective
from dtrain.optimizer import (
    build_optimizer,
    clip_gradients,
    set_learning_rate,
    step_unless,
    take_rate_from_device,
)
from dtrain.parts import PRECISIONS, autocast, build_model, fingerprint, seed_position
from dtrain.recording import RecordedBackward, Recording
from dtrain.reduction import build_reduction
from dtrain.schedule import learning_rate


class Outcome:
    """Numbers that the device is still at; nothing waits for them before they are read."""

    def __init__(self, value: Tensor) -> None:
        self._value = value
        self._is_there: torch.cuda.Event | None = None
        if value.is_cuda:
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._is_there = torch.cuda.Event()
            self._is_there.record()

    def read(self) -> Tensor:
        """Give them on the CPU; wait for what the device was asked before them, not after."""
        if self._is_there is not None:
            self._is_there.synchronize()
        return self._value


@dataclass(frozen=True)
class Learned:
    """What a rank knows of a step that was run.

    Attributes:
        number: of the step.
        plan: the step as all ranks ran it.
        losses: what `sums` gives, once the device has come to it.
        gradient: what `norm` gives, likewise.
    """

    number: int
    plan: PlannedStep
    losses: Outcome
    gradient: Outcome

    @property
    def sums(self) -> Tensor:
        """Loss and nll of each of this rank's micro-batches, zeros for others: float64 [..., 2]."""
        return self.losses.read()

    @property
    def norm(self) -> float:
        """The gradient's norm, before it was clipped; the same bits on all ranks."""
        return self.gradient.read().item()

    @property
    def updated(self) -> bool:
        """Whether the weights were changed: unless the norm is not finite."""
        return math.isfinite(self.norm)


class Learner:
    """The model on one rank with its objective, reduction, optimizer and loss scale."""

    def __init__(self, config: Config, vocabulary: Vocabulary, world: World) -> None:
        self.config, self.world = config, world
        self.precision = PRECISIONS[config.precision]
        self.model = build_model(config, vocabulary).to(world.device)
        fused = config.kernels.loss == "fused"
        objective = Objective(self.model, config.loss.label_smoothing, fused)
        if config.kernels.compile is True:
            # Torch's own masks: Inductor's can be wrong on GPUs, pytorch/pytorch#198333.
            torch._inductor.config.fallback_random = True
            # Only a rectangle, as wide as its longest sentence, differs from batch to batch.
            objective.compile(dynamic=None if config.kernels.attention == "padded" else False)
        self.reduction = build_reduction(world, objective, config.distributed)
        sharing = world if config.distributed.shard_optimizer else None
        self.optimizer = build_optimizer(self.model, config.optimizer, sharing)
        is_fp16 = self.precision is torch.float16
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=is_fp16)
        self._held = torch.zeros((), dtype=torch.bool, device=world.device)
        self._recorded_backward: RecordedBackward | None = None
        self._recorded_update: Recording | None = None

    def load(self, path: Path) -> None:
        """Become as a checkpoint was."""
        weights.load_module(self.model, path / checkpoint.MODEL)
        weights.load_optimizer(self.optimizer, self.model, path / checkpoint.OPTIMIZER)
        self.scaler.load_state_dict(checkpoint.read_state(path)["scaler"])

    def collect_moments(self) -> dict[str, Tensor]:
        """Bring to rank 0 the moments that only other ranks hold; all ranks together."""
        if not self.config.distributed.shard_optimizer:
            return {}
        return self.world.collect(weights.moments(self.optimizer, self.model))

    def check_same_everywhere(self, step: int) -> None:
        """Make sure that weights, moments and loss scale are the same on all ranks, bit for bit.

        Moments that are split over the ranks are nowhere twice: there is nothing to compare.

        Raises:
            RuntimeError: on all ranks, naming those that differ.
        """
        if self.world.size > 1:
            bits = fingerprint(self.model, self.optimizer, self.scaler.get_scale())
            self.world.check_same(f"weights or moments after step {step}", bits)

    @property
    def runs_behind(self) -> bool:
        """Whether the device may still be at a step when `learn` has returned."""
        return self.world.device.type == "cuda"

    @property
    def scale_is_smallest(self) -> bool:
        """Whether fp16's loss scale cannot be what makes gradients infinite."""
        return not self.scaler.is_enabled() or self.scaler.get_scale() <= 1.0

    @property
    def last_gradient(self) -> nn.Parameter:
        """The parameter whose gradient comes last in backward: the source's embedding."""
        return (self.model.encoder.embedding or self.model.decoder.embedding).weight

    def try_out(self, batch: Batch) -> None:
        """Run backward without a word to other ranks, and throw the gradients away."""
        with self.world.accumulating(self.reduction.objective):
            self.backward(batch, 0.0)
        self.optimizer.zero_grad(set_to_none=True)

    def discarded_backward(self, batch: Batch) -> None:
        """Run one reduced backward of weight 0 at each start of several ranks, before a step.

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

    def expect_no_compilation(self) -> None:
        """Take it as a failure if anything is compiled from now on.

        All batches have one shape. To compile once more would take a minute, perhaps at each step,
        and hold all ranks up: better an end that says what changed.
        """
        if self.config.kernels.compile is True and self.config.kernels.attention != "padded":
            torch._dynamo.config.error_on_recompile = True

    def learn(self, number: int, step: LoadedStep, at: Callable[[str, int], None]) -> Learned:
        """Run this rank's micro-batches of a step, reduce once, update.

        Args:
            number: of the step, from 1.
            step: its micro-batches.
            at: told, with the number, which point of the step is reached.
        """
        # The last row is that of empty batches.
        shape = len(step.plan.micro_batches) + 1, 2
        sums = torch.zeros(shape, dtype=torch.float64, device=self.world.device)
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
        gradient = Outcome(self.update(number))
        at("after_optimizer", number)
        return Learned(number, step.plan, Outcome(sums[:-1]), gradient)

    def backward(self, batch: Batch, weight: float) -> Tensor:
        """Add a micro-batch's gradients up; gives its sums of loss and nll, float64 [2]."""
        if self._recorded_backward is not None:
            return self._recorded_backward(batch, weight)
        return self._backward(batch.to(self.world.device), weight)

    def update(self, number: int) -> Tensor:
        """Change the weights; gives the gradient's norm before it was clipped.

        If the norm is not finite the update is skipped and nothing else: the device itself decides
        that. The norm is taken after the reduction, so that all ranks decide alike.
        """
        set_learning_rate(self.optimizer, self.learning_rate(number))
        if self._recorded_update is not None:
            return self._recorded_update.replay()
        norm = self._update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def record(self, example: Batch) -> None:
        """Record forward and backward, and the update, as CUDA graphs; from now on these run.

        Args:
            example: a batch of the shape of all others, on the GPU.
        """
        scale = self.scaler.state_dict()
        self._backward(example, 0.0)  # makes the gradients' buffers, which stay from now on
        self._recorded_backward = RecordedBackward(self._backward, example)
        take_rate_from_device(self.optimizer, self.world.device)
        self._held.fill_(True)  # the warm-ups change nothing
        self._recorded_update = Recording(self._update_and_clear)
        self._held.fill_(False)
        self.scaler.load_state_dict(scale)

    def _backward(self, batch: Batch, weight: float | Tensor) -> Tensor:
        with autocast(self.world.device, self.precision):
            loss, nll = self.reduction.objective(batch)
        self.scaler.scale(loss * weight).backward()
        return torch.stack([loss.detach(), nll.detach()]).double()

    def _update(self) -> Tensor:
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.model, self.config.optimizer.max_grad_norm)
        step_unless(~norm.isfinite() | self._held, self.optimizer)
        self.scaler.update()
        return norm

    def _update_and_clear(self) -> Tensor:
        norm = self._update()
        self.optimizer.zero_grad(set_to_none=False)
        return norm

    def learning_rate(self, number: int) -> float:
        """Give the rate of a step as the settings want it."""
        settings = self.config
        peak, width = settings.optimizer.learning_rate, settings.model.hidden_dim
        return learning_rate(number, settings.schedule, peak, width, settings.run.max_steps)
