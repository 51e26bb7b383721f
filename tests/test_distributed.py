"""Ranks that are real processes; the world under test is always theirs."""

import os
import time
from contextlib import suppress

import pytest
import torch
from torch import nn
from worlds import run_world

from dtrain.distributed import alone, connect
from dtrain.errors import UserError


def in_world(size, task, *arguments, timeout=60):
    """Run `task(world, *arguments)` on each of `size` ranks."""

    def be_rank():
        with connect("cpu", timeout) as world:
            return task(world, *arguments)

    return run_world(size, be_rank)


# ------------------------------------------------------------------ collectives


def facts_and_sums(world):
    values = torch.tensor([1.0, 10.0 * world.rank], dtype=torch.float64)
    return {
        "rank": (world.rank, world.size, world.local_size, world.num_nodes, world.is_main),
        "sum": world.sum(values).tolist(),
        "gather": world.gather({"from": world.rank}),
        "agree": [
            world.agree(7, world.rank == 1, False, world.rank < 2),
            world.agree(8, False, True, False),
        ],
    }


@pytest.mark.parametrize("size", [1, 3])
def test_what_ranks_tell_each_other(size):
    for rank, found in enumerate(in_world(size, facts_and_sums)):
        assert found["rank"] == (rank, size, size, 1, rank == 0)
        assert found["sum"] == [size, 10.0 * sum(range(size))]
        assert found["gather"] == [{"from": r} for r in range(size)]
        assert found["agree"] == [(size > 1, False, True), (False, True, False)]


def agree_out_of_step(world):
    with pytest.raises(RuntimeError) as caught:
        world.agree(5 + (world.rank == 1), True)
    return str(caught.value)


def test_ranks_that_lost_step_notice_on_all_of_them():
    assert set(in_world(3, agree_out_of_step)) == {"ranks lost step: one is at 6, another at 5"}


def disagree(world):
    world.check_same("hats", 5)
    with pytest.raises(RuntimeError) as caught:
        world.check_same("weights", 2**61 + (world.rank == 1))
    return str(caught.value)


def test_a_rank_that_differs_is_named_on_all_of_them():
    for message in in_world(3, disagree):
        assert "weights of rank 1 differ" in message


def meet_late(world):
    waited = []
    for late in (1, 0):
        time.sleep(1.0 if world.rank == late else 0)
        begun = time.monotonic()
        world.meet()
        waited.append(time.monotonic() - begun > 0.5)
    return waited


@pytest.mark.slow
def test_a_meeting_waits_longer_than_collectives_do():
    # Seconds of a collective's time-out cannot be fewer than one.
    assert in_world(2, meet_late, timeout=1) == [[True, False], [False, True]]


def late_for_a_collective(world):
    world.set_timeout(2)
    if world.rank == 1:
        time.sleep(6)
        return 0.0
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=r"[Tt]imed? ?out"):
        world.sum(torch.zeros(1))
    return time.monotonic() - begun


@pytest.mark.slow
def test_the_time_out_can_be_shortened_on_the_way():
    def be_rank():
        with suppress(RuntimeError), connect("cpu", 60) as world:
            return late_for_a_collective(world)

    assert 1 < run_world(2, be_rank)[0] < 5


def call_off(world):
    if world.rank == 1:
        world.call_off("lunch")
    world.meet()
    return world.is_called_off("lunch"), world.is_called_off("dinner")


def test_what_a_rank_calls_off_is_off_for_all():
    assert in_world(2, call_off) == [(True, False)] * 2


def test_a_world_of_one_needs_no_environment():
    def be_alone():
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
            del os.environ[name]
        with connect("auto", 60) as world:
            module = nn.Linear(2, 2)
            assert world.wrap(module) is module
            with world.accumulating(module):
                pass
            return (world.size, world.is_main, world.from_main(lambda: 5), world.gather(6))

    assert run_world(1, be_alone) == [(1, True, 5, [6])]


# ------------------------------------------------------------------ rank 0 works for all


def two_tasks(world):
    counter = []
    first = world.from_main(lambda: counter.append(1) or {"rank": world.rank})
    second = world.from_main(lambda: counter.append(1) or "again")
    return first, second, len(counter)


def test_only_rank_0_runs_a_task_and_all_get_its_value():
    values = ({"rank": 0}, "again")
    assert in_world(3, two_tasks) == [(*values, 2), (*values, 0), (*values, 0)]


def mistaken_task(world):
    def task():
        raise UserError("no such file")

    with pytest.raises(UserError, match="no such file"):
        world.from_main(task)
    return world.from_main(lambda: "all is well after it")


def test_a_mistake_found_by_rank_0_is_raised_on_every_rank():
    assert in_world(3, mistaken_task) == ["all is well after it"] * 3


# ------------------------------------------------------------------ gradients


def local_gradient(module, rows):
    """What this rank's data alone would give."""
    module.zero_grad()
    module(rows).pow(2).sum().backward()
    return torch.cat([p.grad.flatten() for p in module.parameters()])


def accumulate(world):
    torch.manual_seed(world.rank)  # rank 0's weights must win
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    wrapped = world.wrap(module)
    first, second = torch.randn(2, 5, 3, dtype=torch.float64)
    mine = [local_gradient(module, rows).clone() for rows in (first, second)]
    module.zero_grad()
    seen = []
    with world.accumulating(wrapped):
        wrapped(first).pow(2).sum().backward()
        seen.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    wrapped(second).pow(2).sum().backward()
    seen.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    weights = torch.cat([p.detach().flatten() for p in module.parameters()])
    return [t.numpy() for t in (*mine, *seen, weights)]


@pytest.mark.parametrize("size", [2, 3])
def test_accumulated_gradients_are_averaged_once_at_the_last_backward(size):
    ranks = in_world(size, accumulate)
    whole = sum(first + second for first, second, *_ in ranks) / size
    for first, _, after_first, after_last, weights in ranks:
        assert abs(after_first - first).max() == 0, "reduced while accumulating"
        assert abs(after_last - whole).max() < 1e-12
        assert (weights == ranks[0][4]).all()
    assert abs(ranks[0][0] - ranks[1][0]).max() > 1e-3, "equal data would prove nothing"


# ------------------------------------------------------------------ devices


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_cuda_without_a_gpu_is_a_mistake():
    with pytest.raises(UserError, match="finds no GPU here; use --run"):
        alone("cuda")
    with pytest.raises(UserError, match="finds no GPU"), connect("cuda", 60):
        pass


@pytest.mark.usefixtures("no_gpu")
def test_auto_is_the_cpu_where_there_is_no_gpu():
    world = alone("auto")
    assert world.device == torch.device("cpu")
    assert (world.size, world.num_nodes, world.is_main) == (1, 1, True)


def test_each_local_rank_has_a_gpu_of_its_own_or_is_one_too_many(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert alone("auto").device == alone("cuda").device == torch.device("cuda", 1)
    assert alone("cpu").device == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="local rank 2 has no GPU: this machine has 2"):
        alone("cuda")
