import hashlib
import time
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.data import plan as plan_module
from dtrain.data.loader import MicroBatches
from dtrain.data.plan import (
    BatchPlan,
    Cursor,
    DistributedTokenSampler,
    keyed_order,
    mix64,
    source_slots,
)
from dtrain.data.settings import BatchSettings


class Sentences:
    """A token store in memory: sentence i is made of the token i + 10."""

    def __init__(self, size: int, seed: int = 0, longest: int = 20):
        random = np.random.default_rng(seed)
        self.source = random.integers(2, longest + 1, size)
        self.target = random.integers(2, longest + 1, size)

    def __len__(self):
        return len(self.source)

    def source_lengths(self, ids):
        return self.source[ids]

    def target_lengths(self, ids):
        return self.target[ids]

    def gather(self, ids):
        return tuple((np.repeat(ids + 10, n[ids]), n[ids]) for n in (self.source, self.target))


def make_plan(size=500, micro_batches=4, slots=100, seed=1, **more):
    batch = BatchSettings(tokens_per_step=slots * micro_batches, tokens_per_micro_batch=slots)
    return BatchPlan(Sentences(size), batch, slots, seed, **more)


@pytest.fixture
def small_windows(monkeypatch):
    """Several windows in a small corpus."""
    monkeypatch.setattr(plan_module, "BLOCK_PAIRS", 16)
    monkeypatch.setattr(plan_module, "WINDOW_BLOCKS", 8)


def ids_of_epoch(plan, epoch, num_replicas):
    ids = []
    for rank in range(num_replicas):
        sampler = DistributedTokenSampler(plan, num_replicas, rank)
        sampler.set_epoch(epoch)
        ids += [i for micro_batch in sampler for i in micro_batch]
    return ids


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("num_replicas", [1, 2, 3, 4, 6, 8, 64])
def test_every_sentence_once_an_epoch_on_any_world(num_replicas):
    plan = make_plan(1200, micro_batches=64, slots=24)
    assert plan.num_windows > 3
    stream = islice(plan.steps(Cursor()), 40)
    seen, counted = np.zeros(1200, np.int64), 0
    for step in stream:
        sampler_shares = [
            DistributedTokenSampler(plan, num_replicas, rank).share(step)
            for rank in range(num_replicas)
        ]
        assert len({len(share) for share in sampler_shares}) == 1
        together = [ids for share in sampler_shares for _, ids in share if len(ids)]
        for ours, planned in zip(together, step.micro_batches, strict=True):
            assert ours.tolist() == planned.tolist()
        for ids in step.micro_batches:
            np.add.at(seen, ids, 1)
            counted += len(ids)
    epochs = counted / 1200
    assert epochs > 2
    assert seen.min() >= int(epochs)
    assert seen.max() <= int(epochs) + 1


@pytest.mark.usefixtures("small_windows")
def test_an_epoch_is_the_steps_that_begin_in_it():
    plan = make_plan(700, micro_batches=5)
    together = [i for epoch in range(4) for i in ids_of_epoch(plan, epoch, 2)]
    straight, fresh = [], make_plan(700, micro_batches=5).steps(Cursor())
    while len(straight) < len(together):
        straight += np.concatenate(next(fresh).micro_batches).tolist()
    assert sorted(together) == sorted(straight)
    assert abs(len(together) - 4 * 700) < 5 * 100


def test_sampler_in_a_plain_dataloader():
    plan = make_plan(300, micro_batches=4)
    sampler = DistributedTokenSampler(plan, num_replicas=3, rank=2)
    loader = torch.utils.data.DataLoader(
        MicroBatches(plan, plan.lengths), sampler=sampler, batch_size=None, num_workers=0
    )
    batches = list(loader)
    assert len(batches) == len(sampler) > 0
    for batch, ids in zip(batches, sampler, strict=True):
        assert batch.num_tokens == plan.lengths.target[ids].sum()
        assert batch.target_out.shape == (100,)


