"""Translates with `generate` of Hugging Face transformers, for benchmarks/decode_speed.py.

python decode.py NAME FOLDER
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from torch import Tensor
from transformers import MarianConfig, MarianMTModel

from benchmarks.peers.batches import padded
from benchmarks.peers.translating import (
    Sentence,
    Task,
    Weights,
    as_fairseq_names_them,
    read_weights,
    translated,
)
from benchmarks.peers.turns import BOS, EOS, PAD, Turns


def build_model(weights: Weights, task: Task) -> MarianMTModel:
    """Make a MarianMT with dtrain's weights."""
    config = MarianConfig(
        vocab_size=task.vocabulary_size,
        d_model=task.hidden_dim,
        encoder_layers=task.num_encoder_layers,
        decoder_layers=task.num_decoder_layers,
        encoder_attention_heads=task.num_heads,
        decoder_attention_heads=task.num_heads,
        encoder_ffn_dim=task.feed_forward_dim,
        decoder_ffn_dim=task.feed_forward_dim,
        max_position_embeddings=len(weights["positions"]),
        activation_function="relu",
        scale_embedding=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
        forced_eos_token_id=None,
        decoder_start_token_id=BOS,
    )
    model = MarianMTModel(config).eval()
    values = {
        f"model.{name}": torch.from_numpy(array)
        for name, array in as_fairseq_names_them(weights, task).items()
    }
    embedding, positions = (
        torch.from_numpy(weights[name]) for name in ("decoder.embedding.weight", "positions")
    )
    shared = "model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"
    values |= {f"{name}.weight": embedding for name in shared}
    for side in ("encoder", "decoder"):
        values[f"model.{side}.embed_positions.weight"] = positions
    values["final_logits_bias"] = torch.zeros(1, task.vocabulary_size)
    model.load_state_dict(values)
    return model


def main(name: str, folder: Path) -> None:
    """Translate as asked."""
    turns = Turns()
    task = Task.read(folder)
    torch.set_num_threads(task.threads)
    model = build_model(read_weights(folder), task)

    def translate(batch: list[Sentence]) -> list[Sentence]:
        source = torch.from_numpy(padded(batch))
        found = model.generate(
            source,
            attention_mask=(source != PAD).long(),
            num_beams=task.beam_size,
            do_sample=False,
            length_penalty=0.0,
            max_new_tokens=task.longest(batch) + 1,
        )
        assert isinstance(found, Tensor), "nothing else was asked for"
        return [up_to_end(row) for row in found[:, 1:].tolist()]

    turns.take(translated(folder, name, translate))


def up_to_end(row: Sentence) -> Sentence:
    """Cut a row off where its sentence ends."""
    return row[: row.index(EOS)] if EOS in row else row


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
