"""Text to ids in several processes; in order, and with only some of it in memory at a time."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path

import numpy as np

from dtrain.data.corpus import Pair, Reason, fault
from dtrain.data.store import Ragged, token_dtype
from dtrain.data.vocabulary import Vocabulary
from dtrain.errors import UserError

CHUNK_PAIRS = 4096  # what a process is given at once
CHUNKS_AHEAD = 3  # for each process, before the results of the first are asked for


@dataclass(frozen=True)
class EncodedChunk:
    """Consecutive pairs as ids.

    Attributes:
        num_pairs: how many were read.
        source: those that are kept, EOS_ID last in each sentence.
        target: their translations.
        dropped: why each of the others is not, and its line.
    """

    num_pairs: int
    source: Ragged
    target: Ragged
    dropped: list[tuple[Reason, int]]


class Encoder:
    """Turns pairs into ids on several cores; a context manager, since processes work for it.

    What comes out does not depend on how many there are.
    """

    def __init__(self, vocabulary: Path, max_length: int, num_processes: int) -> None:
        """Start the processes.

        Args:
            vocabulary: the directory that it was saved in.
            max_length: longer sentences are dropped, with their translations.
            num_processes: 1 works in this process.
        """
        self._encode = partial(_encode, vocabulary, max_length)
        self._most_ahead = CHUNKS_AHEAD * num_processes
        self._processes: ProcessPoolExecutor | None = None
        if num_processes > 1:
            # A fork would copy locks of whatever threads the caller has, in any state.
            context = multiprocessing.get_context("spawn")
            self._processes = ProcessPoolExecutor(num_processes, context, _end_with_parent)

    def __enter__(self) -> "Encoder":
        return self

    def __exit__(self, *error: object) -> None:
        if self._processes is not None:
            self._processes.shutdown(cancel_futures=True)

    def encode(self, pairs: Iterable[Pair], check_ratio: bool) -> Iterator[EncodedChunk]:
        """Encode a stream of pairs, chunk by chunk and in order.

        Args:
            pairs: are read a few chunks ahead.
            check_ratio: drop those whose sides are out of proportion.

        Raises:
            UserError: if one of the processes is killed.
        """
        stream = iter(pairs)
        chunks = iter(lambda: list(islice(stream, CHUNK_PAIRS)), [])
        if self._processes is None:
            yield from (self._encode(check_ratio, chunk) for chunk in chunks)
            return
        ahead = deque[Future[EncodedChunk]]()
        try:
            for chunk in chunks:
                ahead.append(self._processes.submit(self._encode, check_ratio, chunk))
                if len(ahead) > self._most_ahead:
                    yield ahead.popleft().result()
            for future in ahead:
                yield future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a process that encoded text was killed, perhaps for lack of memory; start again "
                "with fewer cores (`taskset`) or more memory"
            ) from error


def encode_chunk(
    pairs: list[Pair], vocabulary: Vocabulary, max_length: int, check_ratio: bool
) -> EncodedChunk:
    """Encode pairs; drop those not worth learning from, too long, or blank once normalised."""
    dropped, usable = list[tuple[Reason, int]](), list[Pair]()
    for pair in pairs:
        reason = fault(pair, check_ratio)
        if reason is None:
            usable.append(pair)
        else:
            dropped.append((reason, pair.line))
    sources = vocabulary.encode_source([pair.source for pair in usable])
    targets = vocabulary.encode_target([pair.target for pair in usable])
    kept = list[tuple[list[int], list[int]]]()
    for pair, source, target in zip(usable, sources, targets, strict=True):
        if min(len(source), len(target)) == 1:  # nothing but the end of sentence
            dropped.append(("blank", pair.line))
        elif max(len(source), len(target)) > max_length:
            dropped.append(("too_long", pair.line))
        else:
            kept.append((source, target))
    return EncodedChunk(
        len(pairs),
        ragged([source for source, _ in kept], token_dtype(vocabulary.source_size)),
        ragged([target for _, target in kept], token_dtype(vocabulary.target_size)),
        dropped,
    )


def ragged(sentences: list[list[int]], dtype: np.dtype[np.integer]) -> Ragged:
    """Lay sentences of ids end to end."""
    lengths = np.fromiter(map(len, sentences), np.int64, len(sentences))
    return np.fromiter(chain.from_iterable(sentences), dtype, int(lengths.sum())), lengths


def _encode(directory: Path, max_length: int, check_ratio: bool, pairs: list[Pair]) -> EncodedChunk:
    return encode_chunk(pairs, _load(directory), max_length, check_ratio)


@lru_cache(maxsize=1)
def _load(directory: Path) -> Vocabulary:
    return Vocabulary.load(directory)


def _end_with_parent() -> None:
    """Leave it to the parent when to end; if it is killed, end too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
