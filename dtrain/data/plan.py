"""BatchPlan: which sentences form which micro-batch of which step, and which are this rank's.

The plan is a pure function of (data, batch settings, seed): every rank computes the same one and
takes its share, and to resume is to go on from a cursor. It works window by window, so that memory
stays constant at any size of corpus: blocks of consecutive pairs are visited in a keyed random
order, a window of blocks is packed, and its micro-batches are shuffled. Steps cut the stream of
micro-batches evenly, across windows and epochs; none is dropped and no step is short.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset, DistributedSampler

from dtrain.batch import NUM_RECTANGLES, Kernel
from dtrain.data import packing
from dtrain.data.settings import BatchSettings

BLOCK_PAIRS = 256  # consecutive pairs that are read together
WINDOW_BLOCKS = 128  # blocks that are packed together: enough for full slots, quick to pack
SLOT_MULTIPLE = 8  # what the source side's slots are rounded up to

Ids = NDArray[np.int64]


class Lengths(Sized, Protocol):
    """What the plan needs of a token store."""

    def source_lengths(self, ids: Ids) -> Ids:
        """Give the source tokens of these sentences."""

    def target_lengths(self, ids: Ids) -> Ids:
        """Give the target tokens of these sentences."""


@dataclass(frozen=True)
class Cursor:
    """A place in the stream of micro-batches: `offset` of them in this window lie behind it."""

    epoch: int = 0
    window: int = 0
    offset: int = 0


@dataclass(frozen=True)
class PlannedStep:
    """One optimizer step, as all ranks together run it.

    Attributes:
        epoch: the epoch that the step begins in, from 0.
        micro_batches: sentence ids of each micro-batch.
        num_source_tokens: tokens of the whole step.
        num_target_tokens: likewise; what the loss is a mean over.
        end: where the next step begins.
    """

    epoch: int
    micro_batches: tuple[Ids, ...]
    num_source_tokens: int
    num_target_tokens: int
    end: Cursor


def mix64(*words: int | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash integers to uniform 64-bit words, the same on every machine and numpy version.

    SplitMix64's finaliser (Steele, Lea, Flood 2014), applied once a word.
    """
    state = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            value = np.asarray(word).astype(np.uint64)
            state = (state ^ value) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def keyed_order(size: int, *key: int) -> Ids:
    """Permute range(size), as random as the key and reproducible everywhere."""
    return np.argsort(mix64(*key, np.arange(size, dtype=np.uint64)), kind="stable")