def test_more_ranks_than_micro_batches_are_refused():
    with pytest.raises(ValueError, match="5 ranks cannot share the 4 micro-batches"):
        DistributedTokenSampler(make_plan(micro_batches=4), 5, 0)


@pytest.mark.usefixtures("small_windows")
def test_going_on_from_any_cursor_gives_the_same_stream():
    def key(step):
        return step.epoch, [ids.tolist() for ids in step.micro_batches], step.end

    straight = list(islice(make_plan(400, 3).steps(Cursor()), 60))
    assert straight[-1].epoch > 2
    for begin in range(len(straight) - 1):
        resumed = make_plan(400, 3).steps(straight[begin].end)
        assert key(next(resumed)) == key(straight[begin + 1])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 400), st.integers(1, 9), st.integers(0, 99))
def test_steps_are_never_short(size, micro_batches, seed):
    plan = make_plan(size, micro_batches, seed=seed)
    for step in islice(plan.steps(Cursor()), 10):
        assert len(step.micro_batches) == micro_batches
        ids = np.concatenate(step.micro_batches)
        assert step.num_target_tokens == plan.lengths.target[ids].sum()
        assert step.num_source_tokens == plan.lengths.source[ids].sum()


def test_weight_k_makes_k_visits():
    plan = make_plan(300, corpora=[(200, 1), (100, 3)])
    seen = np.zeros(300, np.int64)
    for i in range(plan.num_windows):
        for ids in plan.window(0, i):
            np.add.at(seen, ids, 1)
    assert set(seen[:200]) == {1}
    assert set(seen[200:]) == {3}


def test_other_seed_other_order_same_seed_same_order():
    first = [ids.tolist() for ids in make_plan(seed=1).window(0, 0)]
    assert first == [ids.tolist() for ids in make_plan(seed=1).window(0, 0)]
    assert first != [ids.tolist() for ids in make_plan(seed=2).window(0, 0)]
    assert first != [ids.tolist() for ids in make_plan(seed=1).window(1, 0)]


def test_the_plan_is_the_same_on_every_version_of_numpy():
    """Golden: a change of this hash breaks the resume of every run there is."""
    plan = BatchPlan(
        FixedLengths(2000), BatchSettings(tokens_per_step=512, tokens_per_micro_batch=128), 128, 7
    )
    text = str(
        [[ids.tolist() for ids in s.micro_batches] for s in islice(plan.steps(Cursor()), 80)]
    )
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "b71aee9cb666d6e8dde0aee7a4df096aec67f6563701bad32f019056f08bc0b3"
    )


class FixedLengths:
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def source_lengths(self, ids):
        return 2 + ids * 7919 % 23

    def target_lengths(self, ids):
        return 2 + ids * 104729 % 29


def test_a_far_cursor_costs_one_window():
    plan = make_plan(60_000, micro_batches=8, slots=512)
    started = time.perf_counter()
    next(plan.steps(Cursor(epoch=10**6, window=1, offset=5)))
    assert time.perf_counter() - started < 5  # about 0.3 s; a replay would take days


def test_mix64_is_splitmix():
    """First outputs of SplitMix64 from state 0, as published with the generator."""
    states = np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [int(mix64(s)[0]) for s in states] == expected


def test_keyed_order_is_a_uniform_permutation():
    orders = np.array([keyed_order(5, key) for key in range(6000)])
    assert (np.sort(orders) == np.arange(5)).all()
    counts = np.bincount(orders @ 5 ** np.arange(5), minlength=1)
    counts = counts[counts > 0]
    assert len(counts) == 120
    assert counts.min() > 20
    assert counts.max() < 90


def test_source_slots_follow_the_ratio_and_hold_the_longest_sentence():
    settings = BatchSettings(tokens_per_step=4096, tokens_per_micro_batch=4096)
    assert source_slots(settings, 0.966, 128) == 3960
    small = BatchSettings(tokens_per_step=128, tokens_per_micro_batch=128)
    assert source_slots(small, 0.5, 128) == 128
