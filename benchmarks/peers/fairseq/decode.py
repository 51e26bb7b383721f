"""Translates with fairseq's SequenceGenerator, as a contestant of benchmarks/decode_speed.py.

python decode.py NAME FOLDER
"""

import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import on_python_3_11  # noqa: F401 # patches what fairseq is built on
import torch
from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer.transformer_legacy import base_architecture
from fairseq.sequence_generator import SequenceGenerator

from benchmarks.peers.translating import (
    Sentence,
    Task,
    Weights,
    as_fairseq_names_them,
    read_weights,
    translated,
    words_of,
)
from benchmarks.peers.turns import BOS, EOS, PAD, UNK, Turns

# Newer versions of PyTorch want to be told what fairseq's mask is: of padding, which is 1.
torch._transformer_encoder_layer_fwd = partial(torch._transformer_encoder_layer_fwd, mask_type=1)


def build_model(
    weights: Weights, task: Task, pieces: Dictionary, order: list[int]
) -> TransformerModel:
    """Make fairseq's Transformer with dtrain's weights.

    Args:
        weights: by dtrain's names.
        task: sizes.
        pieces: fairseq's dictionary.
        order: dtrain's id of each of its entries.
    """
    sizes = Namespace(
        encoder_embed_dim=task.hidden_dim,
        encoder_ffn_embed_dim=task.feed_forward_dim,
        encoder_layers=task.num_encoder_layers,
        encoder_attention_heads=task.num_heads,
        decoder_ffn_embed_dim=task.feed_forward_dim,
        decoder_layers=task.num_decoder_layers,
        decoder_attention_heads=task.num_heads,
        share_all_embeddings=True,
        max_source_positions=len(weights["positions"]),
        max_target_positions=len(weights["positions"]),
    )
    base_architecture(sizes)
    dictionaries = Namespace(source_dictionary=pieces, target_dictionary=pieces)
    model = TransformerModel.build_model(sizes, dictionaries)
    values = {
        name: torch.from_numpy(array)
        for name, array in as_fairseq_names_them(weights, task).items()
    }
    embedding = torch.from_numpy(weights["decoder.embedding.weight"][order])
    shared = "encoder.embed_tokens", "decoder.embed_tokens", "decoder.output_projection"
    values |= {f"{name}.weight": embedding for name in shared}
    missing, unexpected = model.load_state_dict(values, strict=False)
    assert not unexpected, unexpected
    assert all("version" in name or "_float_tensor" in name for name in missing), missing
    nothing = torch.zeros(pieces.pad() + 1, task.hidden_dim)  # its positions begin behind padding
    for side in (model.encoder, model.decoder):
        side.embed_positions.weights = torch.cat([nothing, torch.from_numpy(weights["positions"])])
    return model.eval()


def main(name: str, folder: Path) -> None:
    """Translate as asked."""
    turns = Turns()
    task = Task.read(folder)
    torch.set_num_threads(task.threads)
    words = words_of(task)
    pieces = Dictionary(bos=words[BOS], pad=words[PAD], eos=words[EOS], unk=words[UNK])
    for word in words[EOS + 1 :]:
        pieces.add_symbol(word)
    order = [words.index(word) for word in pieces.symbols[:4]] + list(range(4, len(words)))
    place = torch.tensor(order).argsort()
    model = build_model(read_weights(folder), task, pieces, order)
    generator = SequenceGenerator(
        [model],
        pieces,
        beam_size=task.beam_size,
        max_len_a=1,
        max_len_b=task.max_growth,
        max_len=task.max_length,
        normalize_scores=False,
    )

    def translate(batch: list[Sentence]) -> list[Sentence]:
        lengths = torch.tensor(list(map(len, batch)))
        source = torch.full((len(batch), int(lengths.max())), pieces.pad())
        for row, sentence in zip(source, batch, strict=True):  # padding comes first
            row[-len(sentence) :] = place[sentence]
        sample = {"net_input": {"src_tokens": source, "src_lengths": lengths}}
        with torch.inference_mode():
            found = generator.generate([model], sample, bos_token=pieces.bos())
        best = [hypotheses[0]["tokens"].tolist() for hypotheses in found]
        return [[order[token] for token in tokens if token != pieces.eos()] for tokens in best]

    turns.take(translated(folder, name, translate))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
