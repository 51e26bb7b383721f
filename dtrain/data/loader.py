"""Steps for one rank, gathered ahead of time in the background."""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dtrain.batch import Batch
from dtrain.data.plan import BatchPlan, Cursor, DistributedTokenSampler, Ids, Lengths, PlannedStep

STEPS_AHEAD = 2
Sentences = tuple[NDArray[np.integer], Ids]


class Store(Lengths, Protocol):
    """What the loader needs of a token store."""

    def gather(self, ids: Ids) -> tuple[Sentences, Sentences]:
        """Give (tokens, lengths) of both sides of these pairs."""


@dataclass(frozen=True)
class LoadedStep:
    """What one rank runs in one step.

    Attributes:
        plan: the step as all ranks run it.
        micro_batches: (index in the step, batch), as many on every rank.
    """

    plan: PlannedStep
    micro_batches: list[tuple[int, Batch]]


def collate(plan: BatchPlan, store: Store, ids: Ids) -> Batch:
    """Gather one micro-batch; no ids give the empty batch of weight 0."""
    source_slots, target_slots = plan.source_slots, plan.target_slots
    if not len(ids):
        return Batch.empty(source_slots, target_slots, plan.kernel, plan.max_length)
    source, target = store.gather(ids)
    form = plan.kernel, plan.max_length, plan.num_rectangles
    return Batch.packed(source, target, source_slots, target_slots, *form)


class MicroBatches(torch.utils.data.Dataset[Batch]):
    """A token store as a map-style data set, for a plain DataLoader.

    `DataLoader(MicroBatches(plan, store), sampler=DistributedTokenSampler(plan), batch_size=None)`
    gives this rank's batches of an epoch.
    """

    def __init__(self, plan: BatchPlan, store: Store) -> None:
        self.plan, self.store = plan, store

    def __getitem__(self, ids: list[int]) -> Batch:
        """Gather the sentences that the sampler names."""
        return collate(self.plan, self.store, np.array(ids, np.int64))


class Loader:
    """This rank's steps from a cursor on; a context manager, since a thread works ahead of it."""

    def __init__(
        self, sampler: DistributedTokenSampler, store: Store, start: Cursor, pin_memory: bool
    ) -> None:
        self._sampler, self._store, self._start = sampler, store, start
        self._pin_memory = pin_memory
        self._queue: queue.Queue[LoadedStep | BaseException] = queue.Queue(STEPS_AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work_ahead, name="loader", daemon=True)

    def __enter__(self) -> "Loader":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()  # a full queue would hold the thread up
            except queue.Empty:
                self._thread.join(0.01)

    def __iter__(self) -> Iterator[LoadedStep]:
        while True:
            step = self._queue.get()
            if isinstance(step, BaseException):
                raise step
            yield step

    def _work_ahead(self) -> None:
        try:
            for step in self._sampler.plan.steps(self._start):
                self._queue.put(self._load(step))
                if self._closed.is_set():
                    return
        except BaseException as error:  # raised again where the steps are used
            self._queue.put(error)

    def _load(self, step: PlannedStep) -> LoadedStep:
        plan = self._sampler.plan
        batches = [
            (index, collate(plan, self._store, ids)) for index, ids in self._sampler.share(step)
        ]
        if self._pin_memory:
            batches = [(index, batch.map(torch.Tensor.pin_memory)) for index, batch in batches]
        return LoadedStep(step, batches)
