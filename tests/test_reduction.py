"""Gradients of a step, reduced on real ranks, against sums taken by hand."""

import pytest
import torch
from torch import nn
from worlds import run_world

from dtrain.distributed import connect
from dtrain.reduction import REDUCTIONS


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


def reduce_on_rank(name: str, count: int) -> list[bytes]:
    """Two steps, so that what the first leaves behind would show in the second."""
    with connect("cpu", 60) as world:
        reduction = REDUCTIONS[name](world, module())
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
    for found in run_world(size, reduce_on_rank, "tree", 8):
        assert found == [expected, expected]


@pytest.mark.parametrize("size", [1, 3])
def test_ddp_gives_the_sum_on_every_rank(size):
    results = run_world(size, reduce_on_rank, "ddp", 6)
    assert len({found for result in results for found in result}) == 1
    values = torch.frombuffer(bytearray(results[0][0]), dtype=torch.float32).view(5, 7)
    expected = sum(value.double() for value in leaves(6))
    torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=1e-6)
