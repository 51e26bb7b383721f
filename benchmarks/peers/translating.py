"""What a contestant of benchmarks/decode_speed.py is given, and what it hands back. numpy alone.

All translate the same sentences with the same weights, those of a model that dtrain has trained:
`weights.npz` has them by dtrain's names, and each contestant renames them for its own model.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.turns import Rows, Step

Sentence = list[int]
Weights = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Task:
    """What everybody is to translate with. Sizes of the model are filled in when it is handed out.

    Attributes:
        threads: of the process.
        batch_size: sentences that are translated at once.
        beam_size: rival translations; 1 is greedy.
        hidden_dim: width of the model.
        num_heads: of every attention.
        feed_forward_dim: inner width.
        num_encoder_layers: of the encoder.
        num_decoder_layers: of the decoder.
        vocabulary_size: pieces, special ones included; one vocabulary for both sides.
        max_growth: tokens that a translation may have beyond its source's.
        max_length: tokens that it may have at most.
    """

    threads: int
    batch_size: int
    beam_size: int
    hidden_dim: int = 0
    num_heads: int = 0
    feed_forward_dim: int = 0
    num_encoder_layers: int = 0
    num_decoder_layers: int = 0
    vocabulary_size: int = 0
    max_growth: int = 0
    max_length: int = 0

    def write(self, folder: Path) -> None:
        """Write it to `task.json`."""
        (folder / "task.json").write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Task":
        """Read what `write` wrote."""
        return cls(**json.loads((folder / "task.json").read_text(encoding="utf-8")))

    def longest(self, batch: list[Sentence]) -> int:
        """Give the tokens that translations of a batch may have, ends aside."""
        return min(max(map(len, batch)) + self.max_growth, self.max_length)


def words_of(task: Task) -> list[str]:
    """Give a word for each piece, for toolkits that want one; pieces are no text here."""
    return [f"piece{i}" for i in range(task.vocabulary_size)]


def read_weights(folder: Path) -> Weights:
    """Read all weights, by dtrain's names, and `positions`, the encodings of positions."""
    with np.load(folder / "weights.npz") as arrays:
        return dict(arrays)


def as_fairseq_names_them(weights: Weights, task: Task) -> Weights:
    """Rename a model's layers as fairseq does, and after it transformers: q, k and v apart."""
    renamed: Weights = {}
    layers = {"encoder": task.num_encoder_layers, "decoder": task.num_decoder_layers}
    for side, count in layers.items():
        for i in range(count):
            ours, theirs = f"{side}.blocks.{i}", f"{side}.layers.{i}"
            same = {
                "attention.o_proj": "self_attn.out_proj",
                "attention_residual.norm": "self_attn_layer_norm",
                "memory_attention.o_proj": "encoder_attn.out_proj",
                "memory_attention_residual.norm": "encoder_attn_layer_norm",
                "feed_forward.inner": "fc1",
                "feed_forward.outer": "fc2",
                "feed_forward_residual.norm": "final_layer_norm",
            }
            fused = {"attention.qkv_proj": "self_attn", "memory_attention.qkv_proj": "encoder_attn"}
            for kind in ("weight", "bias"):
                for mine, other in same.items():
                    if f"{ours}.{mine}.{kind}" in weights:
                        renamed[f"{theirs}.{other}.{kind}"] = weights[f"{ours}.{mine}.{kind}"]
                for mine, other in fused.items():
                    if f"{ours}.{mine}.{kind}" in weights:
                        parts = np.split(weights[f"{ours}.{mine}.{kind}"], 3)
                        for letter, part in zip("qkv", parts, strict=True):
                            renamed[f"{theirs}.{other}.{letter}_proj.{kind}"] = part
    return renamed


def translated(
    folder: Path, name: str, translate: Callable[[list[Sentence]], list[Sentence]]
) -> Iterator[Step]:
    """Translate batch after batch, without end; writes translations to `NAME.jsonl`.

    Args:
        folder: where task and sentences are.
        name: of the contestant.
        translate: from sentences, which end with EOS, to translations, which do not.
    """
    task, rows = Task.read(folder), Rows.read(folder, "source")
    sentences = [rows[row].tolist() for row in range(len(rows))]
    size = task.batch_size
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as answers:
        while True:
            for first in range(0, len(sentences), size):
                batch = sentences[first : first + size]
                found = translate(batch)
                answers.write(json.dumps({"first": first, "translations": found}) + "\n")
                answers.flush()
                source, target = sum(map(len, batch)), sum(len(one) + 1 for one in found)
                cells = [len(each) * max(map(len, each)) for each in (batch, found)]
                yield Step(source, target, *cells, float("nan"))
