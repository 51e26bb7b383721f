"""Before the first step: one forward and backward of the heaviest micro-batch, thrown away.

A batch that does not fit in memory is found out at once, not hours later, and the message says
which size would fit.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from dtrain.batch import Batch
from dtrain.config import Config
from dtrain.data.loader import Store, collate
from dtrain.data.plan import BatchPlan, Cursor, Ids
from dtrain.data.settings import LEAST_SLOTS
from dtrain.distributed import World
from dtrain.errors import UserError

SHRINK = "make the model smaller or use more memory"

# Of torch on a CPU, of CUDA, Triton and NCCL, and of cuBLAS and cuDNN.
_WORDS = "allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED"


def rehearse(
    backward: Callable[[Batch], object],
    plan: BatchPlan,
    store: Store,
    start: Cursor,
    world: World,
    sizes: Sequence[int],
) -> None:
    """Try on every rank whether the heaviest micro-batch to come fits in memory.

    Args:
        backward: runs forward and backward of a batch, without a word to other ranks.
        plan: of the training.
        store: its tokens.
        start: where training goes on; the heaviest of that window is tried.
        world: ranks that try at the same time.
        sizes: that a micro-batch might have, in slots, the largest first.

    Raises:
        UserError: on all ranks, if it does not fit on one of them.
    """
    ids = heaviest(plan, plan.window(start.epoch, start.window))
    if not any(world.gather(not fits(backward, collate(plan, store, ids)))):
        return
    smaller = [size for size in sizes if size < plan.target_slots]
    fitting = (size for size in smaller if fits(backward, _cut_down(plan, store, ids, size)))
    largest = min(world.gather(next(fitting, 0)))
    advice = (
        f"{largest} would fit: --batch.tokens_per_micro_batch={largest}"
        if largest
        else f"no smaller size fits either; {SHRINK}"
    )
    raise UserError(
        f"a micro-batch of {plan.target_slots} tokens does not fit in the memory of "
        f"{world.device}; {advice}"
    )


def possible_sizes(config: Config, num_ranks: int) -> list[int]:
    """List the micro-batches that a step can be made of, in slots, the largest first.

    Each divides the step, holds the longest sentence allowed, and leaves none of the ranks without
    work; a tree needs a power of two of them.
    """
    step = config.batch.tokens_per_step
    most = step // max(config.data.max_length, LEAST_SLOTS)
    return [
        step // count
        for count in range(num_ranks, most + 1)
        if step % count == 0
        and (config.distributed.reduction != "tree" or count & (count - 1) == 0)
    ]


def heaviest(plan: BatchPlan, micro_batches: list[Ids]) -> Ids:
    """Choose the micro-batch whose attention has most cells; all else takes the same for all."""

    def cells(ids: Ids) -> int:
        source = int(plan.lengths.source_lengths(ids).max())
        target = int(plan.lengths.target_lengths(ids).max())
        return len(ids) * (source * source + target * target + source * target)

    return max(micro_batches, key=cells)


def _cut_down(plan: BatchPlan, store: Store, ids: Ids, size: int) -> Batch:
    """Make a batch of a smaller number of slots from as many of the sentences as it holds."""
    source_slots = -(-plan.source_slots * size // plan.target_slots)
    source_slots = max(source_slots, int(plan.lengths.source_lengths(ids[:1]).max()))
    source_tokens = np.cumsum(plan.lengths.source_lengths(ids))
    target_tokens = np.cumsum(plan.lengths.target_lengths(ids))
    count = max(1, int(((source_tokens <= source_slots) & (target_tokens <= size)).sum()))
    source, target = store.gather(ids[:count])
    form = plan.kernel, plan.max_length, plan.num_rectangles
    return Batch.packed(source, target, source_slots, size, *form)


def fits(backward: Callable[[Batch], object], batch: Batch) -> bool:
    """Say whether a batch runs through without running out of memory."""
    try:
        backward(batch)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return False
    return True


@contextmanager
def enough_memory(what: str, world: World, advice: str) -> Iterator[None]:
    """Do something that may not fit in memory.

    Args:
        what: needs it.
        world: of this rank, whose device it is.
        advice: what the user can do.

    Raises:
        UserError: on this rank alone, if memory runs out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        why = f"{what} does not fit in the memory of {world.device}; {advice}"
        raise UserError(why) from error


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Look at an error and at those during which it came: a CUDA graph's recording adds its own."""
    if error is None:
        return False
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(word in str(error) for word in _WORDS) or _is_out_of_memory(error.__context__)
