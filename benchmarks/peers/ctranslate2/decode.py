"""Translates with CTranslate2, as a contestant of benchmarks/decode_speed.py.

python decode.py NAME FOLDER COMPUTE_TYPE
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import ctranslate2
from ctranslate2.specs import TransformerSpec
from ctranslate2.specs.common_spec import LayerNormSpec, LinearSpec

from benchmarks.peers.translating import (
    Sentence,
    Task,
    Weights,
    read_weights,
    translated,
    words_of,
)
from benchmarks.peers.turns import BOS, EOS, UNK, Turns


def converted(weights: Weights, task: Task) -> TransformerSpec:
    """Put dtrain's weights into CTranslate2's model."""
    layers = task.num_encoder_layers, task.num_decoder_layers
    spec = TransformerSpec.from_config(layers, task.num_heads, pre_norm=False)
    words = words_of(task)
    spec.register_source_vocabulary(words)
    spec.register_target_vocabulary(words)
    names = "bos_token", "eos_token", "unk_token", "decoder_start_token"
    for name, token in zip(names, (BOS, EOS, UNK, BOS), strict=True):
        setattr(spec.config, name, words[token])
    embedding = weights["decoder.embedding.weight"]
    spec.encoder.embeddings[0].weight = embedding
    spec.decoder.embeddings.weight = spec.decoder.projection.weight = embedding
    for side in (spec.encoder, spec.decoder):
        side.position_encodings.encodings = weights["positions"]
    width = task.hidden_dim
    for name, stack in (("encoder", spec.encoder.layer), ("decoder", spec.decoder.layer)):
        for i, layer in enumerate(stack):
            block = f"{name}.blocks.{i}"
            set_linear(layer.self_attention.linear[0], weights, f"{block}.attention.qkv_proj")
            set_linear(layer.self_attention.linear[1], weights, f"{block}.attention.o_proj")
            set_norm(layer.self_attention.layer_norm, weights, f"{block}.attention_residual.norm")
            if name == "decoder":
                fused, memory = f"{block}.memory_attention.qkv_proj", layer.attention
                set_linear(memory.linear[0], weights, fused, slice(width))
                set_linear(memory.linear[1], weights, fused, slice(width, None))
                set_linear(memory.linear[2], weights, f"{block}.memory_attention.o_proj")
                set_norm(memory.layer_norm, weights, f"{block}.memory_attention_residual.norm")
            set_linear(layer.ffn.linear_0, weights, f"{block}.feed_forward.inner")
            set_linear(layer.ffn.linear_1, weights, f"{block}.feed_forward.outer")
            set_norm(layer.ffn.layer_norm, weights, f"{block}.feed_forward_residual.norm")
    return spec


def set_linear(spec: LinearSpec, weights: Weights, name: str, rows: slice = slice(None)) -> None:
    """Fill a linear layer with some rows of one of dtrain's."""
    spec.weight, spec.bias = weights[f"{name}.weight"][rows], weights[f"{name}.bias"][rows]


def set_norm(spec: LayerNormSpec, weights: Weights, name: str) -> None:
    """Fill a layer norm."""
    spec.gamma, spec.beta = weights[f"{name}.weight"], weights[f"{name}.bias"]


def main(name: str, folder: Path, compute_type: str) -> None:
    """Translate as asked."""
    turns = Turns()
    task = Task.read(folder)
    words = words_of(task)
    ids = {word: i for i, word in enumerate(words)}
    with tempfile.TemporaryDirectory() as place:
        spec = converted(read_weights(folder), task)
        spec.validate()
        spec.optimize()
        spec.save(place)
        del spec
        translator = ctranslate2.Translator(
            place, "cpu", compute_type=compute_type, inter_threads=1, intra_threads=task.threads
        )

    def translate(batch: list[Sentence]) -> list[Sentence]:
        results = translator.translate_batch(
            [[words[token] for token in sentence] for sentence in batch],
            beam_size=task.beam_size,
            length_penalty=0,
            max_decoding_length=task.longest(batch),
        )
        return [[ids[word] for word in result.hypotheses[0]] for result in results]

    turns.take(translated(folder, name, translate))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
