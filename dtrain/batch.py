"""Batch: what crosses from data to model; where sentences lie, and who may attend to whom.

Two layouts, the same numbers: *packed*, sentences end to end in a fixed number of slots with no
padding between them (training), and *padded*, the classic (N, S) rectangle (reading, search).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PAD_ID, UNK_ID, BOS_ID, EOS_ID = 0, 1, 2, 3
"""The special tokens of every vocabulary: padding, unknown, begin and end of sentence."""

NUM_RECTANGLES = 4
"""In which packed sentences attend: more would save few cells, and each costs its calls."""

Kernel = Literal["padded", "varlen", "packed"]
"""How sentences attend, as `kernels/attention.py` explains."""


class Encoder(Protocol):
    """What `Batch.from_text` needs of a vocabulary."""

    def encode_source(self, lines: Sequence[str]) -> list[list[int]]:
        """Give the ids of each line, the end of sentence included."""

    def encode_target(self, lines: Sequence[str]) -> list[list[int]]:
        """Give the ids of each line, the end of sentence included."""


def padding_mask(lengths: Tensor, max_length: int) -> Tensor:
    """Say which cells of a padded rectangle hold a token: lengths [N] -> bool [N, max_length]."""
    return torch.arange(max_length, device=lengths.device) < lengths[:, None]


def future_mask(length: int, device: torch.device | str | None = None) -> Tensor:
    """Let each target position attend to itself and what came before: bool [length, length]."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


