"""Waiting for rank 0 while it works for all: however long that takes, if its heart beats.

Collectives have a time-out; text may take hours to prepare. So rank 0 counts up in the ranks' store
meanwhile, and the others give up only once the count stands still.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

HEARTBEAT_SECONDS = 2.5
HEARTBEATS_MISSED = 10  # then the others give rank 0 up
LOOK_SECONDS = 0.02


class Store(Protocol):
    """What is needed of torch's key-value store."""

    def add(self, key: str, amount: int, /) -> int:
        """Add to a number, from 0; gives the sum."""

    def wait(self, keys: list[str], timeout: timedelta, /) -> None:
        """Return once all keys are set; a RuntimeError comes after the time-out."""


@contextmanager
def beating(store: Store) -> Iterator[None]:
    """Beat in the store from a thread for as long as the context lasts."""
    stopped = threading.Event()

    def beat() -> None:
        while not stopped.wait(HEARTBEAT_SECONDS / 2):
            store.add("heartbeat", 1)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def wait_for_main(store: Store, key: str, rank: int) -> None:
    """Wait until rank 0 has set a key, for as long as its heart beats.

    A thread asks the store, since a store whose process is stopped never answers.

    Raises:
        RuntimeError: naming this rank, if rank 0 gives no sign of life.
    """
    heard, done = _Heard(), threading.Event()

    def ask() -> None:
        while not done.is_set():
            try:
                store.wait([key], timedelta(seconds=HEARTBEAT_SECONDS))
                done.set()
            except RuntimeError:  # not set yet; if the store itself is gone, this one is too
                heard.note(store.add("heartbeat", 0))

    threading.Thread(target=ask, daemon=True, name="waiting for rank 0").start()
    while not done.wait(LOOK_SECONDS):
        silence = time.monotonic() - heard.at
        if silence > HEARTBEAT_SECONDS * HEARTBEATS_MISSED:
            done.set()
            raise RuntimeError(
                f"rank {rank}: rank 0 gave no sign of life for {silence:.0f} s while it got the "
                f"run ready: its process is stopped, or its machine is gone"
            )


class _Heard:
    """When the heart of rank 0 was heard last."""

    def __init__(self) -> None:
        self.beat, self.at = -1, time.monotonic()

    def note(self, beat: int) -> None:
        if beat != self.beat:
            self.beat, self.at = beat, time.monotonic()