def source_slots(settings: BatchSettings, length_ratio: float, max_length: int) -> int:
    """Give the source side's slots: the target side's times the corpus's length ratio.

    Never fewer than the longest sentence allowed needs.
    """
    wanted = max(settings.target_slots * length_ratio, max_length)
    return int(-(-wanted // SLOT_MULTIPLE) * SLOT_MULTIPLE)


class BatchPlan:
    """The stream of micro-batches of a training run."""

    def __init__(
        self,
        lengths: Lengths,
        settings: BatchSettings,
        source_slots: int,
        seed: int,
        corpora: Sequence[tuple[int, int]] | None = None,
        kernel: Kernel = "padded",
        max_length: int | None = None,
        num_rectangles: int = NUM_RECTANGLES,
    ) -> None:
        """Describe the stream; nothing is planned yet.

        Args:
            lengths: the token store.
            settings: sizes of step and micro-batch.
            source_slots: slots of a micro-batch's source side.
            seed: of every order in the plan.
            corpora: (sentences, weight) of each corpus, in the store's order; weight k makes
                k visits an epoch. One corpus of weight 1 if None.
            kernel: what will attend to the micro-batches; it changes their form, not the plan.
            max_length: tokens of the longest sentence there may be; any number if None.
            num_rectangles: in which sentences attend, if the kernel needs them.
        """
        self.lengths = lengths
        self.settings = settings
        self.source_slots = source_slots
        self.target_slots = settings.target_slots
        self.kernel, self.max_length, self.num_rectangles = kernel, max_length, num_rectangles
        self.seed = seed
        self.corpora = tuple(corpora) if corpora is not None else ((len(lengths), 1),)
        self._blocks = self._list_blocks()
        self.num_windows = max(1, round(len(self._blocks) / WINDOW_BLOCKS))
        self._window: tuple[tuple[int, int], list[Ids]] | None = None
        self._order: tuple[int, Ids] | None = None
        self._micro_batches_before = [0]

    @property
    def fingerprint(self) -> str:
        """Identify the stream: with the same data, the same fingerprint means the same batches."""
        facts = {
            "batch": self.settings.model_dump(),
            "source_slots": self.source_slots,
            "seed": self.seed,
            "corpora": self.corpora,
            "window": [BLOCK_PAIRS, WINDOW_BLOCKS],
            "packing": packing.VERSION,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def window(self, epoch: int, index: int) -> list[Ids]:
        """Give the micro-batches of one window, in the order in which they are run."""
        window = self._window  # another thread may put its own there meanwhile
        if window is None or window[0] != (epoch, index):
            self._window = window = (epoch, index), self._pack_window(epoch, index)
        return window[1]

    def steps(self, start: Cursor) -> Iterator[PlannedStep]:
        """Cut the stream into steps from `start` on, without end."""
        cursor, pending = start, list[Ids]()
        begin = cursor
        while True:
            window = self.window(cursor.epoch, cursor.window)
            needed = self.settings.micro_batches_per_step - len(pending)
            taken = window[cursor.offset : cursor.offset + needed]
            if not pending and taken:
                begin = cursor
            pending += taken
            cursor = self._advance(cursor, len(taken), len(window))
            if len(pending) == self.settings.micro_batches_per_step:
                yield self._step(begin.epoch, tuple(pending), cursor)
                pending = []

    def epoch_start(self, epoch: int) -> Cursor:
        """Find where the first step that begins in this epoch begins.

        Packs every earlier window once: a step's place depends on how many micro-batches came
        before. Training never calls it; a cursor is in the checkpoint.
        """
        known = self._micro_batches_before
        while len(known) <= epoch:
            count = sum(len(self.window(len(known) - 1, i)) for i in range(self.num_windows))
            known.append(known[-1] + count)
        offset = -known[epoch] % self.settings.micro_batches_per_step
        cursor = Cursor(epoch)
        while offset:
            size = len(self.window(cursor.epoch, cursor.window))
            taken = min(offset, size - cursor.offset)
            cursor = self._advance(cursor, taken, size)
            offset -= taken
        return cursor

    def _list_blocks(self) -> Ids:
        """List [first sentence, one past the last] of each block, weight times."""
        blocks, first = list[Ids](), 0
        for size, weight in self.corpora:
            starts = np.arange(first, first + size, BLOCK_PAIRS)
            ends = np.minimum(starts + BLOCK_PAIRS, first + size)
            blocks += [np.stack([starts, ends], axis=1)] * weight
            first += size
        return np.concatenate(blocks)

    def _order_of_blocks(self, epoch: int) -> Ids:
        order = self._order  # another thread may put its own there meanwhile
        if order is None or order[0] != epoch:
            self._order = order = epoch, keyed_order(len(self._blocks), self.seed, epoch, 0)
        return order[1]

    def _pack_window(self, epoch: int, index: int) -> list[Ids]:
        order = self._order_of_blocks(epoch)
        first, last = (i * len(order) // self.num_windows for i in (index, index + 1))
        ids = np.concatenate([np.arange(*self._blocks[block]) for block in order[first:last]])
        ids = ids[keyed_order(len(ids), self.seed, epoch, 1, index)]
        bins = packing.pack(
            self.lengths.source_lengths(ids),
            self.lengths.target_lengths(ids),
            self.source_slots,
            self.target_slots,
        )
        return [ids[bins[i]] for i in keyed_order(len(bins), self.seed, epoch, 2, index)]

    def _advance(self, cursor: Cursor, count: int, window_size: int) -> Cursor:
        """Move over `count` micro-batches of the cursor's window."""
        if cursor.offset + count < window_size:
            return Cursor(cursor.epoch, cursor.window, cursor.offset + count)
        if cursor.window + 1 < self.num_windows:
            return Cursor(cursor.epoch, cursor.window + 1)
        return Cursor(cursor.epoch + 1)

    def _step(self, epoch: int, micro_batches: tuple[Ids, ...], end: Cursor) -> PlannedStep:
        ids = np.concatenate(micro_batches)
        return PlannedStep(
            epoch,
            micro_batches,
            int(self.lengths.source_lengths(ids).sum()),
            int(self.lengths.target_lengths(ids).sum()),
            end,
        )


class _Sentences(Dataset[int]):
    """What torch's sampler asks for its length."""

    def __init__(self, sentences: Sized) -> None:
        self._sentences = sentences

    def __len__(self) -> int:
        return len(self._sentences)


class DistributedTokenSampler(DistributedSampler[list[int]]):
    """This rank's micro-batches of an epoch; the `sampler` of a plain DataLoader over MicroBatches.

    An epoch is made of the steps that begin in it. Ranks share each step's micro-batches evenly,
    in contiguous runs; all have as many as each other, the missing ones empty.
    """

    def __init__(
        self, plan: BatchPlan, num_replicas: int | None = None, rank: int | None = None
    ) -> None:
        """Share `plan` out; number and rank come from torch.distributed if None.

        Raises:
            ValueError: if there are more ranks than micro-batches in a step.
        """
        super().__init__(_Sentences(plan.lengths), num_replicas, rank, seed=plan.seed)
        self.plan = plan
        count = plan.settings.micro_batches_per_step
        if self.num_replicas > count:
            raise ValueError(
                f"{self.num_replicas} ranks cannot share the {count} micro-batches of a step"
            )
        self.micro_batches_per_rank = -(-count // self.num_replicas)

    def share(self, step: PlannedStep) -> list[tuple[int, Ids]]:
        """Give this rank's (index in the step, sentence ids); empty ones have indices of none."""
        count = len(step.micro_batches)
        first, last = (r * count // self.num_replicas for r in (self.rank, self.rank + 1))
        mine = [(i, step.micro_batches[i]) for i in range(first, last)]
        missing = self.micro_batches_per_rank - len(mine)
        return mine + [(count, np.empty(0, np.int64))] * missing

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._epoch_steps():
            for _, ids in self.share(step):
                yield ids.tolist()

    def __len__(self) -> int:
        """Count this rank's micro-batches of the epoch; packs every window of it."""
        return sum(self.micro_batches_per_rank for _ in self._epoch_steps())

    def _epoch_steps(self) -> Iterator[PlannedStep]:
        start = self.plan.epoch_start(self.epoch)
        if start.epoch > self.epoch:
            return
        for step in self.plan.steps(start):
            if step.epoch > self.epoch:
                return
            yield step
