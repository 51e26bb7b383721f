"""DecoderBlock and TransformerDecoder: from the target so far to logits of its next token."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from dtrain.batch import Layout
from dtrain.kernels.attention import key_mask
from dtrain.kernels.dropout import dropout
from dtrain.kernels.projection import project_jointly
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

    def forward(
        self, x: Tensor, layout: Layout, memory_kv: Tensor, memory_layout: Layout
    ) -> Tensor:
        """[slots, hidden] or [N, T, hidden] -> the same shape; `memory_kv` is this block's."""
        x = self.attention_residual(x, lambda x: self.attention(x, layout, causal=True))
        x = self.memory_attention_residual(
            x, lambda x: self.memory_attention(x, layout, memory_kv, memory_layout)
        )
        return self.feed_forward_residual(x, self.feed_forward)

    def step(
        self,
        x: Tensor,
        past: Tensor,
        past_mask: Tensor | None,
        memory_kv: Tensor,
        memory_mask: Tensor,
    ) -> Tensor:
        """Do for one new token of each rival what forward does for whole sentences.

        Args:
            x: [N, rivals, hidden].
            past: keys and values of the tokens so far, [N, length, 2, heads, qkv]; the last
                `rivals` places are for the new ones.
            past_mask: which of them each rival goes back to, [N, 1, rivals, length]; None for all.
            memory_kv: this block's part of DecoderState.memory_kv.
            memory_mask: True where the source has a token.

        Returns:
            [N, rivals, hidden].
        """
        x = self.attention_residual(x, lambda x: self.attention.step(x, past, past_mask))
        x = self.memory_attention_residual(
            x, lambda x: self.memory_attention.step_memory(x, memory_kv, memory_mask)
        )
        return self.feed_forward_residual(x, self.feed_forward)


@dataclass
class DecoderState:
    """What a decoder remembers of N sources, each with the same number of rival translations.

    A token that several rivals have in common is remembered once. Nothing moves when rivals change
    places: what changes is from which tokens each of them descends.

    Attributes:
        past: for each layer keys and values of the tokens so far, one step after the other,
            [N, capacity, 2, heads, qkv]; grows as needed.
        lineage: which of these tokens each rival descends from, bool [N, rivals, places used].
        length: tokens of each translation so far.
        memory_kv: for each layer the memory's keys and values, [N, S, 2, heads, qkv].
        memory_mask: True where the source has a token, bool [N, 1, 1, S].
    """

    past: list[Tensor]
    lineage: Tensor
    length: int
    memory_kv: list[Tensor]
    memory_mask: Tensor

    def select(self, sources: Tensor | None, parents: Tensor) -> None:
        """Go on with these sources, and for each with rivals that descend from these of its own.

        Args:
            sources: rising, int64 [new N]; None for all as they are.
            parents: each any number of times, int64 [new N, new rivals].
        """
        if sources is None and parents.shape[1] == self.lineage.shape[1] == 1:
            return  # a lone rival descends from itself
        if sources is not None:
            self.memory_kv = [kv.index_select(0, sources) for kv in self.memory_kv]
            self.memory_mask = self.memory_mask.index_select(0, sources)
            self.lineage = self.lineage.index_select(0, sources)
        used = self.lineage.shape[2]
        self.lineage = self.lineage.gather(1, parents[:, :, None].expand(-1, -1, used))
        alive = self.lineage.any(1)
        if sources is not None or 2 * used > 3 * int(alive.sum(1).max()):
            self._compact(sources, alive)

    def _compact(self, sources: Tensor | None, alive: Tensor) -> None:
        """Keep only what these sources' rivals descend from.

        Args:
            sources: int64 [new N]; None for all as they are.
            alive: what is to be kept of each of them, bool [new N, places used].
        """
        most = int(alive.sum(1).max()) if len(alive) else 0
        # A source with fewer than others keeps some of the dead, which its lineage leaves out.
        kept = alive.sort(dim=1, descending=True, stable=True).indices[:, :most]
        self.lineage = self.lineage.gather(2, kept[:, None].expand(-1, self.lineage.shape[1], -1))
        row = torch.arange(len(kept), device=kept.device) if sources is None else sources
        places = row[:, None] * self.past[0].shape[1] + kept
        for i, kv in enumerate(self.past):
            moved = kv.flatten(0, 1).index_select(0, places.flatten())
            self.past[i] = kv[: len(kept)]  # in the same memory: fresh memory costs more
            self.past[i][:, :most] = moved.view(*kept.shape, *kv.shape[2:])

    def make_room(self, rivals: int) -> None:
        """Add a place for one more token of each rival."""
        used = self.lineage.shape[2]
        own = torch.eye(rivals, dtype=torch.bool, device=self.lineage.device)
        own = own.expand(len(self.lineage), rivals, rivals)
        self.lineage = torch.cat([self.lineage, own], dim=2)
        if used + rivals > self.past[0].shape[1]:
            more = max(used, rivals)
            room = (kv.new_empty(len(kv), more, *kv.shape[2:]) for kv in self.past)
            self.past = [torch.cat(pair, dim=1) for pair in zip(self.past, room, strict=True)]
        self.length += 1


