"""A micro-batch that does not fit in memory is found out before training."""

import resource
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from worlds import run_world

from dtrain import train
from dtrain.config import load_config
from dtrain.errors import UserError
from dtrain.rehearsal import heaviest, possible_sizes


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
