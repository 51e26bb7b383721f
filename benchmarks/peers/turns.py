"""What a contestant of the benchmarks is given, and how it takes its turns.

Contestants run in environments of their own, so this file needs no more than numpy, and nothing of
dtrain. A contestant is a program that is called with a folder and speaks JSON lines: it reads
`{"steps": 3}`, trains so many steps, writes `{"steps": [{...}, {...}, {...}]}` with what it did in
each, and waits. The end of its input is its end. Time, work and memory are measured from outside.
"""

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Step:
    """What a contestant did in one step.

    Attributes:
        source_tokens: that it learned from, ends of sentences included, padding and begin not.
        target_tokens: likewise.
        source_cells: that it computed, padding included.
        target_cells: likewise.
        loss: as the contestant counts it, in nats a target token.
    """

    source_tokens: int
    target_tokens: int
    source_cells: int
    target_cells: int
    loss: float


class Turns:
    """A contestant's side of the conversation; once it is made, nothing else writes into it."""

    def __init__(self) -> None:
        sys.stdout.flush()
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # whatever libraries print from here on goes to the errors
        self._wanted = 0
        self._done: list[Step] = []

    def take(self, steps: Iterable[Step]) -> NoReturn:
        """Train by drawing steps from an endless iterable, as many as asked, until nobody asks."""
        self.wait()
        for step in steps:
            self.done(step)
        raise RuntimeError("the contestant ran out of steps")

    def wait(self) -> None:
        """Wait to be asked for steps; exits if nobody will ask again."""
        line = sys.stdin.readline()
        if not line:
            raise SystemExit(0)
        self._wanted, self._done = json.loads(line)["steps"], []

    def done(self, step: Step) -> None:
        """Say that a step is done; goes on at once if more were asked for, else waits."""
        self._done.append(step)
        if len(self._done) == self._wanted:
            answer = {"steps": [asdict(step) for step in self._done]}
            self._answers.write(json.dumps(answer) + "\n")
            self._answers.flush()
            self.wait()


@dataclass(frozen=True)
class Assignment:
    """What everybody is to train: model, optimizer, size of a step.

    Attributes:
        threads: of the process.
        seed: of all randomness.
        tokens_per_step: target tokens, about.
        hidden_dim: width of the model.
        num_heads: of every attention.
        feed_forward_dim: inner width.
        num_layers: of encoder and of decoder.
        vocabulary_size: pieces, special ones included; one vocabulary for both sides.
        dropout: after sublayers and embeddings.
        label_smoothing: share spread over the vocabulary.
        learning_rate: the highest, at the end of the warm-up.
        warmup_steps: of its linear rise; then it falls with the square root of steps.
        beta1: of Adam.
        beta2: of Adam.
        epsilon: of Adam.
    """

    threads: int
    seed: int
    tokens_per_step: int
    hidden_dim: int
    num_heads: int
    feed_forward_dim: int
    num_layers: int
    vocabulary_size: int
    dropout: float
    label_smoothing: float
    learning_rate: float
    warmup_steps: int
    beta1: float
    beta2: float
    epsilon: float

    def write(self, folder: Path) -> None:
        """Write it to `assignment.json`."""
        (folder / "assignment.json").write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Assignment":
        """Read what `write` wrote."""
        return cls(**json.loads((folder / "assignment.json").read_text(encoding="utf-8")))

    def learning_rate_at(self, step: int) -> float:
        """Give the learning rate of a step, counted from 1."""
        warmup = self.warmup_steps
        return self.learning_rate * min(step / warmup, (warmup / step) ** 0.5)


PAD, UNK, BOS, EOS = 0, 1, 2, 3
"""Ids of padding, unknown, begin and end of sentence. Sentences end with EOS, and have no BOS."""


@dataclass(frozen=True)
class Rows:
    """Many rows of numbers of different lengths, end to end; mapped into memory when read.

    Attributes:
        values: of all rows, int32.
        offsets: where each begins, and the end of the last, int64 [rows + 1].
    """

    values: NDArray[np.int32]
    offsets: Ids

    @classmethod
    def of(cls, values: NDArray[np.integer], lengths: NDArray[np.integer]) -> "Rows":
        """Cut values [sum of lengths] into rows."""
        offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
        return cls(np.asarray(values, np.int32), offsets)

    def write(self, folder: Path, name: str) -> None:
        """Write two files of numpy's own format."""
        np.save(folder / f"{name}.values.npy", self.values)
        np.save(folder / f"{name}.offsets.npy", self.offsets)

    @classmethod
    def read(cls, folder: Path, name: str) -> "Rows":
        """Open what `write` wrote: `source`, `target`, or `planned`, dtrain's steps."""
        values, offsets = (
            np.load(folder / f"{name}.{part}.npy", mmap_mode="r") for part in ("values", "offsets")
        )
        return cls(values, np.asarray(offsets))

    @property
    def lengths(self) -> Ids:
        """Of each row."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Ids:
        return self.values[self.offsets[row] : self.offsets[row + 1]].astype(np.int64)