class TransformerDecoder(nn.Module):
    """Embeddings, positions, a stack of blocks, and the output layer.

    With tied embeddings the output layer is the embedding's own matrix, registered once.
    """

    def __init__(self, settings: ModelSettings, vocabulary_size: int) -> None:
        super().__init__()
        self.embedding = TokenEmbedding(vocabulary_size, settings.hidden_dim)
        self.positions = PositionalEncoding(settings.hidden_dim)
        self.dropout = settings.dropout
        self.joins_memory = False  # put on from outside
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
        joined = self._project_jointly(memory) if self.joins_memory else None
        for i, block in enumerate(self._each_block()):
            memory_kv = (
                block.memory_attention.project_memory(memory) if joined is None else joined[i]
            )
            x = block(x, layout, memory_kv, memory_layout)
        return self.norm(x)

    def _project_jointly(self, memory: Tensor) -> list[Tensor]:
        """Give keys and values for each block: [..., hidden] -> [..., 2, heads, qkv] of each."""
        attentions = [block.memory_attention for block in self._each_block()]
        projections = [attention.memory_projection for attention in attentions]
        heads = 2, attentions[0].num_heads, attentions[0].qkv_dim
        return [kv.unflatten(-1, heads) for kv in project_jointly(memory, projections)]

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
        heads = memory_kv[0].shape[2:]
        past = [kv.new_empty(len(memory), 64, *heads) for kv in memory_kv]
        lineage = torch.empty(len(memory), 1, 0, dtype=torch.bool, device=memory.device)
        return DecoderState(past, lineage, 0, memory_kv, key_mask(memory_layout))

    @torch.no_grad()
    def step(self, ids: Tensor, state: DecoderState) -> Tensor:
        """Read one more token of each rival, and remember it in `state`.

        Args:
            ids: the newest tokens, [N, rivals].
            state: from `start`, or after earlier steps.

        Returns:
            States of these tokens that `logits` takes, [N, rivals, hidden].
        """
        x = self.embedding(ids) + self.positions.up_to(state.length + 1)[state.length]
        state.make_room(ids.shape[1])
        all_seen = state.lineage.shape[2] == state.length
        past_mask = None if all_seen else state.lineage[:, None]
        for block, past, memory_kv in zip(
            self._each_block(), state.past, state.memory_kv, strict=True
        ):
            past = past[:, : state.lineage.shape[2]]
            x = block.step(x, past, past_mask, memory_kv, state.memory_mask)
        return self.norm(x)

    def _each_block(self) -> list[DecoderBlock]:
        """Tell the type checker what the blocks are."""
        return cast(list[DecoderBlock], list(self.blocks))
