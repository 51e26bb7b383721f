"""Translates with JoeyNMT's search, as a contestant of benchmarks/decode_speed.py.

python decode.py NAME FOLDER
"""

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from joeynmt.batch import Batch
from joeynmt.model import Model, build_model
from joeynmt.search import search
from joeynmt.vocabulary import Vocabulary
from torch import nn

from benchmarks.peers.batches import padded
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

ORDER = [UNK, PAD, BOS, EOS]  # JoeyNMT's ids of these are 0, 1, 2, 3
NAMES = {
    "encoder": {
        "self_attn.": "src_src_att.",
        "self_attn_layer_norm.": "layer_norm.",
    },
    "decoder": {
        "self_attn.": "trg_trg_att.",
        "self_attn_layer_norm.": "x_layer_norm.",
        "encoder_attn.": "src_trg_att.",
        "encoder_attn_layer_norm.": "dec_layer_norm.",
    },
}
PARTS = {
    "fc1.": "feed_forward.pwff_layer.0.",
    "fc2.": "feed_forward.pwff_layer.3.",
    "final_layer_norm.": "feed_forward.layer_norm.",
    "q_proj.": "q_layer.",
    "k_proj.": "k_layer.",
    "v_proj.": "v_layer.",
    "out_proj.": "output_layer.",
}


def renamed(name: str) -> str:
    """Give JoeyNMT's name for what fairseq calls so."""
    side, layers, number, *rest = name.split(".")
    text = ".".join(rest)
    for old, new in {**NAMES[side], **PARTS}.items():
        if text.startswith(old) or f".{old}" in text:
            text = text.replace(old, new)
    return ".".join((side, layers, number, text))


def make_model(weights: Weights, task: Task, vocabulary: Vocabulary) -> Model:
    """Make JoeyNMT's Transformer with dtrain's weights."""
    sizes = {
        "type": "transformer",
        "num_heads": task.num_heads,
        "embeddings": {"embedding_dim": task.hidden_dim, "scale": True},
        "hidden_size": task.hidden_dim,
        "ff_size": task.feed_forward_dim,
        "layer_norm": "post",
    }
    settings = {
        "initializer": "xavier_uniform",
        "tied_embeddings": True,
        "tied_softmax": True,
        "encoder": {**sizes, "num_layers": task.num_encoder_layers},
        "decoder": {**sizes, "num_layers": task.num_decoder_layers},
    }
    model = build_model(settings, vocabulary, vocabulary)
    values = {
        renamed(name): torch.from_numpy(array)
        for name, array in as_fairseq_names_them(weights, task).items()
    }
    order = [*ORDER, *range(4, task.vocabulary_size)]
    embedding = torch.from_numpy(weights["decoder.embedding.weight"][order])
    shared = "src_embed.lut", "trg_embed.lut", "decoder.output_layer"
    values |= {f"{name}.weight": embedding for name in shared}
    for side in ("encoder", "decoder"):
        values[f"{side}.pe.pe"] = model.state_dict()[f"{side}.pe.pe"]  # the same as dtrain's
    model.load_state_dict(values)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
    return model.eval()


def main(name: str, folder: Path) -> None:
    """Translate as asked."""
    turns = Turns()
    task = Task.read(folder)
    torch.set_num_threads(task.threads)
    words = words_of(task)
    special = {}
    for token, text in enumerate(("unk", "pad", "bos", "eos")):
        special |= {f"{text}_id": token, f"{text}_token": words[ORDER[token]]}
    vocabulary = Vocabulary(words[4:], SimpleNamespace(**special, sep_token=None, lang_tags=[]))
    model = make_model(read_weights(folder), task, vocabulary)

    def translate(batch: list[Sentence]) -> list[Sentence]:
        source = torch.from_numpy(padded(batch))
        lengths = (source != PAD).sum(1)
        swapped = torch.where(source <= UNK, UNK - source, source)  # PAD is 1 here, UNK 0
        indices = torch.arange(len(batch))
        nothing = None, None, None
        made = Batch(swapped, lengths, *nothing, indices, source.device, 1, EOS, is_train=False)
        longest = task.longest(batch)
        rows = search(model, made, longest, task.beam_size, beam_alpha=-1)[0]
        return [up_to_end(row) for row in rows.tolist()]

    turns.take(translated(folder, name, translate))


def up_to_end(row: Sentence) -> Sentence:
    """Cut a row off where its sentence ends, and give its unknown piece dtrain's id."""
    row = row[: row.index(EOS)] if EOS in row else row
    return [UNK - token if token <= UNK else token for token in row]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
