"""Gradients of a step, reduced on real ranks, against sums taken by hand."""

import pytest
import torch
from torch import nn
from worlds import run_world

from dtrain.config import DistributedSettings
from dtrain.distributed import connect
from dtrain.errors import UserError
from dtrain.reduction import build_reduction


def leaves(count: int) -> list[torch.Tensor]:
    """A gradient for each micro-batch, of magnitudes that make every order of adding differ."""
    generator = torch.Generator().manual_seed(3)
    scales = 10.0 ** torch.arange(count) / 1e4
    return [torch.randn(5, 7, generator=generator) * scale for scale in scales]


def module() -> nn.Module:
    """A linear layer whose gradient is its input: loss = sum(weight * input)."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(5, 7))
            self.never_used_alone = nn.Parameter(torch.zeros(3))

        def forward(self, values):
            return (self.weight * values).sum() + self.never_used_alone.sum()

    return Sum()


def reduce_on_rank(settings: DistributedSettings, count: int) -> list[bytes]:
    """Two steps, so that what the first leaves behind would show in the second."""
    with connect("cpu", 60) as world:
        reduction = build_reduction(world, module(), settings)
        share = count // world.size
        mine = leaves(count)[world.rank * share : (world.rank + 1) * share]
        found = []
        for _ in range(2):
            for number, values in enumerate(mine, start=1):
                with reduction.micro_batch(is_last=number == share):
                    (reduction.objective(values) * reduction.scale).backward()
            reduction.finish()
            weight = next(reduction.objective.parameters())
            found.append(weight.grad.numpy().tobytes())
            for parameter in reduction.objective.parameters():
                parameter.grad = None
        return found


def tree(values: list[torch.Tensor]) -> torch.Tensor:
    if len(values) == 1:
        return values[0]
    return tree(values[: len(values) // 2]) + tree(values[len(values) // 2 :])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_tree_adds_in_one_order_on_any_number_of_ranks(size):
    expected = tree(leaves(8)).numpy().tobytes()
    assert expected != sum(leaves(8)).numpy().tobytes(), "the order would not matter here"
    for found in run_world(size, reduce_on_rank, DistributedSettings(reduction="tree"), 8):
        assert found == [expected, expected]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("reduction", ["ddp", "flat"])
def test_others_give_the_sum_on_every_rank(reduction, size):
    results = run_world(size, reduce_on_rank, DistributedSettings(reduction=reduction), 6)
    assert len({found for result in results for found in result}) == 1
    values = torch.frombuffer(bytearray(results[0][0]), dtype=torch.float32).view(5, 7)
    expected = sum(value.double() for value in leaves(6))
    torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reduction", ["ddp", "flat"])
def test_bf16_rounds_what_is_sent_and_what_is_summed_and_nothing_else(reduction):
    mine, theirs = (sum(leaves(6)[start : start + 3]) for start in (0, 3))
    expected = (mine.bfloat16() + theirs.bfloat16()).float().numpy().tobytes()
    settings = DistributedSettings(reduction=reduction, gradient_dtype="bf16")
    assert run_world(2, reduce_on_rank, settings, 6) == [[expected, expected]] * 2


def test_bf16_leaves_all_ranks_with_the_same_bits_near_the_sum():
    results = run_world(3, reduce_on_rank, DistributedSettings(gradient_dtype="bf16"), 6)
    assert len({found for result in results for found in result}) == 1
    values = torch.frombuffer(bytearray(results[0][0]), dtype=torch.float32).view(5, 7)
    expected = sum(value.double() for value in leaves(6))
    torch.testing.assert_close(values.double(), expected, rtol=2**-6, atol=1e-3)
    assert not torch.equal(values.double(), expected.float().double())


def buckets_on_rank(bucket_mb: int | str) -> list[int]:
    """Bytes of the buckets that two megabytes of gradients are reduced in."""
    with connect("cpu", 60) as world:
        module = nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(8)])
        reduction = build_reduction(world, module, DistributedSettings(bucket_mb=bucket_mb))
        sizes = []

        def note(_, bucket):
            sizes.append(bucket.buffer().nbytes)
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        reduction.objective.register_comm_hook(None, note)
        for _ in range(2):  # the first one's buckets are laid out anew
            sizes.clear()
            reduction.objective(torch.ones(1, 256)).sum().backward()
        return sizes


@pytest.mark.parametrize(("bucket_mb", "expected"), [(1, [2**20] * 2), ("auto", [2**21])])
def test_buckets_are_as_large_as_asked_and_one_on_the_cpu(bucket_mb, expected):
    assert run_world(2, buckets_on_rank, bucket_mb) == [expected] * 2


@pytest.mark.parametrize(
    ("reduction", "key", "value"),
    [("tree", "gradient_dtype", "bf16"), ("tree", "bucket_mb", 10), ("flat", "bucket_mb", 10)],
)
def test_what_a_reduction_has_no_use_for_is_refused(toy, reduction, key, value):
    with pytest.raises(
        UserError, match=f"{key} {value} is not for distributed.reduction {reduction}"
    ):
        toy(distributed__reduction=reduction, **{f"distributed__{key}": value})
