"""Batches for training loops written by hand: the usual ways to choose sentences. numpy alone."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.turns import PAD, Ids, Rows

Random = np.random.Generator


def bucketed(source: Rows, target: Rows, tokens: int, random: Random) -> Iterator[Ids]:
    """Sort all sentences by length, target first, cut them into batches, and shuffle these."""
    while True:
        ids = random.permutation(len(source))
        order = np.lexsort((source.lengths[ids], target.lengths[ids]))
        batches = list(cut(target, ids[order], tokens))
        yield from (batches[i] for i in random.permutation(len(batches)))


def randomly(_source: Rows, target: Rows, tokens: int, random: Random) -> Iterator[Ids]:
    """Take sentences as they come, as tutorials do."""
    while True:
        yield from cut(target, random.permutation(len(target)), tokens)


def cut(target: Rows, ids: Ids, tokens: int) -> Iterator[Ids]:
    """Cut sentences, in this order, into batches of about so many target tokens each."""
    ends = np.cumsum(target.lengths[ids])
    return iter(np.split(ids, np.flatnonzero(np.diff(ends // tokens)) + 1))


def padded(rows: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Lay sentences out as a rectangle [N, L], PAD behind them."""
    rectangle = np.full((len(rows), max(map(len, rows))), PAD, np.int64)
    for cells, row in zip(rectangle, rows, strict=True):
        cells[: len(row)] = row
    return rectangle
