"""EncoderBlock and TransformerEncoder: from source ids to the memory that the decoder reads."""

from torch import Tensor, nn

from dtrain.batch import Layout
from dtrain.kernels.dropout import dropout
from dtrain.model.attention import MultiHeadAttention
from dtrain.model.embedding import TokenEmbedding
from dtrain.model.positional_encoding import PositionalEncoding
from dtrain.model.settings import ModelSettings
from dtrain.model.sublayer import FeedForward, Residual


class EncoderBlock(nn.Module):
    """Self-attention, then feed-forward, each in a residual (Vaswani et al. 2017, 3.1)."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(
            settings.hidden_dim, settings.num_heads, settings.qkv_dim, settings.attention_dropout
        )
        self.attention_residual = Residual(settings)
        self.feed_forward = FeedForward(settings.hidden_dim, settings.feed_forward_dim)
        self.feed_forward_residual = Residual(settings)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """[slots, hidden] or [N, S, hidden] -> the same shape."""
        x = self.attention_residual(x, lambda x: self.attention(x, layout))
        return self.feed_forward_residual(x, self.feed_forward)


class TransformerEncoder(nn.Module):
    """Embeddings, positions and a stack of blocks.

    Args:
        settings: sizes.
        vocabulary_size: of the encoder's own embeddings; None if it borrows the decoder's.
    """

    def __init__(self, settings: ModelSettings, vocabulary_size: int | None) -> None:
        super().__init__()
        self.embedding = (
            None
            if vocabulary_size is None
            else TokenEmbedding(vocabulary_size, settings.hidden_dim)
        )
        self.positions = PositionalEncoding(settings.hidden_dim)
        self.dropout = settings.dropout
        self.blocks = nn.ModuleList(
            EncoderBlock(settings) for _ in range(settings.num_encoder_layers)
        )
        # Pre-norm blocks leave their sum as it is, so it is normalised once at the end.
        self.norm = nn.LayerNorm(settings.hidden_dim) if settings.norm == "pre" else nn.Identity()

    def forward(
        self, source: Tensor, layout: Layout, borrowed: TokenEmbedding | None = None
    ) -> Tensor:
        """Read the source.

        Args:
            source: ids, [slots] or [N, S].
            layout: where its sentences lie.
            borrowed: embeddings to use if the encoder has none of its own. Lent at each call, not
                kept, so that the shared matrix is registered once, in the decoder.

        Returns:
            The memory, [slots, hidden] or [N, S, hidden].
        """
        embedding = self.embedding or borrowed
        assert embedding is not None, "an encoder without embeddings must be lent some"
        x = self.positions(embedding(source), layout)
        x = dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x, layout)
        return self.norm(x)
