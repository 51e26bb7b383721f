"""`batch.tokens_per_micro_batch: auto`: the largest micro-batch that fits, found before training.

All ranks look for it together, with a model, its gradients and Adam's moments that are thrown away
afterwards. On a GPU a size is tried, the largest first: too large a one fails and does no harm. On
a CPU the kernel kills who takes too much, so there two small sizes are counted, and the rest
follows: beside what the model takes, memory grows with the number of slots.
"""

import gc
from collections.abc import Callable, Sequence

import torch

from dtrain.batch import Batch
from dtrain.config import Config
from dtrain.data.loader import collate
from dtrain.data.settings import LEAST_SLOTS, BatchSettings
from dtrain.data.store import PreparedData
from dtrain.distributed import World
from dtrain.errors import UserError
from dtrain.learner import Learner
from dtrain.memory import free_memory, peak_bytes
from dtrain.parts import build_plan, configure_torch
from dtrain.rehearsal import SHRINK, enough_memory, fits, heaviest, possible_sizes

GPU_SHARE_KEPT_FREE = 0.1  # for longer sentences in later windows, and gaps between tensors
CPU_FACTOR = 1.5  # likewise; the allocator alone was seen to waste a quarter
COUNTED_RATIO = 4  # of the two sizes that are counted


def with_size(config: Config, size: int) -> Config:
    """Give the settings with micro-batches of so many slots."""
    step = config.batch.tokens_per_step
    batch = BatchSettings(tokens_per_step=step, tokens_per_micro_batch=size)
    return config.model_copy(update={"batch": batch})


def find_size(config: Config, data: PreparedData, world: World) -> tuple[int, str]:
    """Find the largest micro-batch that fits on every rank; all ranks call it.

    Args:
        config: the settings, all but this one as recorded.
        data: the prepared text, whose heaviest micro-batches are tried.
        world: the ranks.

    Returns:
        Its target slots, and a line for the user that says why it is this one.

    Raises:
        UserError: on all ranks, if none fits; on a rank alone, if not even the model does there.
    """
    configure_torch(config, world.device)
    sizes = possible_sizes(config, world.size)
    with enough_memory("the model with its gradients and moments", world, SHRINK):
        trial = _Trial(config, data, world)
    size = largest_fitting(sizes, trial.judge(sizes), world)
    del trial
    world.unwrap()
    gc.collect()  # modules and hooks refer to each other
    torch.cuda.empty_cache()
    step = config.batch.tokens_per_step
    if not size:
        raise UserError(
            f"batch.tokens_per_micro_batch auto: not even {sizes[-1]:,} tokens, the smallest "
            f"divisor of batch.tokens_per_step {step:,} that can be, fit in the memory of every "
            f"rank; {SHRINK}"
        )
    feeds = f"feeds {world.size} {'rank' if world.size == 1 else 'ranks'}"
    why = f"{feeds}; it fits in memory"
    if size != sizes[0]:
        why = f"fits in memory and {feeds}; {sizes[sizes.index(size) - 1]:,} would be too large"
    return size, (
        f"batch.tokens_per_micro_batch auto: {size:,} (the largest divisor of {step:,} that {why})"
    )


def largest_fitting(sizes: Sequence[int], fits_here: Callable[[int], bool], world: World) -> int:
    """Give the first size that fits on all ranks, which ask for each together; 0 if none does."""
    return next((size for size in sizes if all(world.gather(fits_here(size)))), 0)


class _Trial:
    """A learner as training will have it, to try micro-batches on."""

    def __init__(self, config: Config, data: PreparedData, world: World) -> None:
        self.config, self.data, self.world = config, data, world
        self.learner = Learner(_uncompiled(config), data.vocabulary, world)
        self._make_moments(Batch.empty(LEAST_SLOTS, LEAST_SLOTS))

    def judge(self, sizes: Sequence[int]) -> Callable[[int], bool]:
        """Make the function that says whether a size fits on this rank."""
        if self.world.device.type == "cuda":
            memory = torch.cuda.get_device_properties(self.world.device).total_memory
            kept = int(GPU_SHARE_KEPT_FREE * memory)
            return lambda size: self.fits_beside(kept + self.other_bytes(size), size)
        free = min(self.world.gather(free_memory(self.world.local_size)))  # before any begins
        need = linear_need(self.count, sizes, free)
        return lambda size: CPU_FACTOR * need(size) + self.other_bytes(size) <= free

    def fits_beside(self, reserve: int, size: int) -> bool:
        """Try a size while so many bytes of the device are taken for what may come later."""

        def run(batch: Batch) -> None:
            held = torch.empty(reserve, dtype=torch.uint8, device=self.world.device)
            self.learner.try_out(batch)
            del held

        fitted = fits(run, self.batch(size))
        torch.cuda.empty_cache()
        return fitted

    def count(self, size: int) -> float:
        """Count the bytes that a micro-batch takes at its peak; infinitely many if it fails."""
        peak = float("inf")

        def run(batch: Batch) -> None:
            nonlocal peak
            peak = peak_bytes(lambda: self.learner.try_out(batch))

        fits(run, self.batch(size))
        return peak

    def other_bytes(self, size: int) -> int:
        """Give what a step holds beside the micro-batch that runs, and is not there yet.

        That is the sum of gradients so far; with a tree, one for each of its levels and two to
        exchange it. Rank 0 holds copies of weights and moments too, in the memory of the CPU, while
        a checkpoint is written.
        """
        parameters = sum(p.nbytes for p in self.learner.model.parameters())
        copies = 1
        if self.config.distributed.reduction == "tree":
            num_micro_batches = self.config.batch.tokens_per_step // size // self.world.size
            copies = num_micro_batches.bit_length() + 2
        if self.world.is_main and self.world.device.type == "cpu":
            copies += 3
        return copies * parameters

    def batch(self, size: int) -> Batch:
        """Make the heaviest micro-batch that the beginning of the text has for this size."""
        plan = build_plan(with_size(self.config, size), self.data)
        return collate(plan, self.data.train, heaviest(plan, plan.window(0, 0)))

    def _make_moments(self, empty: Batch) -> None:
        """Run a step without a token, after which Adam's moments and all buckets are there."""
        with self.learner.reduction.micro_batch(is_last=True):
            self.learner.backward(empty, 0.0)
        self.learner.reduction.finish()
        self.learner.update(1)


def linear_need(
    count: Callable[[int], float], sizes: Sequence[int], free: int
) -> Callable[[int], float]:
    """Count the bytes of two small sizes and draw a line through them.

    Args:
        count: gives the bytes that a size takes.
        sizes: those that may be asked for, the largest first.
        free: bytes; if the second size might take more, the line goes through 0 instead, which is
            never too low.
    """
    small = sizes[-1]
    larger = next(size for size in sizes if size <= COUNTED_RATIO * small)
    base = count(small)
    slope = base / small
    if larger > small and slope * larger <= free:
        slope = (count(larger) - base) / (larger - small)
    return lambda size: base if size == small else base + slope * (size - small)


def _uncompiled(config: Config) -> Config:
    """Leave compilation out: each size would be compiled anew, and none needs more memory by it."""
    kernels = config.kernels.model_copy(update={"compile": False})
    return config.model_copy(update={"kernels": kernels})
