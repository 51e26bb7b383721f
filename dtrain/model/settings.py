"""Settings of the model. Free of torch, so that `--help` answers at once."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ModelSettings(BaseModel):
    """Size and shape of the Transformer; the defaults are the paper's base model (table 3).

    The paper writes hidden_dim as d_model, num_heads as h, feed_forward_dim as d_ff and
    qkv_dim (= hidden_dim / num_heads) as d_k = d_v.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden_dim: int = Field(512, ge=2, description="width of every layer's output (d_model)")
    num_heads: int = Field(8, ge=1, description="attention heads; must divide hidden_dim")
    feed_forward_dim: int = Field(2048, ge=1, description="inner width of the feed-forward layers")
    num_encoder_layers: int = Field(6, ge=1)
    num_decoder_layers: int = Field(6, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1, description="after each sub-layer and the embeddings")
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="of the attention weights")
    norm: Literal["post", "pre"] = Field(
        "post",
        description="layer norm after each residual sum (the paper) or before each sub-layer",
    )
    tie_embeddings: bool = Field(
        True,
        description="one matrix for embedding and output, of both sides if they share pieces",
    )
    max_decode_length: int = Field(256, ge=1, description="most tokens that a translation may have")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ModelSettings":
        if self.hidden_dim % self.num_heads:
            raise ValueError(
                f"hidden_dim {self.hidden_dim} must be a multiple of num_heads {self.num_heads}"
            )
        if self.hidden_dim % 2:
            raise ValueError(f"hidden_dim {self.hidden_dim} must be even (sine and cosine pairs)")
        return self

    @property
    def qkv_dim(self) -> int:
        """Width of one head's queries, keys and values (d_k = d_v)."""
        return self.hidden_dim // self.num_heads
