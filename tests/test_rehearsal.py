"""A micro-batch that does not fit in memory is found out before training."""

import resource
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from worlds import run_world

from dtrain import train
from dtrain.batch import Batch
from dtrain.config import load_config
from dtrain.distributed import alone
from dtrain.errors import UserError
from dtrain.rehearsal import enough_memory, fits, heaviest, possible_sizes


def test_the_heaviest_micro_batch_has_the_largest_rectangles():
    lengths = SimpleNamespace(
        source_lengths=lambda ids: np.array([3, 3, 3, 9, 1])[ids],
        target_lengths=lambda ids: np.array([3, 3, 3, 1, 1])[ids],
    )
    plan = SimpleNamespace(lengths=lengths)
    even, uneven, single = np.array([0, 1, 2]), np.array([3, 4]), np.array([3])
    # Cells of source, target and source x target: 3 x 27 = 81; 2 x (81 + 1 + 9) = 182; 91.
    assert heaviest(plan, [even, single, uneven]) is uneven


@pytest.mark.parametrize(
    ("reduction", "step", "ranks", "max_length", "sizes"),
    [
        ("ddp", 25088, 16, 256, [1568, 896, 784, 512, 448, 392, 256]),
        ("ddp", 512, 2, 40, [256, 128, 64]),
        ("ddp", 512, 9, 64, []),
        ("ddp", 36, 1, 2, [36, 18, 12, 9]),
        ("tree", 25088, 1, 256, [25088, 12544, 6272, 3136, 1568, 784, 392]),
        ("tree", 25088, 8, 256, [3136, 1568, 784, 392]),
    ],
)
def test_sizes_divide_the_step_hold_every_sentence_and_feed_every_rank(
    reduction, step, ranks, max_length, sizes
):
    counts = [1, 2, 4, 8, 16, 32, 64] if reduction == "tree" else range(1, step + 1)
    brute = [
        size
        for size in range(step, max(max_length, 8) - 1, -1)
        if step % size == 0 and step // size >= ranks and step // size in counts
    ]
    settings = {
        "batch.tokens_per_step": step,
        "batch.tokens_per_micro_batch": "auto",
        "data.max_length": max_length,
        "distributed.reduction": reduction,
        "validation.every_steps": 0,
    }
    config = load_config(None, [f"--{key}={value}" for key, value in settings.items()])
    assert possible_sizes(config, ranks) == brute == sizes


class Recorded:
    """Ends as a CUDA graph's recording does: with an error of its own after another."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize("surroundings", [nullcontext(), Recorded()])
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_that_memory_is_not_enough_is_said_in_many_words(surroundings, error):
    def run(_batch: Batch) -> None:
        with surroundings:
            raise error

    assert not fits(run, Batch.empty(8, 8))
    with (
        pytest.raises(UserError, match=r"^a cake does not fit in the memory of cpu; eat less$"),
        enough_memory("a cake", alone("cpu"), "eat less"),
    ):
        run(Batch.empty(8, 8))


def test_another_error_is_not_taken_for_it():
    def run(_batch: Batch) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        fits(run, Batch.empty(8, 8))
    with pytest.raises(RuntimeError, match="illegal"), enough_memory("", alone("cpu"), ""):
        run(Batch.empty(8, 8))


def refused(config, room: int) -> str:
    """Train with no more address space than there is now, and `room` bytes."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
    used = int(pages) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
    with pytest.raises(UserError) as caught:
        train.run(config)
    return str(caught.value)


@pytest.mark.slow
def test_too_large_a_micro_batch_is_refused_with_one_that_fits(toy):
    size = 2**19
    config = toy("run", batch__tokens_per_step=size, batch__tokens_per_micro_batch=size)
    (message,) = run_world(1, refused, config, 500 * 2**20)
    assert f"micro-batch of {size} tokens does not fit in the memory of cpu" in message
    suggested = int(message.rsplit("=", 1)[1])
    assert 2**12 <= suggested < size
    assert size % suggested == 0
