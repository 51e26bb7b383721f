"""torch.nn's own modules with the weights of ours, to compare with; and sentences to feed both."""

import warnings

import numpy as np
import torch
from torch import nn

from dtrain.batch import EOS_ID, Batch, Layout
from dtrain.model.attention import MultiHeadAttention
from dtrain.model.decoder import DecoderBlock
from dtrain.model.encoder import EncoderBlock
from dtrain.model.settings import ModelSettings
from dtrain.model.sublayer import FeedForward
from dtrain.model.transformer import Transformer

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
DTYPES = list(TOLERANCE)


def tiny_settings(**changes) -> ModelSettings:
    sizes = {"hidden_dim": 16, "num_heads": 2, "feed_forward_dim": 24}
    layers = {"num_encoder_layers": 2, "num_decoder_layers": 2}
    return ModelSettings(**{**sizes, **layers, **changes})


def shaken(module: nn.Module) -> nn.Module:
    """Make every parameter random, biases and norms too, so that none can be forgotten."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module.eval()


def random_ids(lengths, vocabulary_size, seed=0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [[*generator.integers(4, vocabulary_size, n - 1).tolist(), EOS_ID] for n in lengths]


def packed(sources, targets, *how) -> Batch:
    def flat(rows):
        return np.concatenate(rows), np.array([len(row) for row in rows])

    return Batch.packed(flat(sources), flat(targets), *how)


def unpacked(slots: torch.Tensor, layout: Layout) -> torch.Tensor:
    """[slots, ...] -> one row a token, sentence by sentence, slack left out."""
    return slots[layout.token_mask]


def tokens_of(cells: torch.Tensor, layout: Layout) -> torch.Tensor:
    """[N, L, ...] -> one row a token, sentence by sentence, padding left out."""
    return cells[layout.mask]


def twin_attention(ours: MultiHeadAttention) -> nn.MultiheadAttention:
    hidden_dim = ours.o_proj.out_features
    twin = nn.MultiheadAttention(hidden_dim, ours.num_heads, batch_first=True)
    twin.to(ours.o_proj.weight.dtype)
    copy_attention(ours, twin)
    return twin.eval()


def copy_attention(ours: MultiHeadAttention, twin: nn.MultiheadAttention) -> None:
    twin.load_state_dict(
        {
            "in_proj_weight": ours.qkv_proj.weight,
            "in_proj_bias": ours.qkv_proj.bias,
            "out_proj.weight": ours.o_proj.weight,
            "out_proj.bias": ours.o_proj.bias,
        }
    )


def copy_feed_forward(ours: FeedForward, twin: nn.Module) -> None:
    twin.linear1.load_state_dict(ours.inner.state_dict())
    twin.linear2.load_state_dict(ours.outer.state_dict())


def twin_encoder_layer(ours: EncoderBlock) -> nn.TransformerEncoderLayer:
    weight = ours.feed_forward.inner.weight
    twin = nn.TransformerEncoderLayer(
        weight.shape[1],
        ours.attention.num_heads,
        weight.shape[0],
        batch_first=True,
        norm_first=ours.attention_residual.norm_first,
    ).to(weight.dtype)
    copy_attention(ours.attention, twin.self_attn)
    copy_feed_forward(ours.feed_forward, twin)
    twin.norm1.load_state_dict(ours.attention_residual.norm.state_dict())
    twin.norm2.load_state_dict(ours.feed_forward_residual.norm.state_dict())
    return twin.eval()


def twin_decoder_layer(ours: DecoderBlock) -> nn.TransformerDecoderLayer:
    weight = ours.feed_forward.inner.weight
    twin = nn.TransformerDecoderLayer(
        weight.shape[1],
        ours.attention.num_heads,
        weight.shape[0],
        batch_first=True,
        norm_first=ours.attention_residual.norm_first,
    ).to(weight.dtype)
    copy_attention(ours.attention, twin.self_attn)
    copy_attention(ours.memory_attention, twin.multihead_attn)
    copy_feed_forward(ours.feed_forward, twin)
    twin.norm1.load_state_dict(ours.attention_residual.norm.state_dict())
    twin.norm2.load_state_dict(ours.memory_attention_residual.norm.state_dict())
    twin.norm3.load_state_dict(ours.feed_forward_residual.norm.state_dict())
    return twin.eval()


def twin_transformer(ours: Transformer) -> nn.Transformer:
    """The stacks without embeddings and output; final norms only if the blocks are pre-norm."""
    settings = ours.settings
    with warnings.catch_warnings():  # that pre-norm has no fast path
        warnings.simplefilter("ignore")
        twin = nn.Transformer(
            settings.hidden_dim,
            settings.num_heads,
            settings.num_encoder_layers,
            settings.num_decoder_layers,
            settings.feed_forward_dim,
            batch_first=True,
            norm_first=settings.norm == "pre",
        )
    twin.encoder.layers = nn.ModuleList(twin_encoder_layer(b) for b in ours.encoder.blocks)
    twin.decoder.layers = nn.ModuleList(twin_decoder_layer(b) for b in ours.decoder.blocks)
    twin.encoder.norm, twin.decoder.norm = ours.encoder.norm, ours.decoder.norm
    return twin.to(ours.decoder.embedding.weight.dtype).eval()
