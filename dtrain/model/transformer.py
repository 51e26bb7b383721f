"""Transformer: encoder and decoder tied together (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762)."""

import torch
from torch import Tensor, nn

from dtrain.batch import BOS_ID, EOS_ID, PAD_ID, Batch, Layout
from dtrain.model.decoder import TransformerDecoder
from dtrain.model.encoder import TransformerEncoder
from dtrain.model.settings import ModelSettings

MAX_GROWTH = 50  # tokens that a translation may have beyond its source's (the paper's 6.1)


class Transformer(nn.Module):
    """A sequence-to-sequence model for batches packed or padded, with the same results.

    Attributes:
        max_decode_length: most tokens that a translation may have.
    """

    def __init__(
        self,
        settings: ModelSettings,
        source_vocabulary_size: int,
        target_vocabulary_size: int | None = None,
    ) -> None:
        """Build the model with random weights.

        Args:
            settings: sizes.
            source_vocabulary_size: tokens of the source's vocabulary.
            target_vocabulary_size: tokens of the target's; None if both share one vocabulary, and
                then, with tied embeddings, one matrix.
        """
        super().__init__()
        shared = target_vocabulary_size is None and settings.tie_embeddings
        self.settings = settings
        self.max_decode_length = settings.max_decode_length
        self.encoder = TransformerEncoder(settings, None if shared else source_vocabulary_size)
        self.decoder = TransformerDecoder(
            settings, target_vocabulary_size or source_vocabulary_size
        )

    def encode(self, source: Tensor, source_layout: Layout) -> Tensor:
        """Read the source: ids [slots] or [N, S] -> memory [slots, hidden] or [N, S, hidden]."""
        return self.encoder(source, source_layout, self.decoder.embedding)

    def decode(
        self, target_in: Tensor, target_layout: Layout, memory: Tensor, source_layout: Layout
    ) -> Tensor:
        """Read the target: ids [slots] or [N, T] -> states [slots, hidden] or [N, T, hidden]."""
        return self.decoder(target_in, target_layout, memory, source_layout)

    def logits(self, hidden: Tensor) -> Tensor:
        """Score every token as the next: [..., hidden] -> [..., vocabulary]."""
        return self.decoder.logits(hidden)

    def hidden(self, batch: Batch) -> Tensor:
        """Give the decoder's states for a batch: [slots, hidden] or [N, T, hidden]."""
        memory = self.encode(batch.source, batch.source_layout)
        return self.decode(batch.target_in, batch.target_layout, memory, batch.source_layout)

    def forward(self, batch: Batch) -> Tensor:
        """Give the logits of each next target token: [slots, vocabulary] or [N, T, vocabulary]."""
        return self.logits(self.hidden(batch))

    def decode_limits(self, source_layout: Layout) -> Tensor:
        """Say how many tokens each translation may have, the end of sentence aside: int64 [N]."""
        return (source_layout.lengths + MAX_GROWTH).clamp(max=self.max_decode_length)

    @torch.no_grad()
    def generate(self, source: Tensor, source_layout: Layout) -> list[list[int]]:
        """Translate greedily: always take the likeliest next token.

        Args:
            source: padded ids, [N, S].
            source_layout: where its sentences lie.

        Returns:
            The ids of each translation, without BOS_ID and EOS_ID.
        """
        limits = self.decode_limits(source_layout)
        state = self.decoder.start(self.encode(source, source_layout), source_layout)
        ids = torch.full((len(source), 1), BOS_ID, device=source.device)
        finished = torch.zeros_like(limits, dtype=torch.bool)
        translations: list[list[int]] = [[] for _ in limits]
        for length in range(int(limits.max())):
            logits = self.logits(self.decoder.step(ids, state))
            logits[..., [PAD_ID, BOS_ID]] = -torch.inf
            ids = logits.argmax(-1)
            finished |= (ids[:, 0] == EOS_ID) | (limits <= length)
            if finished.all():
                break
            for translation, token, done in zip(
                translations, ids[:, 0].tolist(), finished.tolist(), strict=True
            ):
                if not done:
                    translation.append(token)
        return translations
