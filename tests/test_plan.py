import hashlib
import importlib
import os
import subprocess
import sys
import time
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.data import plan as plan_module
from dtrain.data.loader import MicroBatches
from dtrain.data.packing import pack
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


def shares(plan, step, num_replicas):
    """What each rank runs of a step: (index in the step, ids), as each of them works it out."""
    return [
        DistributedTokenSampler(plan, num_replicas, rank).share(step)
        for rank in range(num_replicas)
    ]


@pytest.fixture(scope="module")
def long_steps():
    """A plan of several small windows, and steps of some epochs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "BLOCK_PAIRS", 16)
        patch.setattr(plan_module, "WINDOW_BLOCKS", 8)
        plan = make_plan(600, micro_batches=64, slots=24)
        assert plan.num_windows > 3
        return plan, list(islice(plan.steps(Cursor()), 22))


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 4, 6, 8, 64])
def test_every_sentence_once_an_epoch_on_any_world(num_replicas, long_steps):
    """The ranks' micro-batches, put together and cut where an epoch's windows end."""
    plan, steps = long_steps
    stream = [
        ids
        for step in steps
        for share in shares(plan, step, num_replicas)
        for _, ids in share
        if len(ids)
    ]
    num_epochs = 0
    while len(stream) >= (size := micro_batches_of_epoch(plan, num_epochs)):
        epoch, stream = np.concatenate(stream[:size]), stream[size:]
        assert sorted(epoch.tolist()) == list(range(600))
        num_epochs += 1
    assert num_epochs > 2
    rest = np.concatenate(stream).tolist()
    assert len(rest) == len(set(rest))


@cache
def micro_batches_of_epoch(plan, epoch):
    return sum(len(plan.window(epoch, index)) for index in range(plan.num_windows))


WORLDS = st.integers(1, 8).flatmap(lambda count: st.tuples(st.just(count), st.integers(1, count)))
"""A number of micro-batches in a step, and one of ranks that can share them."""


@settings(max_examples=15, deadline=None)
@given(WORLDS, st.integers(1, 120), st.integers(0, 2**40))
def test_a_step_has_the_same_micro_batches_on_every_world(world, size, seed):
    """Each rank plans by itself, as it does in a training."""
    count, num_replicas = world
    canonical = make_plan(size, count, seed=seed).steps(Cursor())
    ranks = [make_plan(size, count, seed=seed) for _ in range(num_replicas)]
    samplers = [DistributedTokenSampler(p, num_replicas, r) for r, p in enumerate(ranks)]
    streams = zip(canonical, *(p.steps(Cursor()) for p in ranks), strict=True)
    for wanted, *planned in islice(streams, 4):
        together = [
            (index, ids.tolist())
            for sampler, step in zip(samplers, planned, strict=True)
            for index, ids in sampler.share(step)
            if len(ids)
        ]
        assert together == [(i, ids.tolist()) for i, ids in enumerate(wanted.micro_batches)]
        assert {step.num_target_tokens for step in planned} == {wanted.num_target_tokens}
        assert {step.end for step in planned} == {wanted.end}


@settings(max_examples=25, deadline=None)
@given(WORLDS, st.integers(1, 300), st.integers(20, 150), st.integers(0, 99))
def test_ranks_have_equally_many_micro_batches_within_the_token_budget(world, size, slots, seed):
    count, num_replicas = world
    batch = BatchSettings(tokens_per_step=slots * count, tokens_per_micro_batch=slots)
    plan = BatchPlan(Sentences(size), batch, slots + 8, seed)
    for step in islice(plan.steps(Cursor()), 6):
        assert len(step.micro_batches) == count
        for share in shares(plan, step, num_replicas):
            assert len(share) == -(-count // num_replicas)
            for index, ids in share:
                assert plan.lengths.target_lengths(ids).sum() <= plan.target_slots == slots
                assert plan.lengths.source_lengths(ids).sum() <= plan.source_slots == slots + 8
                assert (index < count) == (len(ids) > 0)


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


class TestGoingOn:
    """From the cursor after any step, in a new process, on any world: the same sentences."""

    STEPS = 24

    @pytest.fixture(autouse=True)
    def two_windows(self, monkeypatch):
        monkeypatch.setattr(plan_module, "BLOCK_PAIRS", 8)
        monkeypatch.setattr(plan_module, "WINDOW_BLOCKS", 8)

    def run(self, begin: Cursor, num_steps: int, *worlds: int):
        """What a training that begins here runs, if its ranks are so many or so many.

        Gives the cursor behind each step, and for each world the ids of each step.
        """
        plan = make_plan(120, 3)  # each start plans anew
        steps = list(islice(plan.steps(begin), num_steps))
        ids = [
            [
                [
                    ids.tolist()
                    for share in shares(plan, step, world)
                    for _, ids in share
                    if len(ids)
                ]
                for step in steps
            ]
            for world in worlds
        ]
        return [step.end for step in steps], *ids

    @pytest.fixture
    def straight(self):
        """The same without a stop, on one rank."""
        plan = make_plan(120, 3)
        assert plan.num_windows == 2
        epochs = [step.epoch for step in islice(plan.steps(Cursor()), self.STEPS)]
        assert max(epochs) > 3
        assert min(np.bincount(epochs)[:-1]) >= 4, "no room for two stops in an epoch"
        ends, ids = self.run(Cursor(), self.STEPS, 1)
        assert any(end.offset for end in ends), "no step ends within a window"
        assert any(end.epoch > epoch for end, epoch in zip(ends, epochs, strict=True))
        return ends, ids

    def test_after_any_step_on_any_world(self, straight):
        """Also after the first and after the last step of each epoch."""
        ends, ids = straight
        for done in range(1, self.STEPS):
            our_ends, *our_ids = self.run(ends[done - 1], self.STEPS - done, 1, 2, 3)
            assert our_ends == ends[done:]
            assert our_ids == [ids[done:]] * 3

    def test_after_any_two_steps_on_other_worlds(self, straight):
        """Twice in an epoch, or in one and the next, each time with another number of ranks."""
        ends, ids = straight
        for first in range(1, 9):
            for second in range(first + 1, first + 5):
                together = self.run(Cursor(), first, 2)[1]
                together += self.run(ends[first - 1], second - first, 3)[1]
                together += self.run(ends[second - 1], 13 - second, 1)[1]
                assert together == ids[:13]


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


GOLDEN = {
    "small": "a5f2ab99175ac53cc70cea20a3878a7357fb4c57516ddbfe17ab494adb751601",
    "windows": "7b1275f70b591ea789fd5b71afbfd8be8e726dcb2cd5312267a52b6ad74e5a12",
}
"""A change of these breaks the resume of every run there is."""


def golden_hash(name):
    """SHA-256 of the first steps of a plan over lengths that no generator of numpy makes."""
    if name == "small":
        batch = BatchSettings(tokens_per_step=512, tokens_per_micro_batch=128)
        plan, num_steps = BatchPlan(FixedLengths(2000), batch, 128, 7), 80
    else:  # three windows, two corpora, one of them twice, another number of slots a side
        batch = BatchSettings(tokens_per_step=65536, tokens_per_micro_batch=4096)
        corpora = [(50_000, 1), (20_001, 2)]
        plan = BatchPlan(FixedLengths(70_001), batch, 3312, 2**33 + 5, corpora)
        num_steps = 24
    steps = islice(plan.steps(Cursor()), num_steps)
    text = str([[ids.tolist() for ids in step.micro_batches] for step in steps])
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("name", GOLDEN)
def test_the_plan_is_the_same_on_every_version_of_numpy(name):
    assert golden_hash(name) == GOLDEN[name]


@pytest.mark.slow
def test_the_plan_is_the_same_on_every_processor():
    """Numpy chooses its inner loops by what the processor can do; here it may use the plainest."""
    features = numpy_features()
    program = "import test_plan; print(*map(test_plan.golden_hash, test_plan.GOLDEN))"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=os.environ | {"NPY_DISABLE_CPU_FEATURES": " ".join(features)},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == list(GOLDEN.values())


def numpy_features():
    """What numpy has faster loops for that this processor can run."""
    core = importlib.import_module("numpy._core._multiarray_umath")
    return [name for name in core.__cpu_dispatch__ if core.__cpu_features__[name]]


class FixedLengths:
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def source_lengths(self, ids):
        return 2 + ids * 7919 % 23

    def target_lengths(self, ids):
        return 2 + ids * 104729 % 29


@pytest.fixture
def packed(monkeypatch):
    """Notes the number of sentences of each window that is packed."""
    sizes = []

    def pack_and_note(source, *rest):
        sizes.append(len(source))
        return pack(source, *rest)

    monkeypatch.setattr(plan_module.packing, "pack", pack_and_note)
    return sizes


def test_going_on_packs_one_window_and_replays_nothing(packed):
    """Where a millionth step could be: 30,000 epochs have gone by."""
    plan = make_plan(60_000, micro_batches=8, slots=512)
    assert plan.num_windows == 2
    started = time.process_time()
    next(plan.steps(Cursor(epoch=30_000, window=1, offset=5)))
    assert len(packed) == 1
    assert packed[0] < 31_000
    assert time.process_time() - started < 5  # about 0.3 s; a replay would take hours


@pytest.mark.usefixtures("small_windows")
def test_going_on_packs_two_windows_where_a_step_lies_across_them(packed):
    straight = list(islice(make_plan(400, 3).steps(Cursor()), 60))
    assert len(straight) > len(set(packed)) > 0
    costs = set()
    for step in straight[:-1]:
        packed.clear()
        next(make_plan(400, 3).steps(step.end))
        costs.add(len(packed))
    assert costs == {1, 2}


def test_the_millionth_step_is_where_counting_puts_it(packed):
    """A corpus of one micro-batch an epoch, so that step s of one micro-batch is epoch s - 1."""
    plan = make_plan(4, micro_batches=1)
    begin = Cursor(epoch=10**6 - 1)
    step = next(plan.steps(begin))
    assert sorted(step.micro_batches[0].tolist()) == [0, 1, 2, 3]
    assert (step.epoch, step.end) == (10**6 - 1, Cursor(epoch=10**6))
    assert packed == [4]


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
