"""Before the first step: one forward and backward of the heaviest micro-batch, thrown away.

A batch that does not fit in memory is found out at once, not hours later, and the message says
which size would fit.
"""

from collections.abc import Callable

import numpy as np
import torch

from dtrain.batch import Batch
from dtrain.data.loader import Store, collate
from dtrain.data.plan import BatchPlan, Cursor, Ids
from dtrain.data.settings import BatchSettings
from dtrain.distributed import World
from dtrain.errors import UserError


def rehearse(
    backward: Callable[[Batch], object],
    plan: BatchPlan,
    store: Store,
    start: Cursor,
    world: World,
    max_length: int,
) -> None:
    """Try on every rank whether the heaviest micro-batch to come fits in memory.

    Args:
        backward: runs forward and backward of a batch, without a word to other ranks.
        plan: of the training.
        store: its tokens.
        start: where training goes on; the heaviest of that window is tried.
        world: ranks that try at the same time.
        max_length: tokens of the longest sentence allowed, which a micro-batch must hold.

    Raises:
        UserError: on all ranks, if it does not fit on one of them.
    """
    ids = heaviest(plan, plan.window(start.epoch, start.window))
    if not any(world.gather(not _fits(backward, collate(plan, store, ids)))):
        return
    settings = plan.settings
    sizes = smaller_sizes(settings, world.size, max_length)
    fitting = (size for size in sizes if _fits(backward, _cut_down(plan, store, ids, size)))
    largest = min(world.gather(next(fitting, 0)))
    advice = (
        f"{largest} would fit: --batch.tokens_per_micro_batch={largest}"
        if largest
        else "no smaller size fits either; make the model smaller or use more memory"
    )
    raise UserError(
        f"a micro-batch of {settings.tokens_per_micro_batch} tokens does not fit in the memory of "
        f"{world.device}; {advice}"
    )


def heaviest(plan: BatchPlan, micro_batches: list[Ids]) -> Ids:
    """Choose the micro-batch whose attention has most cells; all else takes the same for all."""

    def cells(ids: Ids) -> int:
        source = int(plan.lengths.source_lengths(ids).max())
        target = int(plan.lengths.target_lengths(ids).max())
        return len(ids) * (source * source + target * target + source * target)

    return max(micro_batches, key=cells)


def smaller_sizes(settings: BatchSettings, num_ranks: int, max_length: int) -> list[int]:
    """List the smaller sizes of a micro-batch that a step could be made of, the largest first."""
    step = settings.tokens_per_step
    return [
        step // count
        for count in range(settings.micro_batches_per_step + 1, step // max_length + 1)
        if step % count == 0 and count >= num_ranks
    ]


def _cut_down(plan: BatchPlan, store: Store, ids: Ids, size: int) -> Batch:
    """Make a batch of a smaller number of slots from as many of the sentences as it holds."""
    source_slots = -(-plan.source_slots * size // plan.target_slots)
    source_slots = max(source_slots, int(plan.lengths.source_lengths(ids[:1]).max()))
    source_tokens = np.cumsum(plan.lengths.source_lengths(ids))
    target_tokens = np.cumsum(plan.lengths.target_lengths(ids))
    count = max(1, int(((source_tokens <= source_slots) & (target_tokens <= size)).sum()))
    return Batch.packed(*store.gather(ids[:count]), source_slots, size)


def _fits(backward: Callable[[Batch], object], batch: Batch) -> bool:
    try:
        backward(batch)
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        on_cpu = "allocate memory" in str(error) or "not enough memory" in str(error)
        if not (on_cpu or isinstance(error, MemoryError | torch.OutOfMemoryError)):
            raise
        return False
    return True
