"""Ranks that wait for rank 0, which takes its time or is dead."""

import time
from contextlib import nullcontext

import pytest
from torch.distributed import HashStore
from worlds import run_world

from dtrain import distributed, waiting
from dtrain.distributed import connect


def in_world(size, timeout, task):
    """Run `task(world)` on each of `size` ranks, whose collectives wait so many seconds."""

    def be_rank():
        with connect("cpu", timeout) as world:
            return task(world)

    return run_world(size, be_rank)


def slow_task(world):
    waiting.HEARTBEAT_SECONDS, waiting.HEARTBEATS_MISSED = 0.2, 10
    begun = time.monotonic()
    value = world.from_main(lambda: time.sleep(4.5) or "ready")
    return value, time.monotonic() - begun > 4


@pytest.mark.slow
def test_the_others_wait_longer_than_any_timeout_while_rank_0_lives():
    """4.5 s: over the 3 s of the process group, and over the 2 s without a heartbeat."""
    assert in_world(3, 3, slow_task) == [("ready", True)] * 3


def wait_for_a_dead_heart(world):
    waiting.HEARTBEAT_SECONDS, waiting.HEARTBEATS_MISSED = 0.25, 4
    distributed.beating = lambda _store: nullcontext()
    if world.is_main:
        world.store.wait(["given up"])  # alive, but not at work
        return ""
    begun = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        world.from_main(lambda: None)
    assert time.monotonic() - begun < 20
    world.store.set("given up", "")
    return str(caught.value)


@pytest.mark.slow
def test_the_others_give_up_on_a_dead_heart():
    _, message = in_world(2, 60, wait_for_a_dead_heart)
    assert message.startswith("rank 1: rank 0 gave no sign of life for 1 s")


def test_the_heart_beats_as_long_as_the_task_takes(monkeypatch):
    """A failing task takes it with it, else the others would wait for a rank on its way out."""
    monkeypatch.setattr(waiting, "HEARTBEAT_SECONDS", 0.02)
    store = HashStore()

    def beats() -> int:
        return store.add("heartbeat", 0)

    def task() -> None:
        with waiting.beating(store):
            time.sleep(0.3)
            assert beats() > 2
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        task()
    at_its_end = beats()
    time.sleep(0.1)
    assert beats() == at_its_end
