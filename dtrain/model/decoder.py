"""DecoderBlock and TransformerDecoder: from the target so far to logits of its next token."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from dtrain.batch import Layout
from dtrain.kernels.attention import key_mask
from dtrain.kernels.dropout import dropout
from dtrain.model.attention import MultiHeadAttention
from dtrain.model.embedding import TokenEmbedding
from dtrain.model.positional_encoding import PositionalEncoding
from dtrain.model.settings import ModelSettings
from dtrain.model.sublayer import FeedForward, Residual


class DecoderBlock(nn.Module):
    """Causal self-attention, attention to the memory, feed-forward, each in a residual."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        attention = settings.hidden_dim, settings.num_heads, settings.qkv_dim
        self.attention = MultiHeadAttention(*attention, settings.attention_dropout)
        self.attention_residual = Residual(settings)
        self.memory_attention = MultiHeadAttention(*attention, settings.attention_dropout)
        self.memory_attention_residual = Residual(settings)
        self.feed_forward = FeedForward(settings.hidden_dim, settings.feed_forward_dim)
        self.feed_forward_residual = Residual(settings)

    def forward(self, x: Tensor, layout: Layout, memory: Tensor, memory_layout: Layout) -> Tensor:
        """[slots, hidden] or [N, T, hidden] -> the same shape; `memory` is likewise."""
        x = self.attention_residual(x, lambda x: self.attention(x, layout, causal=True))
        x = self.memory_attention_residual(
            x, lambda x: self.memory_attention(x, layout, memory, memory_layout)
        )
        return self.feed_forward_residual(x, self.feed_forward)

    def step(
        self, x: Tensor, past: Tensor, length: int, memory_kv: Tensor, memory_mask: Tensor
    ) -> Tensor:
        """Do for one new token of each row what forward does for whole sentences.

        Args:
            x: [N, rivals, hidden].
            past: this block's part of DecoderState.past.
            length: tokens in it so far.
            memory_kv: this block's part of DecoderState.memory_kv.
            memory_mask: True where the source has a token.

        Returns:
            [N, rivals, hidden].
        """
        x = self.attention_residual(
            x, lambda x: self.attention.step(x.flatten(0, 1), past, length).view_as(x)
        )
        x = self.memory_attention_residual(
            x, lambda x: self.memory_attention.step_memory(x, memory_kv, memory_mask)
        )
        return self.feed_forward_residual(x, self.feed_forward)


@dataclass
class DecoderState:
    """What a decoder remembers of N sources, each with the same number of rival translations.

    Attributes:
        past: keys and values of the tokens so far,
            [N * rivals, layers, 2, capacity, heads, qkv]; grows as needed.
        length: tokens in `past`.
        memory_kv: for each layer the memory's keys and values, [N, S, 2, heads, qkv].
        memory_mask: True where the source has a token, bool [N, 1, 1, S].
    """

    past: Tensor
    length: int
    memory_kv: list[Tensor]
    memory_mask: Tensor
    _spare: Tensor | None = None  # where `past` goes next: fresh memory costs more than copying

    def select(self, sources: Tensor | None, rows: Tensor) -> None:
        """Go on with these sources and these of the past's rows, each any number of times.

        Args:
            sources: int64 [new N]; None for all as they are.
            rows: int64 [new N * new rivals].
        """
        if not torch.equal(rows, torch.arange(len(self.past), device=rows.device)):
            if self._spare is None or len(self._spare) < len(rows):
                self._spare = self.past.new_empty(len(rows), *self.past.shape[1:])
            chosen = self._spare[: len(rows)]
            written = slice(self.length)
            torch.index_select(self.past[:, :, :, written], 0, rows, out=chosen[:, :, :, written])
            self.past, self._spare = chosen, self.past
        if sources is not None:
            self.memory_kv = [kv.index_select(0, sources) for kv in self.memory_kv]
            self.memory_mask = self.memory_mask.index_select(0, sources)

    def make_room(self) -> None:
        """Make sure that `past` can take another token."""
        if self.length == self.past.shape[3]:
            self.past = torch.cat([self.past, torch.empty_like(self.past)], dim=3)
            self._spare = None


class TransformerDecoder(nn.Module):
    """Embeddings, positions, a stack of blocks, and the output layer.

    With tied embeddings the output layer is the embedding's own matrix, registered once.
    """

    def __init__(self, settings: ModelSettings, vocabulary_size: int) -> None:
        super().__init__()
        self.embedding = TokenEmbedding(vocabulary_size, settings.hidden_dim)
        self.positions = PositionalEncoding(settings.hidden_dim)
        self.dropout = settings.dropout
        self.blocks = nn.ModuleList(
            DecoderBlock(settings) for _ in range(settings.num_decoder_layers)
        )
        # Pre-norm blocks leave their sum as it is, so it is normalised once at the end.
        self.norm = nn.LayerNorm(settings.hidden_dim) if settings.norm == "pre" else nn.Identity()
        self.output = None
        if not settings.tie_embeddings:
            self.output = nn.Linear(settings.hidden_dim, vocabulary_size, bias=False)
            nn.init.normal_(self.output.weight, std=settings.hidden_dim**-0.5)

    def forward(
        self, target_in: Tensor, layout: Layout, memory: Tensor, memory_layout: Layout
    ) -> Tensor:
        """Read the target so far, and the memory.

        Args:
            target_in: ids shifted right, [slots] or [N, T].
            layout: where the target sentences lie.
            memory: the encoder's output, [slots, hidden] or [N, S, hidden].
            memory_layout: where the source sentences lie.

        Returns:
            States that `logits` takes, [slots, hidden] or [N, T, hidden].
        """
        x = self.positions(self.embedding(target_in), layout)
        x = dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x, layout, memory, memory_layout)
        return self.norm(x)

    @property
    def output_weight(self) -> Tensor:
        """The output layer's matrix, [vocabulary, hidden]."""
        return self.embedding.weight if self.output is None else self.output.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Score every token as the next: [..., hidden] -> [..., vocabulary]."""
        return self.embedding.logits(hidden) if self.output is None else self.output(hidden)

    @torch.no_grad()
    def start(self, memory: Tensor, memory_layout: Layout) -> DecoderState:
        """Prepare to translate token by token, with one rival a source; nothing has a gradient.

        Args:
            memory: the encoder's output, padded, [N, S, hidden].
            memory_layout: where the source sentences lie.
        """
        memory_kv = [block.memory_attention.project_memory(memory) for block in self._each_block()]
        heads = memory_kv[0].shape[-2:]
        past = memory_kv[0].new_empty(len(memory), len(self.blocks), 2, 16, *heads)
        return DecoderState(past, 0, memory_kv, key_mask(memory_layout))

    @torch.no_grad()
    def step(self, ids: Tensor, state: DecoderState) -> Tensor:
        """Read one more token of each rival, and remember it in `state`.

        Args:
            ids: the newest tokens, [N, rivals].
            state: from `start`, or after earlier steps.

        Returns:
            States of these tokens that `logits` takes, [N, rivals, hidden].
        """
        state.make_room()
        x = self.embedding(ids) + self.positions.up_to(state.length + 1)[state.length]
        for i, block in enumerate(self._each_block()):
            x = block.step(x, state.past[:, i], state.length, state.memory_kv[i], state.memory_mask)
        state.length += 1
        return self.norm(x)

    def _each_block(self) -> list[DecoderBlock]:
        """Tell the type checker what the blocks are."""
        return cast(list[DecoderBlock], list(self.blocks))
