import signal
import threading
import time
from itertools import islice

import numpy as np
import pytest
import torch

from dtrain.batch import Batch
from dtrain.data.loader import STEPS_AHEAD, Loader, collate
from dtrain.data.plan import BatchPlan, Cursor, DistributedTokenSampler
from dtrain.data.settings import BatchSettings

SLOTS = 32


class Sentences:
    """A token store in memory that says what is asked of it, and fails on demand.

    Sentence i has 2 + i % 5 source and 2 + i % 7 target tokens, all of them i + 4.
    """

    def __init__(self, fail_at: int | None = None) -> None:
        self.gathered, self.fail_at = 0, fail_at

    def __len__(self):
        return 200

    def source_lengths(self, ids):
        return 2 + ids % 5

    def target_lengths(self, ids):
        return 2 + ids % 7

    def gather(self, ids):
        self.gathered += 1
        if self.gathered == self.fail_at:
            raise OSError("the disk is gone")
        lengths = self.source_lengths(ids), self.target_lengths(ids)
        return tuple((np.repeat(ids + 4, n), n) for n in lengths)


@pytest.fixture(autouse=True)
def alarm():
    """Turn waiting for ever, what a broken loader would do, into a failure."""

    def ring(*_):
        raise TimeoutError("the loader hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def make_sampler(num_replicas=1, rank=0, micro_batches=3) -> DistributedTokenSampler:
    settings = BatchSettings(tokens_per_step=SLOTS * micro_batches, tokens_per_micro_batch=SLOTS)
    plan = BatchPlan(Sentences(), settings, source_slots=SLOTS, seed=1)
    return DistributedTokenSampler(plan, num_replicas, rank)


def make_loader(store, start=Cursor(), pin_memory=False, **sampler) -> Loader:  # noqa: B008
    return Loader(make_sampler(**sampler), store, start, pin_memory)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


@pytest.mark.parametrize(("num_replicas", "rank"), [(1, 0), (2, 1), (3, 2)])
def test_its_steps_are_those_of_the_plan_from_the_cursor_on(num_replicas, rank):
    planned = list(islice(make_sampler().plan.steps(Cursor()), 40))
    assert planned[-1].epoch > 0
    share = -(-3 // num_replicas)
    mine = range(rank * 3 // num_replicas, (rank + 1) * 3 // num_replicas)
    replicas = {"num_replicas": num_replicas, "rank": rank}
    with make_loader(Sentences(), planned[4].end, **replicas) as loader:
        for step, expected in zip(loader, planned[5:], strict=False):
            assert step.plan.end == expected.end
            assert len(step.micro_batches) == share
            for place, (index, batch) in enumerate(step.micro_batches):
                if place >= len(mine):
                    assert index == 3
                    assert batch.num_tokens == 0
                    continue
                assert index == mine[place]
                words = []
                for i in expected.micro_batches[index].tolist():
                    words += [i + 4] * (2 + i % 7)
                assert batch.target_out[: len(words)].tolist() == words
                assert batch.num_tokens == len(words)


def test_it_works_ahead_and_not_too_far():
    store = Sentences()
    with make_loader(store) as loader:
        ahead = 3 * (STEPS_AHEAD + 1)  # what waits in the queue, and one in the thread's hands
        wait_until(lambda: store.gathered == ahead)
        time.sleep(0.05)
        assert store.gathered == ahead
        next(iter(loader))
        wait_until(lambda: store.gathered == ahead + 3)


def test_an_exception_of_the_thread_is_raised_in_the_loop():
    with make_loader(Sentences(fail_at=8)) as loader:
        steps = iter(loader)
        assert next(steps).plan.end != next(steps).plan.end
        with pytest.raises(OSError, match="disk is gone"):
            next(steps)


@pytest.mark.parametrize("fail_at", [None, 7])
def test_closing_with_a_full_queue_ends_quickly(fail_at):
    """Also when the thread has an exception to hand over that nobody will take."""
    store = Sentences(fail_at)
    with make_loader(store):
        wait_until(lambda: store.gathered >= 7)
        begun = time.monotonic()
    assert time.monotonic() - begun < 1
    assert "loader" not in [thread.name for thread in threading.enumerate()]


def test_an_exception_of_the_loop_ends_the_thread():
    def loop():
        with make_loader(Sentences()) as loader:
            for _ in loader:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()
    assert "loader" not in [thread.name for thread in threading.enumerate()]


def test_batches_are_pinned_if_asked(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t) or t)
    with make_loader(Sentences(), pin_memory=True) as loader:
        _, batch = next(iter(loader)).micro_batches[0]
    assert any(tensor is batch.source for tensor in pinned)
    assert any(tensor is batch.target_layout.slot_of_cell for tensor in pinned)


def test_no_sentences_make_the_empty_batch():
    plan = make_sampler().plan
    batch, empty = collate(plan, Sentences(), np.empty(0, np.int64)), Batch.empty(SLOTS, SLOTS)
    assert batch.num_tokens == 0
    assert torch.equal(batch.source, empty.source)
    assert torch.equal(batch.target_out, empty.target_out)