@dataclass(frozen=True)
class Layout:
    """Where the sentences of one side of a batch lie.

    A packed side is a row of slots. Slots behind the last sentence are slack: they belong to no
    sentence, and what is computed there is never used. What else a packed side holds depends on
    the kernel that will attend: `padded` sees the same tokens also as cells of a few rectangles,
    one row a sentence, with sentences of similar lengths in each. The other kernels are told where
    sentences begin, in tensors whose shapes depend on the number of slots alone.

    Attributes:
        lengths: tokens of each sentence, int64 [N]; zeros behind to [slots] without rectangles.
        positions: place of each token in its sentence, from 0; int64 [slots] or [N, L].
        max_length: no sentence is longer; L if padded.
        num_sentences: N.
        kernel: what attends to the sentences.
        rectangles: rows and columns of each; none for the other kernels.
        mask: True where a cell holds a token, bool [N, L] if padded; else all cells of the
            rectangles, row by row, bool [cells]; None without rectangles.
        slot_of_cell: int64 [cells], 0 where the cell is empty; None if padded, or without them.
        cell_of_slot: int64 [slots], 0 for slack; None likewise.
        token_mask: True where a slot holds a token, bool [slots]; None if padded.
        sentence_of_slot: int32 [slots], N for slack; None with rectangles.
        boundaries: where sentence i begins and i - 1 ends, int32 [slots + 2]; behind N it stays at
            the end of the last sentence: sentences without a token, slack's for one. None likewise.
        memo: what a kernel has worked out of it, and needs again in the next layer.
    """

    lengths: Tensor
    positions: Tensor
    max_length: int
    num_sentences: int
    kernel: Kernel = "padded"
    rectangles: tuple[tuple[int, int], ...] = ()
    mask: Tensor | None = None
    slot_of_cell: Tensor | None = None
    cell_of_slot: Tensor | None = None
    token_mask: Tensor | None = None
    sentence_of_slot: Tensor | None = None
    boundaries: Tensor | None = None
    memo: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    @classmethod
    def padded(cls, lengths: Tensor, max_length: int | None = None) -> "Layout":
        """Lay sentences of these lengths [N] out as a rectangle [N, max_length]."""
        width = int(lengths.max()) if max_length is None else max_length
        positions = torch.arange(width, device=lengths.device).expand(len(lengths), width)
        mask = padding_mask(lengths, width)
        count = len(lengths)
        return cls(lengths, positions, width, count, rectangles=((count, width),), mask=mask)

    @classmethod
    def packed(
        cls,
        lengths: NDArray[np.int64],
        num_slots: int,
        kernel: Kernel = "padded",
        max_length: int | None = None,
        groups: Sequence[NDArray[np.int64]] | None = None,
    ) -> "Layout":
        """Lay sentences of these lengths [N] end to end in `num_slots` slots.

        Args:
            lengths: tokens of each sentence.
            num_slots: size of the packed side.
            kernel: what will attend to them.
            max_length: no sentence of any batch is longer, so that `padded` alone has shapes that
                differ from batch to batch; `num_slots` if None.
            groups: which sentences are the rows of each rectangle, the same on both sides of a
                batch; all of one if None.

        Raises:
            ValueError: if they do not fit.
        """
        num_tokens = int(lengths.sum())
        if num_tokens > num_slots:
            raise ValueError(f"{num_tokens} tokens do not fit into {num_slots} slots")
        starts = np.cumsum(lengths) - lengths
        positions = np.zeros(num_slots, np.int64)
        positions[:num_tokens] = np.arange(num_tokens) - np.repeat(starts, lengths)
        layout = cls(
            torch.from_numpy(lengths.astype(np.int64)),
            torch.from_numpy(positions),
            num_slots if max_length is None else max_length,
            len(lengths),
            kernel,
            token_mask=torch.from_numpy(np.arange(num_slots) < num_tokens),
        )
        if kernel == "padded":
            return layout._with_rectangles([np.arange(len(lengths))] if groups is None else groups)
        return layout._with_boundaries()

    def _with_rectangles(self, groups: Sequence[NDArray[np.int64]]) -> "Layout":
        lengths, num_slots = self.lengths.numpy(), len(self.positions)
        starts = np.cumsum(lengths) - lengths
        rectangles = [(len(rows), int(lengths[rows].max())) for rows in groups]
        masks, slots = [], []
        for rows, (_, width) in zip(groups, rectangles, strict=True):
            columns = np.arange(width)
            masks.append((columns < lengths[rows, None]).ravel())
            slots.append((starts[rows, None] + columns).ravel())
        mask = np.concatenate(masks)
        slot_of_cell = np.where(mask, np.concatenate(slots), 0)
        cell_of_slot = np.zeros(num_slots, np.int64)
        cell_of_slot[slot_of_cell[mask]] = np.flatnonzero(mask)
        return replace(
            self,
            max_length=int(lengths.max()),
            rectangles=tuple(rectangles),
            mask=torch.from_numpy(mask),
            slot_of_cell=torch.from_numpy(slot_of_cell),
            cell_of_slot=torch.from_numpy(cell_of_slot),
        )

    def _with_boundaries(self) -> "Layout":
        lengths, num_slots = self.lengths.numpy(), len(self.positions)
        count, num_tokens = len(lengths), int(lengths.sum())
        if count > num_slots:
            raise ValueError(f"{count} sentences do not fit into {num_slots} slots")
        sentence_of_slot = np.full(num_slots, count, np.int32)
        sentence_of_slot[:num_tokens] = np.repeat(np.arange(count), lengths)
        boundaries = np.full(num_slots + 2, num_tokens, np.int32)
        boundaries[:count] = np.cumsum(lengths) - lengths
        return replace(
            self,
            lengths=torch.from_numpy(np.pad(lengths, (0, num_slots - count))),
            sentence_of_slot=torch.from_numpy(sentence_of_slot),
            boundaries=torch.from_numpy(boundaries),
        )

    def map(self, change: "TensorChange") -> "Layout":
        """Apply `change` to every tensor (a move to a device, say)."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        return Layout(**values | {name: change(tensor) for name, tensor in tensors.items()})


class TensorChange(Protocol):
    """A function from a tensor to its moved or pinned copy."""

    def __call__(self, tensor: Tensor, /) -> Tensor:
        """Give the copy."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch: sentence pairs as ids, with their layouts.

    Attributes:
        source: int64 [S slots] or [N, S]; each sentence ends with EOS_ID.
        target_in: what the decoder reads, shifted right: BOS_ID first; [T slots] or [N, T].
        target_out: what it should say: EOS_ID last; PAD_ID where nothing counts.
        source_layout: where the source sentences lie.
        target_layout: where the target sentences lie.
        num_tokens: target tokens that count in the loss.
    """

    source: Tensor
    target_in: Tensor
    target_out: Tensor
    source_layout: Layout
    target_layout: Layout
    num_tokens: int

    @classmethod
    def packed(
        cls,
        source: tuple[NDArray[np.integer], NDArray[np.int64]],
        target: tuple[NDArray[np.integer], NDArray[np.int64]],
        source_slots: int,
        target_slots: int,
        kernel: Kernel = "padded",
        max_length: int | None = None,
        num_rectangles: int = NUM_RECTANGLES,
    ) -> "Batch":
        """Pack ragged sentences end to end.

        Args:
            source: all tokens in one row, and the lengths [N] that cut it; EOS_ID included.
            target: likewise.
            source_slots: size of the packed source side.
            target_slots: size of the packed target side.
            kernel: what will attend to them.
            max_length: see `Layout.packed`.
            num_rectangles: for the kernel `padded`.

        Raises:
            ValueError: if a side does not fit its slots.
        """
        groups = of_similar_length(source[1], target[1], num_rectangles)
        source_layout = Layout.packed(source[1], source_slots, kernel, max_length, groups)
        target_layout = Layout.packed(target[1], target_slots, kernel, max_length, groups)
        source_ids = np.full(source_slots, PAD_ID, np.int64)
        target_in = np.full(target_slots, PAD_ID, np.int64)
        target_out = np.full(target_slots, PAD_ID, np.int64)
        source_ids[: len(source[0])] = source[0]
        target_out[: len(target[0])] = target[0]
        target_in[1 : len(target[0])] = target[0][:-1]
        target_in[np.cumsum(target[1]) - target[1]] = BOS_ID
        return cls(
            torch.from_numpy(source_ids),
            torch.from_numpy(target_in),
            torch.from_numpy(target_out),
            source_layout,
            target_layout,
            len(target[0]),
        )

    @classmethod
    def empty(
        cls,
        source_slots: int,
        target_slots: int,
        kernel: Kernel = "padded",
        max_length: int | None = None,
    ) -> "Batch":
        """Give a packed batch of weight 0: one dummy sentence a side, nothing counted.

        It touches every parameter, so that a rank without work stays in step with the others.
        """
        end = np.array([EOS_ID]), np.array([1])
        batch = cls.packed(end, end, source_slots, target_slots, kernel, max_length)
        return replace(batch, target_out=torch.full_like(batch.target_out, PAD_ID), num_tokens=0)

    @classmethod
    def padded(cls, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> "Batch":
        """Lay sentences of ids, EOS_ID included, out as rectangles (N, S) and (N, T)."""
        source, source_layout = pad_rows(sources)
        target_out, target_layout = pad_rows(targets)
        target_in = target_out.roll(1, dims=1)
        target_in[:, 0] = BOS_ID
        is_token = padding_mask(target_layout.lengths, target_layout.max_length)
        target_in = target_in.masked_fill(~is_token, PAD_ID)
        num_tokens = sum(len(target) for target in targets)
        return cls(source, target_in, target_out, source_layout, target_layout, num_tokens)

    @classmethod
    def from_text(
        cls, sources: Sequence[str], targets: Sequence[str], vocabulary: Encoder
    ) -> "Batch":
        """Make a padded batch straight from text."""
        return cls.padded(vocabulary.encode_source(sources), vocabulary.encode_target(targets))

    def map(self, change: TensorChange) -> "Batch":
        """Apply `change` to every tensor (a move to a device, say)."""
        return Batch(
            change(self.source),
            change(self.target_in),
            change(self.target_out),
            self.source_layout.map(change),
            self.target_layout.map(change),
            self.num_tokens,
        )

    def tensors(self) -> list[Tensor]:
        """List every tensor, always in the same order."""
        found = list[Tensor]()

        def note(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.map(note)
        return found

    def to(self, device: torch.device) -> "Batch":
        """Move every tensor; from pinned memory the copy does not block."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


def of_similar_length(
    source_lengths: NDArray[np.int64], target_lengths: NDArray[np.int64], count: int
) -> list[NDArray[np.int64]]:
    """Group sentences so that few cells stay empty in rectangles of about as many rows each."""
    order = np.argsort(source_lengths + target_lengths, kind="stable")
    return np.array_split(order, min(count, len(order)))


def pad_rows(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Layout]:
    """Fill ragged rows of ids with PAD_ID to one rectangle int64 [N, L]."""
    lengths = torch.tensor([len(row) for row in rows])
    layout = Layout.padded(lengths)
    ids = torch.full(layout.positions.shape, PAD_ID)
    ids[padding_mask(lengths, layout.max_length)] = torch.tensor([t for row in rows for t in row])
    return ids, layout
