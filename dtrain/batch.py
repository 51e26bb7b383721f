"""Batch: what crosses from data to model; where sentences lie, and who may attend to whom.

Two layouts, the same numbers: *packed*, sentences end to end in a fixed number of slots with no
padding between them (training), and *padded*, the classic (N, S) rectangle (reading, search).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PAD_ID, UNK_ID, BOS_ID, EOS_ID = 0, 1, 2, 3
"""The special tokens of every vocabulary: padding, unknown, begin and end of sentence."""


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

    A packed side is a row of slots; the same tokens can also be seen as cells of a rectangle
    [N, L] with one row a sentence, L being the longest. Slots behind the last sentence are slack:
    they belong to no sentence, and what is computed there is never used.

    Attributes:
        lengths: tokens of each sentence, int64 [N].
        positions: place of each token in its sentence, from 0; int64 [slots] or [N, L].
        mask: True where a cell holds a token, bool [N, L].
        slot_of_cell: int64 [N, L], 0 where the cell is empty; None if the side is padded.
        cell_of_slot: int64 [slots], counting cells row by row, 0 for slack; None if padded.
        token_mask: True where a slot holds a token, bool [slots]; None if padded.
    """

    lengths: Tensor
    positions: Tensor
    mask: Tensor
    slot_of_cell: Tensor | None = None
    cell_of_slot: Tensor | None = None
    token_mask: Tensor | None = None

    @classmethod
    def padded(cls, lengths: Tensor, max_length: int | None = None) -> "Layout":
        """Lay sentences of these lengths [N] out as a rectangle [N, max_length]."""
        width = int(lengths.max()) if max_length is None else max_length
        positions = torch.arange(width, device=lengths.device).expand(len(lengths), width)
        return cls(lengths, positions, padding_mask(lengths, width))

    @classmethod
    def packed(cls, lengths: NDArray[np.int64], num_slots: int) -> "Layout":
        """Lay sentences of these lengths [N] end to end in `num_slots` slots.

        Raises:
            ValueError: if they do not fit.
        """
        num_tokens = int(lengths.sum())
        if num_tokens > num_slots:
            raise ValueError(f"{num_tokens} tokens do not fit into {num_slots} slots")
        width = int(lengths.max())
        starts = np.cumsum(lengths) - lengths
        columns = np.arange(width)
        mask = columns < lengths[:, None]
        slot_of_cell = np.where(mask, starts[:, None] + columns, 0)
        positions = np.zeros(num_slots, np.int64)
        cell_of_slot = np.zeros(num_slots, np.int64)
        positions[:num_tokens] = np.arange(num_tokens) - np.repeat(starts, lengths)
        rows = np.repeat(np.arange(len(lengths)), lengths)
        cell_of_slot[:num_tokens] = rows * width + positions[:num_tokens]
        return cls(
            torch.from_numpy(lengths.astype(np.int64)),
            torch.from_numpy(positions),
            torch.from_numpy(mask),
            torch.from_numpy(slot_of_cell),
            torch.from_numpy(cell_of_slot),
            torch.from_numpy(np.arange(num_slots) < num_tokens),
        )

    @property
    def is_packed(self) -> bool:
        """Whether tokens lie in slots [slots] rather than in cells [N, L]."""
        return self.slot_of_cell is not None

    def map(self, change: "TensorChange") -> "Layout":
        """Apply `change` to every tensor (a move to a device, say)."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{k: change(t) for k, t in tensors.items() if t is not None})


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
    ) -> "Batch":
        """Pack ragged sentences end to end.

        Args:
            source: all tokens in one row, and the lengths [N] that cut it; EOS_ID included.
            target: likewise.
            source_slots: size of the packed source side.
            target_slots: size of the packed target side.

        Raises:
            ValueError: if a side does not fit its slots.
        """
        source_layout = Layout.packed(source[1], source_slots)
        target_layout = Layout.packed(target[1], target_slots)
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
    def empty(cls, source_slots: int, target_slots: int) -> "Batch":
        """Give a packed batch of weight 0: one dummy sentence a side, nothing counted.

        It touches every parameter, so that a rank without work stays in step with the others.
        """
        end = np.array([EOS_ID]), np.array([1])
        batch = cls.packed(end, end, source_slots, target_slots)
        return replace(batch, target_out=torch.full_like(batch.target_out, PAD_ID), num_tokens=0)

    @classmethod
    def padded(cls, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> "Batch":
        """Lay sentences of ids, EOS_ID included, out as rectangles (N, S) and (N, T)."""
        source, source_layout = pad_rows(sources)
        target_out, target_layout = pad_rows(targets)
        target_in = target_out.roll(1, dims=1)
        target_in[:, 0] = BOS_ID
        target_in = target_in.masked_fill(~target_layout.mask, PAD_ID)
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

    def to(self, device: torch.device) -> "Batch":
        """Move every tensor; from pinned memory the copy does not block."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


def pad_rows(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Layout]:
    """Fill ragged rows of ids with PAD_ID to one rectangle int64 [N, L]."""
    lengths = torch.tensor([len(row) for row in rows])
    layout = Layout.padded(lengths)
    ids = torch.full(layout.mask.shape, PAD_ID)
    ids[layout.mask] = torch.tensor([token for row in rows for token in row])
    return ids, layout
